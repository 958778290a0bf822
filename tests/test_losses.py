"""The chunked losses against plain autograd on whole [tokens, vocabulary] tensors, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gori.chunked import cross_entropy
from gori.distill.divergences import DIVERGENCES
from gori.distill.losses import distillation_loss, sparse_loss
from gori.errors import GoriError

NAMES = (*DIVERGENCES, "ce", "jsd@0.2", "skew_kl@0.4", "skew_reverse_kl@0.7")


def plain(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, weights: dict[str, float], t: float) -> Tensor:
    logits, teacher = h @ W.T, th @ tW.T
    q, p = (logits / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    mix = lambda share: (share * p.exp() + (1 - share) * q.exp()).log()  # noqa: E731
    kl = lambda a, b: F.kl_div(b, a, log_target=True, reduction="none").sum(-1).mean()  # noqa: E731
    total = torch.zeros((), dtype=h.dtype)
    for name, w in weights.items():
        kind, _, value = name.partition("@")
        a = float(value or {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}.get(kind, 0))
        terms = {
            "ce": lambda: F.cross_entropy(logits, y),
            "forward_kl": lambda: t**2 * kl(p, q),
            "reverse_kl": lambda: t**2 * kl(q, p),
            "jsd": lambda a=a: t**2 * (a * kl(p, mix(a)) + (1 - a) * kl(q, mix(a))),
            "skew_kl": lambda a=a: t**2 * kl(p, mix(a)),
            "skew_reverse_kl": lambda a=a: t**2 * kl(q, mix(1 - a)),
        }
        total = total + w * terms[kind]()
    return total


def draws(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    h, W, th, tW = draw(n, 5), draw(13, 5), draw(n, 7), draw(13, 7)
    return h.requires_grad_(), W.requires_grad_(), th, tW, torch.randint(0, 13, (n,), generator=g)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 11),
    st.integers(1, 11),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 2.0), min_size=1),
    st.floats(0.5, 4.0) | st.just(1.0),
    st.integers(0, 1000),
)
def test_loss_and_both_gradients_equal_the_plain_ones(
    n: int, chunk: int, block: int, weights: dict[str, float], temperature: float, seed: int
) -> None:
    h, W, th, tW, y = draws(seed, n)
    want = plain(h, W, th, tW, y, weights, temperature)
    want_grads = torch.autograd.grad(3 * want, (h, W))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gori.chunked.BLOCK_BYTES", block * 13 * 8)
        got, terms = distillation_loss(h, W, th, tW, y, weights, temperature, chunk)
    got_grads = torch.autograd.grad(3 * got, (h, W))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert set(terms) == set(weights)


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_near_float64_where_distributions_are_far_apart(name: str) -> None:
    """Logits of ±40: most probabilities underflow in one of the two."""
    h, W, th, tW, y = draws(3, 8)
    wide = [(4 * h).detach().requires_grad_(), (3 * W).detach().requires_grad_(), 4 * th, 3 * tW]
    narrow = [t.detach().float().requires_grad_(t.requires_grad) for t in wide]
    want, _ = distillation_loss(*wide, y, {name: 1.0})
    got, _ = distillation_loss(*narrow, y, {name: 1.0})
    assert got.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    for a, b in zip(torch.autograd.grad(got, narrow[:2]), torch.autograd.grad(want, wide[:2]), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-3)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    h, W = torch.randn(6, 4), torch.randn(9, 4)
    y = torch.arange(6)
    loss, terms = distillation_loss(h, W, None, None, y, {"ce": 1.0}, temperature=3.0)
    assert loss.item() == pytest.approx(F.cross_entropy(h @ W.T, y).item(), rel=1e-6)
    assert terms["ce"] == pytest.approx(loss.item())


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_cross_entropy_by_chunks_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    h, W, _, _, y = draws(4, 20)
    want = F.cross_entropy(h @ W.T, y)
    monkeypatch.setattr("gori.chunked.WHOLE_BYTES", 0)
    monkeypatch.setattr("gori.chunked.chunk_rows", lambda head: chunk)
    got = cross_entropy(h, W, y)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (h, W)), torch.autograd.grad(want, (h, W)), strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_the_heads_gradient_is_summed_over_chunks_without_rounding() -> None:
    """A thousand chunks of one token: summed in bfloat16 most would be lost."""
    g = torch.Generator().manual_seed(5)
    h, W = (torch.randn(1000, 8, generator=g), torch.randn(4, 8, generator=g).requires_grad_())
    y = torch.randint(0, 4, (1000,), generator=g)
    wide = [h.bfloat16().double(), W.detach().bfloat16().double().requires_grad_()]
    want = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, y), wide[1])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = distillation_loss(h.bfloat16(), W, None, None, y, {"ce": 1.0}, chunk=1)
    got = torch.autograd.grad(loss, W)[0]
    assert got.dtype == torch.float32
    assert float((got.double() - want).norm() / want.norm()) < 0.01


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    h, W = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    for term in DIVERGENCES:
        loss, _ = distillation_loss(h, W, h, W, torch.arange(6), {term: 1.0}, temperature=2.0)
        assert abs(loss.item()) < 1e-14


@pytest.mark.parametrize("weights", [{"forward_kl": 0.7, "ce": 0.4}, {"jsd@0.3": 1.0}])
def test_the_inputs_are_left_as_they_were_and_a_second_backward_pass_is_refused(weights: dict[str, float]) -> None:
    h, W, th, tW, y = draws(0, 6)
    before = [t.detach().clone() for t in (h, W, th, tW)]
    loss, _ = distillation_loss(h, W, th, tW, y, weights, temperature=2.0, chunk=4)
    torch.autograd.grad(loss, (h, W), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (h, W, th, tW), strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (h, W))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_probability_of_the_teacher_as_entries_is_forward_kl(tail: bool, temperature: float) -> None:
    h, W, th, tW, y = draws(1, 7)
    weights = {"forward_kl": 0.6, "ce": 0.4}
    p = (th @ tW.T / temperature).softmax(-1)
    ids = torch.stack([torch.randperm(13, generator=torch.Generator().manual_seed(i)) for i in range(7)])
    want, terms = distillation_loss(h, W, th, tW, y, weights, temperature)
    got, sparse = sparse_loss(h, W, ids, p.gather(1, ids), y, weights, temperature, tail, chunk=3)
    entropy = 0.0 if tail else -float((p * p.log()).sum(-1).mean()) * temperature**2
    assert sparse["forward_kl"] == pytest.approx(terms["forward_kl"] + entropy, rel=1e-9)
    assert sparse["ce"] == pytest.approx(terms["ce"])
    for a, b in zip(torch.autograd.grad(got, (h, W)), torch.autograd.grad(want, (h, W)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_sampled_entries_is_forward_kls_on_average() -> None:
    """50 draws from the teacher, 4,000 times: the mean lies within five standard errors in every coordinate."""
    h, W, th, tW, y = draws(2, 1)
    p = (th @ tW.T).softmax(-1)[0]
    (want,) = torch.autograd.grad(distillation_loss(h, W, th, tW, y, {"forward_kl": 1.0})[0], h)
    g = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [torch.bincount(torch.multinomial(p, 50, True, generator=g), minlength=13) for _ in range(4000)]
    )
    many, ids = h.detach().expand(4000, -1).clone().requires_grad_(), torch.arange(13).expand(4000, -1)
    loss, _ = sparse_loss(many, W, ids, counts / 50, y.expand(4000), {"forward_kl": 1.0})
    (grads,) = torch.autograd.grad(loss, many)
    grads = grads * 4000
    assert ((grads.mean(0) - want[0]).abs() < 5 * grads.std(0) / 4000**0.5).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans())
def test_entries_of_any_number_equal_autograd(seed: int, entries: list[int], tail: bool) -> None:
    """Rows of 0 to 5 entries, filled up with weight 0 and ids that other entries have too."""
    h, W, th, tW, y = draws(seed, len(entries))
    p = (th @ tW.T).softmax(-1)
    values, ids = p.topk(5, dim=-1)
    filled = torch.arange(5) < torch.tensor(entries).unsqueeze(1)
    weights, ids = torch.where(filled, values, 0.0), torch.where(filled, ids, ids[:, 1:2])
    q = (h @ W.T).log_softmax(-1)
    dense = torch.zeros_like(p).scatter_add_(1, ids, weights)
    want = -(dense * q).sum(-1)
    if tail:
        rest, others = 1 - dense.sum(-1), torch.where(dense > 0, 0.0, q.exp()).sum(-1)
        want = want + torch.special.xlogy(dense, dense).sum(-1) + torch.special.xlogy(rest, rest) - rest * others.log()
    got, _ = sparse_loss(h, W, ids, weights, y, {"forward_kl": 1.0}, tail=tail)
    assert got.item() == pytest.approx(want.mean().item(), rel=1e-6, abs=1e-6)
    for a, b in zip(torch.autograd.grad(got, (h, W)), torch.autograd.grad(want.mean(), (h, W)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_cross_entropy_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    h, W, _, _, y = draws(0, 9)
    want = F.cross_entropy(h @ W.T, y)
    monkeypatch.setattr("gori.chunked.WHOLE_BYTES", 0)
    monkeypatch.setattr("gori.chunked.chunk_rows", lambda head: 4)
    got = cross_entropy(h, W, y, compiled=True)
    for a, b in zip(torch.autograd.grad(got, (h, W)), torch.autograd.grad(want, (h, W)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("weights", [{"forward_kl": 0.7, "ce": 0.4}, {"jsd@0.3": 1.0}])
def test_a_compiled_chunk_gives_the_same_numbers(weights: dict[str, float]) -> None:
    h, W, th, tW, y = (t.detach() for t in draws(0, 9))
    found = []
    for compiled in (False, True):
        mine = [t.float().requires_grad_() for t in (h, W)]
        loss, _ = distillation_loss(*mine, th.float(), tW.float(), y, weights, 2.0, chunk=4, compiled=compiled)
        found.append([loss.detach(), *torch.autograd.grad(loss, mine)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"forward_lk": 1.0}, "did you mean 'forward_kl'"),
        ({"ce": 0.0}, "every loss term has weight 0"),
        ({"ce": -1.0}, "a number from 0 on"),
        ({"ce": float("nan")}, "a number from 0 on"),
        ({"jsd": 1.0}, "jsd need a teacher"),
        ({"jsd@1.5": 1.0}, "above 0 and below 1"),
        ({"jsd@half": 1.0}, "must be a number"),
        ({"ce@0.1": 1.0}, "ce has no parameter"),
        ({"hidden": 1.0}, "teach no answer"),
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


def test_of_a_few_entries_other_divergences_are_refused() -> None:
    ids = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(GoriError, match="reverse_kl needs the whole distribution"):
        sparse_loss(torch.randn(2, 3), torch.randn(5, 3), ids, torch.ones(2, 1), ids[:, 0], {"reverse_kl": 1.0})
