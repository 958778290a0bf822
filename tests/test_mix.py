"""Mixed precision: the assignment against all there are, sensitivities against models with one weight replaced."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoders import batches, random_decoder
from gori import quantized
from gori.errors import GoriError
from gori.quantize.assign import Option, assign
from gori.quantize.fidelity import Reference
from gori.quantize.layout import layout
from gori.quantize.mix import Mix, Probe, budget_bytes, choices, mix_of, mixed_layout, weight_count
from gori.quantize.rtn import METHODS, nearest
from gori.quantized import EMBEDDING, HEAD
from students import LLAMA, of

options = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1e-3)), min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=5), st.floats(0, 1))
def test_the_assignment_is_the_best_of_all_that_fit(drawn: Sequence[Sequence[tuple[int, float]]], room: float) -> None:
    items = [[Option(1000 * size, cost) for size, cost in one] for one in drawn]
    least = sum(min(o.size_bytes for o in one) for one in items)
    budget = least + int(room * (sum(max(o.size_bytes for o in one) for one in items) - least))
    all_of_them = [c for c in itertools.product(*items) if sum(o.size_bytes for o in c) <= budget]
    best = min(sum(o.cost for o in c) for c in all_of_them)
    found = [one[i] for one, i in zip(items, assign(items, budget), strict=True)]
    assert sum(o.size_bytes for o in found) <= budget
    assert math.isclose(sum(o.cost for o in found), best, rel_tol=1e-6, abs_tol=1e-12)
    if least > 1000:
        with pytest.raises(GoriError, match=f"the smallest ones are {least:,} bytes together"):
            assign(items, least - 1)


TARGET_MIX = Mix(("w4a16-g32", "w4a16-g64", "w8a16-channel"), ("w4-g32", "w8-channel"), bits_per_weight=5.0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_sensitivity_is_the_kl_of_a_model_with_that_weight_alone_rounded(tied: bool) -> None:
    model = random_decoder(of("qwen3", tied=tied, layers=2)).requires_grad_(False)
    rows = batches(200)
    probe, reference = Probe(model, rows), Reference(model, rows)
    items = choices(model, TARGET_MIX)
    costs = probe.costs(items)
    wanted = [n for n in items if n.endswith(("1.mlp.down_proj.weight", "0.self_attn.k_proj.weight"))]
    for name in [*wanted, EMBEDDING, *([] if tied else [HEAD])]:
        for choice, cost in zip(items[name], costs[name], strict=True):
            if " + " in choice.label:
                continue  # a sum of two alone
            spec = layout(model, "w4a16-g32")
            spec = dataclasses.replace(spec, tensors=dict(choice.schemes), shared_head="shared" in choice.label)
            other = copy.deepcopy(model)
            if name == EMBEDDING and not spec.shared_head and tied:  # a head of its own that stays float
                spec.tensors |= {HEAD: layout(model, "w8a16-channel", "float").tensors[HEAD]}
            other = quantized.apply(other, nearest(model, spec, METHODS["mse"]), spec)
            if HEAD in spec.tensors and name == EMBEDDING:
                other.lm_head.weight = model.head.weight
            want = reference.compare(other).kl_mean
            assert math.isclose(cost, want, rel_tol=2e-3, abs_tol=1e-9), (name, choice.label)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = random_decoder(LLAMA).requires_grad_(False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    mixed_layout(model, TARGET_MIX, batches(200))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_more_bytes_never_cost_more_and_a_wide_budget_takes_the_best_everywhere() -> None:
    model = random_decoder(LLAMA).requires_grad_(False)
    rows, summed = batches(200), []
    for bits in (4.6, 5.0, 6.0, 20.0):
        mix = dataclasses.replace(TARGET_MIX, bits_per_weight=bits)
        spec, facts = mixed_layout(model, mix, rows)
        assert facts["size_bytes"] <= budget_bytes(model, mix)
        assert facts["size_bytes"] * 8 / weight_count(model) == pytest.approx(facts["bits_per_weight"], abs=1e-4)
        stored = sum(t.packed_bytes() for t in nearest(model, spec, METHODS["mse"]).values())
        assert stored == facts["size_bytes"]
        summed.append(facts["summed_kl"])
    assert summed == sorted(summed, reverse=True)
    assert all(
        min(found.values()) == found[_label(spec, n)] for n, found in facts["sensitivity"].items() if n != EMBEDDING
    )


def _label(spec: quantized.Quantization, name: str) -> str:
    s = spec.tensors[name]
    return f"w{s.bits}a{s.activation_bits}-{f'g{s.group_size}' if s.group_size else 'channel'}"


def test_a_copied_head_counts_twice() -> None:
    model = random_decoder(LLAMA)
    once, twice = (
        {c.label: c.size_bytes for c in choices(model, dataclasses.replace(TARGET_MIX, copied_head=h))[EMBEDDING]}
        for h in (False, True)
    )
    assert twice["w4-g32 shared"] == 2 * once["w4-g32 shared"] == twice["w4-g32 + head w4a16-g32"]


def test_a_mix_is_read_from_a_target_or_from_schemes_and_nonsense_is_refused() -> None:
    mix = mix_of("executorch", "8da4w", None, 4.6, None)
    assert mix.linears == ("w8a8-channel", "w4a8-channel", "w4a8-g32", "w4a8-g64", "w4a8-g128")
    assert mix.copied_head
    assert "float" not in mix.tables
    assert mix_of("Q4_0,Q8_0", "w4a16-g32", None, None, 1000).tables == ("w4-g32", "w8-g32", "w8-channel")
    assert mix_of("gguf", "w4a16-g32", "w8-g32", None, 1000).tables == ("w8-g32",)
    for args, message in (
        (("executorch", "w4a16-g32", None, 4.5, None), "holds no scheme with 16-bit activations"),
        (("w4a8-g32,w8a16-g32", "w4a8-g32", None, 4.5, None), "other activations than w4a8-g32"),
        (("gguf", "w4a16-g32", None, None, None), "needs one budget"),
        (("gguf", "w4a16-g32", None, 4.0, 10), "needs one budget"),
        (("ggfu", "w4a16-g32", None, 4.0, None), "scheme 'ggfu' is unknown"),
    ):
        with pytest.raises(GoriError, match=message):
            mix_of(*args)
