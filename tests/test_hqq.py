"""HQQ's scale search against a dense scan of scales, and fidelity's figures against plain float64."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decoders import batches, random_decoder
from gori import quantized
from gori.data import Example
from gori.quantize.calibration import of_examples
from gori.quantize.fidelity import Reference
from gori.quantize.hqq import NORM, searched, shrunk
from gori.quantize.layout import layout
from gori.quantize.rtn import METHODS, nearest, portable, round_to_nearest
from gori.quantized import TensorScheme
from students import LLAMA


def lost(W: Tensor, got: Tensor) -> Tensor:
    """Σ|w - ŵ|^p of each group of 16."""
    return (W - got).abs().pow(NORM).view(len(W), -1, 16).sum(-1)


@given(st.integers(0, 999), st.sampled_from([2, 3, 4]))
def test_no_group_loses_more_than_by_the_least_squared_error_and_integers_are_the_nearest(seed: int, bits: int) -> None:
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    s = TensorScheme(bits, 16, 16)
    t = searched(W, s)
    # one part in 10^5: float32 sums
    assert (
        lost(W, t.dequantize()) <= lost(W, round_to_nearest(W, s, "w", METHODS["mse"]).dequantize()) * 1.00001
    ).all()
    assert torch.equal(t.scale, portable(t.scale))
    unit = t.scale.repeat_interleave(16, dim=1)
    assert torch.equal((W / unit).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), t.q)


def test_it_comes_near_the_best_of_all_scales() -> None:
    W = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    for bits in (2, 4):
        s = TensorScheme(bits, 16, 16)
        every = [
            lost(W, round_to_nearest(W, s, "w", (f,)).dequantize()) for f in torch.linspace(0.3, 1.2, 181).tolist()
        ]
        best, start = (
            torch.stack(every).amin(0).mean(),
            lost(W, round_to_nearest(W, s, "w", METHODS["mse"]).dequantize()),
        )
        found = lost(W, searched(W, s).dequantize()).mean()
        # the splitting finds local minima: of what the start leaves above the best, it must take away a part
        assert best * 0.999 <= found < start.mean()


@given(st.floats(-3, 3), st.floats(1, 100))
def test_the_shrinkage_never_passes_zero_nor_grows(x: float, beta: float) -> None:
    got = float(shrunk(torch.tensor(x), torch.tensor(beta), NORM))
    assert abs(got) <= abs(x) + 1e-6
    assert got * x >= 0
    # for large x the penalty's pull p/beta |x|^(p-1) is all that is taken away
    if abs(x) > 1:
        assert abs(abs(x) - abs(got) - NORM / beta * abs(x) ** (NORM - 1)) < 1e-5


def test_fidelity_is_what_float64_says_row_by_row() -> None:
    model = random_decoder(LLAMA).requires_grad_(False)
    spec = layout(model, "w3a16-g32")
    other = quantized.apply(copy.deepcopy(model), nearest(model, spec, METHODS["mse"]), spec)
    rows = batches(200, seed=5, rows=7)
    found = Reference(model, rows).compare(other)
    at = 0
    with torch.no_grad():
        for b in rows:
            for i in range(len(b.ids_BT)):
                n = int(b.valid_BT[i].sum())
                ids = b.ids_BT[i, :n]
                p, q = (m(ids[None])[0].double().log_softmax(-1) for m in (model, other))
                for j in range(4, n - 1):  # the token behind j is to be said from the sixth on
                    kl = float((p[j].exp() * (p[j] - q[j])).sum())
                    assert abs(float(found.kl_N[at]) - kl) < 1e-6 + 1e-4 * kl
                    assert abs(float(found.nll_N[at]) + float(q[j, ids[j + 1]])) < 1e-4
                    assert bool(found.same_N[at]) == bool(p[j].argmax() == q[j].argmax())
                    assert int(found.rows_N[at]) == int(b.rows_B[i])
                    at += 1
    assert at == len(found.kl_N)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(20, 90))
def test_batches_hold_every_row_once_and_mark_what_precedes_an_answer(lengths: list[int], batch_tokens: int) -> None:
    examples = [Example(list(range(10, 10 + n)), [False] + [True] * (n - 1)) for n in lengths]
    found = of_examples(examples, pad=0, batch_tokens=batch_tokens)
    assert found.rows == len(lengths)
    assert found.tokens == sum(lengths)
    assert sorted(r for b in found.batches for r in b.rows_B.tolist()) == list(range(len(lengths)))
    for b in found.batches:
        assert b.ids_BT.numel() <= batch_tokens or len(b.ids_BT) == 1
        for ids, valid, answer, row in zip(b.ids_BT, b.valid_BT, b.answer_BT, b.rows_B.tolist(), strict=True):
            assert ids[valid].tolist() == examples[row].ids
            assert int(answer.sum()) == lengths[row] - 1
        assert len(b.targets) == int(b.answer_BT.sum())
