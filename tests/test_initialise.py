"""A student's first weights: an equal shape is a copy, experts become the best dense sum, and shapes are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from decoders import random_decoder
from gori.distill.depth import evenly_spaced
from gori.distill.initialise import from_teacher
from gori.errors import GoriError
from gori.model import MLP, Decoder, ModelConfig
from gori.moe import MoE

DENSE = ModelConfig(
    kind="qwen3", vocab_size=53, hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=40,
    init_std=0.3, max_position=64,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, kind="qwen3_moe", intermediate_size=12, experts=4, experts_per_token=4)
CALIBRATION = [torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_its_dense_teachers_shape_is_a_copy(kind: str, tied: bool) -> None:
    cfg = dataclasses.replace(DENSE, kind=kind, tied=tied)  # type: ignore[arg-type]
    teacher, student = random_decoder(cfg), random_decoder(cfg, seed=1)
    from_teacher(student, teacher, CALIBRATION)
    with torch.no_grad():
        assert torch.equal(student(CALIBRATION[0]), teacher(CALIBRATION[0]))


def test_chosen_layers_are_taken_in_their_order() -> None:
    teacher = random_decoder(DENSE)
    student = random_decoder(dataclasses.replace(DENSE, layers=2), seed=1)
    report = from_teacher(student, teacher, CALIBRATION, layers=[2, 0], fit=False).report
    assert [r["teacher_layer"] for r in report["layers"]] == [2, 0]  # type: ignore[attr-defined]
    for mine, source in zip(student.layers, (2, 0), strict=True):
        for a, b in zip(mine.parameters(), teacher.layers[source].parameters(), strict=True):
            assert torch.equal(a, b)


def mlp_inputs(model: Decoder, layer: int) -> Tensor:
    seen: list[Tensor] = []
    hook = model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in CALIBRATION:
            model.hidden(ids)
    hook.remove()
    return torch.cat(seen)


def expert_outputs(moe: MoE, x: Tensor) -> Tensor:
    out = []
    for e in range(moe.cfg.experts):
        gate, up = moe.experts.gate_up[e].chunk(2)
        out.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ moe.experts.down[e].T)
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [4, 2])
def test_the_dense_mlp_of_all_experts_is_no_worse_than_any_common_scale_of_them(top_k: int) -> None:
    for seed in range(3):
        teacher = random_decoder(dataclasses.replace(MOE, layers=1, experts_per_token=top_k), seed)
        student = random_decoder(dataclasses.replace(DENSE, layers=1, intermediate_size=4 * 12), seed=9)
        from_teacher(student, teacher, CALIBRATION, how="select", fit=False)
        moe, mlp = teacher.layers[0].mlp, student.layers[0].mlp
        assert isinstance(moe, MoE)
        assert isinstance(mlp, MLP)
        x = mlp_inputs(teacher, 0)
        with torch.no_grad():
            want = moe(x.unsqueeze(0))[0]
            error = (mlp(x) - want).square().sum()
            outputs = expert_outputs(moe, x)
            common = [(s * outputs.sum(0) - want).square().sum() for s in torch.linspace(0, 1.5, 31)]
            # the normal equations: the residual is orthogonal to every expert's output
            slopes = torch.stack([((mlp(x) - want) * o).sum() / (o.norm() * want.norm()) for o in outputs])
        assert error <= min(common) * (1 + 1e-4)
        assert slopes.abs().max() < 1e-3


def test_the_most_used_experts_are_chosen_and_their_share_is_reported() -> None:
    teacher = random_decoder(dataclasses.replace(MOE, experts_per_token=2))
    with torch.no_grad():
        for block in teacher.layers:
            assert isinstance(block.mlp, MoE)
            block.mlp.gate.weight.zero_()
            # expert 3 wins on half of the inputs by far, expert 1 a little: without a bias only a sign can be asked for
            block.mlp.gate.weight[3] = 5.0
            block.mlp.gate.weight[1] = -5.0
    student = random_decoder(dataclasses.replace(DENSE, intermediate_size=20), seed=1)
    report = from_teacher(student, teacher, CALIBRATION, how="select").report
    for layer in report["layers"]:  # type: ignore[attr-defined]
        assert sorted(layer["experts"]) == [1, 3]
        assert layer["share_of_routing"] > 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 20}, {"heads": 2, "kv_heads": 1}, {"heads": 2, "kv_heads": 2}, {"intermediate_size": 7},
        {"layers": 1},
        {"hidden_size": 20, "heads": 2, "kv_heads": 1, "intermediate_size": 17, "layers": 2, "tied": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", [DENSE, MOE])
def test_a_narrower_student_takes_rows_and_columns_of_its_teacher(source: ModelConfig, changes: dict[str, int]) -> None:
    teacher, student = random_decoder(source), random_decoder(dataclasses.replace(DENSE, **changes), seed=1)  # type: ignore[arg-type]
    report = from_teacher(student, teacher, CALIBRATION).report
    assert report["hidden_dimensions"] == student.cfg.hidden_size
    with torch.no_grad():
        assert torch.isfinite(student(CALIBRATION[0])).all()
    for mine, info in zip(student.layers, report["layers"], strict=True):  # type: ignore[call-overload]
        theirs = teacher.layers[info["teacher_layer"]].self_attn.k_proj.weight
        d, rows = source.head_dim, mine.self_attn.k_proj.weight
        for g, group in enumerate(info["groups"]):  # each key head is one of the teacher's, whole
            block = theirs[group * d : (group + 1) * d]
            taken = rows[g * d : (g + 1) * d]
            assert all((taken[:, [c]] == block).all(0).any() for c in range(taken.shape[1]))


@pytest.mark.parametrize(
    ("count", "total", "want"), [(3, 5, [0, 2, 4]), (1, 4, [0]), (4, 4, [0, 1, 2, 3]), (2, 9, [0, 8])]
)
def test_layers_are_evenly_spaced_first_and_last_among_them(count: int, total: int, want: list[int]) -> None:
    assert evenly_spaced(count, total) == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "a student of 4 layers cannot be initialised from a teacher of 3"),
        ({"hidden_size": 40}, "student's hidden_size 40 exceeds the teacher's 32"),
        ({"intermediate_size": 41}, "intermediate_size 41 exceeds the teacher's 40"),
        ({"heads": 8}, "heads per kv head 4 exceeds the teacher's 2"),
        ({"heads": 3, "kv_heads": 3}, "kv_heads 3 exceeds the teacher's 2"),
        ({"head_dim": 4}, "head_dim 4 is not the teacher's 8"),
        ({"vocab_size": 54}, "vocab_size 54 is not the teacher's 53"),
        ({"kind": "llama"}, "qk_norm False is not the teacher's True"),
        ({"rope_theta": 1e6}, "rope_theta 1000000.0 is not the teacher's 10000.0"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_refused_with_both_numbers(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(GoriError, match=message):
        from_teacher(random_decoder(dataclasses.replace(DENSE, **changes), 1), random_decoder(DENSE), CALIBRATION)  # type: ignore[arg-type]


def test_biases_are_not_dropped_silently() -> None:
    teacher = random_decoder(dataclasses.replace(DENSE, kind="qwen2"))
    with pytest.raises(GoriError, match="the teacher's attention has biases and a llama student none"):
        from_teacher(random_decoder(dataclasses.replace(DENSE, kind="llama")), teacher, CALIBRATION)


def test_layers_that_the_teacher_lacks_are_refused() -> None:
    with pytest.raises(GoriError, match=r"layers \[0, 1, 3\] are not 3 of the teacher's 0\.\.2"):
        from_teacher(random_decoder(DENSE, 1), random_decoder(DENSE), CALIBRATION, layers=[0, 1, 3])
