"""Student sizing: bytes counted against real layouts and files, cost laws against another solver, choices by brute
force, and a whole sizing on a toy recipe."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from decoders import random_decoder
from gori import checkpoint
from gori.artifact import read_manifest
from gori.distill.initialise import from_teacher
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.quantize.budget import parse
from gori.quantize.layout import layout, weight_of
from gori.quantize.sizing import (
    LAWS,
    Ceiling,
    CostModel,
    Fit,
    Load,
    Shape,
    affordable,
    fit,
    fit_all,
    load_of,
    pick,
    rungs,
    shapes,
    storage,
    to_measure,
)
from gori.quantized import EMBEDDING, packed_bytes

BASE = Shape(4, 128, 4, 4, 32, 224)
FACTS: dict[str, Any] = {
    "vocab_size": 512, "tied": True, "copied_head": False, "float_bits": 32, "cached": 64, "kind": "qwen3",
}  # fmt: skip
STORE = storage("w4a8-g32", "w8-channel", **FACTS)


def config(s: Shape, kind: str = "qwen3", tied: bool = True) -> ModelConfig:
    return ModelConfig(kind=kind, vocab_size=512, tied=tied, max_position=64, **asdict(s))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scheme", "embedding"),
    [("w4a8-g32", "w8-channel"), ("w4a16-g32", None), ("w8a8-channel", "w4-g32"), ("w4a8-g32", "float")],
)
def test_bytes_of_a_shape_are_those_of_its_layout(kind: str, tied: bool, scheme: str, embedding: str | None) -> None:
    for s in (BASE, Shape(2, 64, 4, 2, 16, 96)):
        with torch.device("meta"):
            model = Decoder(config(s, kind, tied))
        spec = layout(model, scheme, embedding)
        packed = {n: packed_bytes(tuple(weight_of(model, n).shape), t) for n, t in spec.tensors.items()}  # type: ignore[arg-type]
        floats = sum(p.numel() for n, p in model.named_parameters() if checkpoint.to_hf_name(n) not in packed)
        load = load_of(s, storage(scheme, embedding, **{**FACTS, "kind": kind, "tied": tied}))
        assert load.stored_bytes == sum(packed.values()) + 4 * floats
        table = packed.get(EMBEDDING, 0)
        assert load.read_bytes == sum(packed.values()) - (0 if spec.shared_head else table)
        linears = [m for n, m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
        assert load.multiplications == sum(m.weight.numel() for m in linears)


def test_bytes_of_a_file_are_those_counted_and_little_more(artifact: Path) -> None:
    cfg = checkpoint.read_config(artifact)
    s = Shape(cfg.layers, cfg.hidden_size, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.intermediate_size)
    facts = {**FACTS, "vocab_size": cfg.vocab_size, "tied": cfg.tied, "kind": cfg.kind}
    stored = load_of(s, storage("w4a8-g32", None, **facts)).stored_bytes
    metrics = read_manifest(artifact)["metrics"]
    assert metrics["packed_bytes"] <= stored <= metrics["file_bytes"] <= stored + 40_000


def test_shapes_keep_the_recipes_proportions_and_fill_whole_groups() -> None:
    found = shapes(BASE)
    assert BASE in found
    assert len(found) == len(set(found)) == len({s.name for s in found})
    for s in found:
        assert s.hidden_size % 32 == s.intermediate_size % 32 == s.heads * s.head_dim % 32 == 0
        assert (s.head_dim, s.heads * s.head_dim, s.kv_heads) == (32, s.hidden_size, s.heads)
        layout_of = config(s)
        assert layout_of.layers <= 12
    grouped = shapes(Shape(2, 256, 8, 2, 32, 512), 64)
    assert all(s.heads == 4 * s.kv_heads and s.hidden_size % 64 == 0 for s in grouped)


def test_what_is_under_the_ceiling_can_be_taken_from_the_teacher_and_nothing_else() -> None:
    shape = {"vocab_size": 64, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
    teacher = random_decoder(
        ModelConfig(kind="qwen3_moe", experts=3, experts_per_token=2, intermediate_size=16, **shape)  # type: ignore[arg-type]
    )
    ceiling = Ceiling(layers=2, hidden_size=64, kv_heads=2, heads_per_kv_head=2, intermediate_size=48)
    parts = itertools.product((1, 2, 3), (32, 64, 96), ((2, 1), (4, 2), (3, 1), (6, 3)), (32, 48, 64))
    for layers, width, (heads, kv_heads), mlp in parts:
        s = Shape(layers, width, heads, kv_heads, 16, mlp)
        student = Decoder(replace(config(s), vocab_size=64, rope_theta=teacher.cfg.rope_theta))
        try:
            from_teacher(student, teacher, [torch.arange(8).unsqueeze(0)])
            able = True
        except GoriError:
            able = False
        assert ceiling.holds(s) == able, s


loads = st.builds(
    Load,
    stored_bytes=st.integers(10**4, 10**7),
    read_bytes=st.integers(10**4, 10**7),
    cache_bytes=st.integers(10**3, 10**6),
    multiplications=st.integers(10**4, 10**7),
    attended=st.integers(10**3, 10**6),
    layers=st.integers(1, 24),
)
TRUE = {"size_bytes": (9000.0, 4100.0), "rss_mib": (3.0, 1.1e-6, 0.9e-6), "decode_ms": (0.1, 2e-7, 0.05),
        "prefill_ms": (0.01, 3e-8, 5e-8)}  # fmt: skip
SHAPES = to_measure(shapes(BASE), BASE, 8)
LOADS = [load_of(s, STORE) for s in SHAPES]


def costs_of(name: str, noise: float, seed: int) -> list[float]:
    law, rng = LAWS[name], np.random.default_rng(seed)
    return [
        float((law.counted(x) + np.dot(law.terms(x), TRUE[name])) * (1 + noise * rng.standard_normal())) for x in LOADS
    ]


@pytest.mark.parametrize("name", LAWS)
def test_a_law_that_holds_is_found_and_predicts_what_was_left_out(name: str) -> None:
    found = fit(LAWS[name], LOADS, costs_of(name, 0, 0))
    assert found.coefficients == pytest.approx(TRUE[name], rel=1e-6)
    assert found.worst < 1e-6
    far = Load(10**7, 10**7, 10**6, 10**7, 10**6, 30)
    assert found.predict(far) == pytest.approx(LAWS[name].counted(far) + np.dot(LAWS[name].terms(far), TRUE[name]))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coefficients_and_leave_one_out_errors_are_those_of_another_solver(name: str, seed: int) -> None:
    law, y = LAWS[name], np.array(costs_of(name, 0.2 if name != "size_bytes" else 0.001, seed))

    def solve(rows: list[int]) -> np.ndarray:
        a = np.array([law.terms(LOADS[i]) for i in rows]) / y[rows, None]
        b = (y[rows] - [law.counted(LOADS[i]) for i in rows]) / y[rows]
        scale = a.max(0)
        return lsq_linear(a / scale, b, bounds=(0, np.inf), method="bvls").x / scale

    found, every = fit(law, LOADS, y.tolist()), list(range(len(y)))
    predictions = [law.counted(x) + law.terms(x) @ solve(every) for x in LOADS]
    assert [found.predict(x) for x in LOADS] == pytest.approx(predictions, rel=1e-5)
    left = [law.counted(LOADS[i]) + law.terms(LOADS[i]) @ solve([j for j in every if j != i]) for i in every]
    errors = np.abs(np.array(left) - y) / y
    assert (found.error, found.worst) == pytest.approx((errors.mean(), errors.max()), rel=1e-4)


@given(st.lists(st.floats(0.1, 50), min_size=8, max_size=8), loads, loads, st.sampled_from(sorted(LAWS)))
def test_no_cost_falls_when_a_load_grows(measured: list[float], a: Load, b: Load, name: str) -> None:
    found = fit(LAWS[name], LOADS, [m * (1e6 if name == "size_bytes" else 1) for m in measured])
    low = Load(*(min(x, y) for x, y in zip(asdict(a).values(), asdict(b).values(), strict=True)))
    assert found.predict(low) <= found.predict(a) * (1 + 1e-12)


def test_too_few_exports_fit_nothing_and_a_cost_that_is_not_told_is_left_out() -> None:
    with pytest.raises(GoriError, match="4 measured exports are too few for a cost model: measure 5 or more"):
        fit(LAWS["size_bytes"], LOADS[:4], [1.0] * 4)
    measured = [{"size_bytes": 2 * x.stored_bytes, "rss_mib": None, "decode_tps": 100.0} for x in LOADS]
    found = fit_all(LOADS, measured)
    assert set(found.fits) == {"size_bytes", "decode_ms"}
    assert found.metrics(LOADS[0])["decode_tps"] == pytest.approx(100)


def model_of(error: float) -> CostModel:
    return CostModel({name: Fit(LAWS[name], TRUE[name], error, error) for name in LAWS})


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_affordable_are_exactly_the_shapes_that_fit_with_the_error_in_reserve(error: float) -> None:
    every, budget = shapes(BASE), parse("size=900kB,decode=900,rss=9MiB,calls=0.99")
    found = affordable(every, STORE, model_of(error), budget)
    wanted = []
    for s in every:
        x = load_of(s, STORE)
        size = (x.stored_bytes + 9000 + 4100 * s.layers) * (1 + error)
        ms = (0.1 + 2e-7 * x.read_bytes + 0.05 * s.layers) * (1 + error)
        mib = (3 + 1.1e-6 * x.stored_bytes + 0.9e-6 * x.cache_bytes) * (1 + error)
        if size <= 900_000 and ms <= 1000 / 900 and mib <= 9:
            wanted.append(s)
    assert found == wanted
    assert 0 < len(found) < len(every)


def test_attention_reads_the_whole_cache_in_every_layer() -> None:
    x = load_of(Shape(2, 64, 4, 2, 16, 96), STORE)
    # scores and mixed values of 4 heads of 16 over 64 places; keys and values of 2 groups in float32
    assert (x.attended, x.cache_bytes) == (2 * (2 * 4 * 16 * 64), 2 * (2 * 2 * 16 * 64) * 4)


@given(st.sets(st.sampled_from(shapes(BASE)), min_size=1, max_size=60), st.integers(1, 8))
def test_picked_are_the_largest_of_their_depths_and_depths_are_spread(some: set[Shape], count: int) -> None:
    found = pick(sorted(some), count)
    assert len(found) == len(set(found)) == min(count, len(some))
    depths = {s.layers for s in some}
    assert {s.layers for s in found} <= depths
    for depth in {s.layers for s in found}:
        mine = sorted((s.multiplications for s in found if s.layers == depth), reverse=True)
        assert mine == sorted((s.multiplications for s in some if s.layers == depth), reverse=True)[: len(mine)]
    if len(depths) <= count:
        assert {s.layers for s in found} == depths
    elif count > 1:
        assert {min(depths), max(depths)} <= {s.layers for s in found}


def test_measured_shapes_are_farther_apart_than_any_that_was_not_taken() -> None:
    every = shapes(BASE)
    found = to_measure(every, BASE, 7)
    assert found[0] == BASE
    assert len(set(found)) == 7

    def apart(a: Shape, b: Shape) -> float:
        return math.hypot(
            math.log(a.layers / b.layers),
            math.log(a.hidden_size / b.hidden_size),
            math.log(a.intermediate_size / b.intermediate_size),
        )

    last = min(apart(found[-1], t) for t in found[:-1])
    assert all(min(apart(s, t) for t in found) <= last + 1e-9 for s in every)
    assert set(to_measure(every[:3], BASE, 7)) == set(every[:3])


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 1.0))
def test_rungs_halve_until_the_finalists_train_in_full(count: int, finalists: int, share: float) -> None:
    finalists = min(count, finalists)
    steps = rungs(count, finalists, share)
    shares, counts = zip(*steps, strict=True)
    assert (counts[0], counts[-1], shares[-1]) == (count, finalists, 1.0)
    assert shares[0] == pytest.approx(share if count > finalists else 1.0)
    assert list(shares) == sorted(shares)
    for a, b in itertools.pairwise(counts):
        assert b == max(finalists, -(-a // 2)) < a
