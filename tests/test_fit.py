"""First weights by least squares: sums give what numpy's solvers give, inputs are taken as brute force takes them, and
a student that is cut says more nearly what its teacher says."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoders import random_decoder
from gori.distill.experts import candidates, expert, routing
from gori.distill.fit import POOL, RIDGE, Sums, forward_selection, group_scales
from gori.distill.initialise import from_teacher
from gori.model import MLP, Block, Decoder, ModelConfig
from gori.moe import MoE

DENSE = ModelConfig(
    kind="qwen3", vocab_size=53, hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=40,
    init_std=0.3, max_position=64, tied=False,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, kind="qwen3_moe", intermediate_size=12, experts=4, experts_per_token=2)
CALIBRATION = [torch.randint(0, 53, (24, 20), generator=torch.Generator().manual_seed(i)) for i in range(5)]


def problem(inputs: int, width: int, seed: int) -> tuple[Tensor, Tensor, Sums]:
    """Inputs that are alike in parts, and what is wanted of them."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(50, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    y = a @ torch.randn(inputs, width, generator=g) + torch.randn(50, width, generator=g)
    sums = Sums(inputs, width)
    for rows in (slice(0, 17), slice(17, 50)):
        sums.add(a[rows], y[rows])
    return a, y, sums


def damped(a: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows that make plain least squares what the ridge makes of it."""
    ridge = (RIDGE * a.double().square().sum(0).mean()).sqrt()
    more = torch.eye(a.shape[1]).double() * ridge
    return torch.cat((a.double(), more)).numpy(), torch.cat((y.double(), torch.zeros(len(more), y.shape[1]))).numpy()


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 999))
def test_a_fitted_matrix_is_numpys_least_squares(inputs: int, width: int, seed: int) -> None:
    a, y, sums = problem(inputs, width, seed)
    want = np.linalg.lstsq(*damped(a, y), rcond=None)[0]
    np.testing.assert_allclose(sums.correction().T.numpy(), want, rtol=1e-6, atol=1e-8)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 999), st.data())
def test_inputs_are_taken_as_brute_force_takes_them(inputs: int, width: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, inputs))
    a, y, sums = problem(inputs, width, seed)
    wide_a, wide_y = damped(a, y)
    taken: list[int] = []
    for _ in range(count):
        errors = {}
        for j in set(range(inputs)) - set(taken):
            columns = wide_a[:, [*taken, j]]
            errors[j] = np.square(columns @ np.linalg.lstsq(columns, wide_y, rcond=None)[0] - wide_y).sum()
        taken.append(min(errors, key=lambda j: errors[j]))
    assert forward_selection(sums, count).tolist() == sorted(taken)


@given(st.integers(8, 24), st.integers(1, 8), st.integers(0, 999))
def test_rounds_that_look_at_every_input_choose_as_single_steps_do(inputs: int, count: int, seed: int) -> None:
    _, _, sums = problem(inputs, 3, seed)
    exact = forward_selection(sums, count, at_once=1)
    assert forward_selection(sums, count, at_once=inputs // POOL + 1).tolist() == exact.tolist()


def test_rounds_lose_little_to_single_steps() -> None:
    lost = []
    for seed in range(20):
        a, y, sums = problem(96, 24, seed)
        wide_a, wide_y = damped(a, y)

        def error(rows: Tensor, a: np.ndarray = wide_a, y: np.ndarray = wide_y) -> float:
            columns = a[:, rows.numpy()]
            return float(np.square(columns @ np.linalg.lstsq(columns, y, rcond=None)[0] - y).sum())

        singles, rounds = (error(forward_selection(sums, 24, n)) for n in (1, 4))
        some = error(torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:24])
        lost.append((rounds - singles) / (some - singles))
    assert np.mean(lost) < 0.1, "of what choosing gains over chance"


@given(st.integers(0, 999))
def test_groups_are_scaled_by_least_squares_of_what_they_write(seed: int) -> None:
    a, y, sums = problem(6, 4, seed)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    group = torch.tensor([0, 1, 0, 2, 1, 1])
    outputs = [(a[:, group == g] @ weight[:, group == g].T).flatten().double().numpy() for g in range(3)]
    want = np.linalg.lstsq(np.stack(outputs, 1), y.flatten().double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(group_scales(sums, weight, group).numpy(), want, rtol=2e-3, atol=2e-4)


def gap(student: Decoder, teacher: Decoder) -> float:
    """Of rows that were not fitted on, relative to the teacher's logits."""
    ids = torch.randint(0, 53, (16, 20), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        want = teacher(ids)
        return float((student(ids) - want).square().mean() / want.square().mean())


CUTS: list[dict[str, int]] = [
    {"intermediate_size": 20}, {"heads": 2, "kv_heads": 1}, {"heads": 2, "kv_heads": 2}, {"layers": 2},
    {"hidden_size": 24}, {"hidden_size": 24, "heads": 2, "intermediate_size": 16, "layers": 2},
]  # fmt: skip


@pytest.mark.parametrize("changes", CUTS)
@pytest.mark.parametrize("source", [DENSE, MOE])
@pytest.mark.parametrize("width", ["importance", "pca"])
def test_a_fitted_student_is_nearer_to_its_teacher(source: ModelConfig, changes: dict[str, int], width: str) -> None:
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(2):
        teacher = random_decoder(source, seed).eval()
        for fit, found in gaps.items():
            student = random_decoder(dataclasses.replace(DENSE, **changes), seed=9).eval()  # type: ignore[arg-type]
            from_teacher(student, teacher, CALIBRATION, depth="even", width=width, fit=fit)  # type: ignore[arg-type]
            found.append(gap(student, teacher))
    assert sum(gaps[True]) < 0.95 * sum(gaps[False]), gaps


def test_a_layer_makes_up_for_the_one_that_is_left_out_behind_it() -> None:
    """Where that one adds what a layer before it could have added as well."""
    teacher = random_decoder(DENSE).eval()
    a, b = teacher.layers[0], teacher.layers[1]
    assert isinstance(a, Block)
    assert isinstance(b, Block)
    assert isinstance(a.mlp, MLP)
    assert isinstance(b.mlp, MLP)
    with torch.no_grad():
        b.self_attn.o_proj.weight.zero_()
        a.mlp.down_proj.weight.zero_()  # both read the same stream
        a.mlp.gate_proj.weight.copy_(b.mlp.gate_proj.weight)
        a.mlp.up_proj.weight.copy_(b.mlp.up_proj.weight)
        a.post_attention_layernorm.weight.copy_(b.post_attention_layernorm.weight)
    student = random_decoder(dataclasses.replace(DENSE, layers=2), seed=1).eval()
    from_teacher(student, teacher, CALIBRATION, layers=[0, 2])
    assert gap(student, teacher) < 1e-3
    from_teacher(student, teacher, CALIBRATION, layers=[0, 2], fit=False)
    assert gap(student, teacher) > 0.05


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (2, 2), (4, 2), (1, 1), (3, 1)])
def test_as_many_heads_are_kept_in_each_group(heads: int, kv_heads: int) -> None:
    teacher = random_decoder(dataclasses.replace(DENSE, heads=6, kv_heads=2)).eval()
    student = random_decoder(dataclasses.replace(DENSE, heads=heads, kv_heads=kv_heads), seed=1)
    report = from_teacher(student, teacher, CALIBRATION).report
    for layer in report["layers"]:  # type: ignore[attr-defined]
        assert [len(g) for g in layer["heads"]] == [heads // kv_heads] * kv_heads
        assert [{h // 3 for h in g} for g in layer["heads"]] == [{g} for g in layer["groups"]]
        assert len(set(itertools.chain(*layer["heads"]))) == heads


def test_neurons_of_all_experts_are_ranked_by_what_they_do_where_they_are_routed() -> None:
    moe = random_decoder(MOE).layers[0].mlp
    assert isinstance(moe, MoE)
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = torch.zeros(4, 12)
        weight = routing(moe, x).weight_NE
        for row, w in zip(x, weight, strict=True):
            for e in range(4):
                own = expert(moe, e)
                want[e] += w[e] * own.activation(row[None])[0].abs() * own.down.norm(dim=0)
        best = want.flatten().topk(10).indices.sort().values
        found = candidates(moe, x, 5, spare=2)
    torch.testing.assert_close(
        found.neurons.gate, torch.cat([expert(moe, int(i) // 12).gate[[int(i) % 12]] for i in best])
    )
    numbers = {int(e): n for n, e in enumerate(sorted({int(i) // 12 for i in best}))}
    assert found.group.tolist() == [numbers[int(i) // 12] for i in best]
    assert found.report == {"of": 48}
