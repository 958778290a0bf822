"""The chunked losses against plain autograd on whole [tokens, vocabulary] tensors, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gori.distill.losses import TERMS, distillation_loss
from gori.errors import GoriError


def plain(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, weights: dict[str, float], t: float) -> Tensor:
    logits, teacher = h @ W.T, th @ tW.T
    q, p = (logits / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    m = ((q.exp() + p.exp()) / 2).log()
    kl = lambda a, b: F.kl_div(b, a, log_target=True, reduction="none").sum(-1).mean()  # noqa: E731
    terms = {
        "ce": F.cross_entropy(logits, y),
        "forward_kl": t**2 * kl(p, q),
        "reverse_kl": t**2 * kl(q, p),
        "jsd": t**2 * 0.5 * (kl(p, m) + kl(q, m)),
    }
    return sum(w * terms[k] for k, w in weights.items())  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 11),
    st.dictionaries(st.sampled_from(TERMS), st.floats(0.1, 2.0), min_size=1),
    st.floats(0.5, 4.0),
    st.integers(0, 1000),
)
def test_loss_and_both_gradients_equal_the_plain_ones(
    n: int, chunk: int, weights: dict[str, float], temperature: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    h, W, th, tW = draw(n, 5), draw(13, 5), draw(n, 7), draw(13, 7)
    y = torch.randint(0, 13, (n,), generator=g)
    h.requires_grad_(), W.requires_grad_()
    want = plain(h, W, th, tW, y, weights, temperature)
    want_grads = torch.autograd.grad(3 * want, (h, W))
    got, terms = distillation_loss(h, W, th, tW, y, weights, temperature, chunk)
    got_grads = torch.autograd.grad(3 * got, (h, W))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert set(terms) == set(weights)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    h, W = torch.randn(6, 4), torch.randn(9, 4)
    y = torch.arange(6)
    loss, terms = distillation_loss(h, W, None, None, y, {"ce": 1.0})
    assert loss.item() == pytest.approx(F.cross_entropy(h @ W.T, y).item(), rel=1e-6)
    assert terms["ce"] == pytest.approx(loss.item())


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    h, W = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    for term in ("forward_kl", "reverse_kl", "jsd"):
        loss, _ = distillation_loss(h, W, h, W, torch.arange(6), {term: 1.0}, temperature=2.0)
        assert abs(loss.item()) < 1e-14


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"forward_lk": 1.0}, "did you mean 'forward_kl'"),
        ({"ce": 0.0}, "every loss term has weight 0"),
        ({"ce": -1.0}, "not negative"),
        ({"jsd": 1.0}, "jsd need a teacher"),
    ],
)
def test_bad_terms_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(GoriError, match=message):
        distillation_loss(torch.randn(2, 3), torch.randn(5, 3), None, None, torch.zeros(2, dtype=torch.long), weights)


def test_teacher_and_student_with_other_vocabularies_are_refused() -> None:
    with pytest.raises(GoriError, match="teacher's vocabulary 6 is not the student's 5"):
        distillation_loss(
            torch.randn(2, 3), torch.randn(5, 3), torch.randn(2, 3), torch.randn(6, 3),
            torch.zeros(2, dtype=torch.long), {"jsd": 1.0},
        )  # fmt: skip
