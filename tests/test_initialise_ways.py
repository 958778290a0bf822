"""Ways to take first weights: turned streams change nothing until they are cut, influence and outputs are what they
say, merging copies of an expert gives it back."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from decoders import random_decoder
from gori.distill.basis import basis_of, norm_scale, observe
from gori.distill.depth import evenly_spaced, least_missed, most_influential, without_each
from gori.distill.experts import Neurons, candidates, expert, grouped, merged, output_scores, routing
from gori.distill.initialise import from_teacher
from gori.errors import GoriError
from gori.inner import Kept
from gori.model import MLP, Block, Decoder, ModelConfig
from gori.moe import MoE

DENSE = ModelConfig(
    kind="qwen3", vocab_size=53, hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=40,
    init_std=0.3, max_position=64, tied=False,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, kind="qwen3_moe", intermediate_size=12, experts=4, experts_per_token=2)
CALIBRATION = [torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(ids).flatten(0, 1) for ids in CALIBRATION])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_turned_stream_of_all_dimensions_says_what_the_teacher_says(kind: str, tied: bool) -> None:
    teacher = random_decoder(dataclasses.replace(DENSE, kind=kind, tied=tied))  # type: ignore[arg-type]
    student = random_decoder(dataclasses.replace(DENSE, kind=kind), seed=1)  # type: ignore[arg-type]
    taken = from_teacher(student, teacher, CALIBRATION, width="pca")
    assert not torch.allclose(taken.basis, torch.eye(32), atol=0.1)
    torch.testing.assert_close(logits(student), logits(teacher), atol=2e-4, rtol=1e-3)


def test_a_stream_that_lies_in_few_directions_can_be_cut_to_those() -> None:
    """Of a teacher whose stream lies near 20 of its 32 dimensions, none of them a coordinate."""
    teacher = random_decoder(DENSE)
    g = torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=g)).Q
    with torch.no_grad():
        squeeze = turn @ torch.diag(torch.cat((torch.ones(20), torch.full((12,), 0.02)))) @ turn.T
        teacher.embed_tokens.weight.copy_(teacher.embed_tokens.weight @ squeeze)  # type: ignore[union-attr,operator]
        for block in teacher.layers:
            assert isinstance(block, Block)
            assert isinstance(block.mlp, MLP)
            for m in (block.self_attn.o_proj, block.mlp.down_proj):
                m.weight.copy_(squeeze @ m.weight)
    gaps = []
    for size in (12, 20, 28):
        student = random_decoder(dataclasses.replace(DENSE, hidden_size=size), seed=1)
        from_teacher(student, teacher, CALIBRATION, width="pca")
        gaps.append(float((logits(student) - logits(teacher)).square().mean() / logits(teacher).square().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 0.02


@given(st.integers(1, 8), st.integers(0, 99))
def test_a_norm_over_kept_dimensions_keeps_their_size(kept: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=g, dtype=torch.float64) * torch.arange(1, 9)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q[:, :kept]
    scale = norm_scale(x.T @ x / 400, basis)
    assert scale**2 * kept == pytest.approx(float((x @ basis).square().sum(1).mean()) if kept < 8 else 8)


def test_a_tied_student_cannot_be_turned() -> None:
    student = random_decoder(dataclasses.replace(DENSE, tied=True), seed=1)
    with pytest.raises(GoriError, match="pca needs a head of its own"):
        from_teacher(student, random_decoder(DENSE), CALIBRATION, width="pca")


def test_principal_directions_hold_more_of_the_stream_than_any_dimensions() -> None:
    seen = observe(random_decoder(DENSE), CALIBRATION, "pca")
    moment = torch.stack(list(seen.moments.values())).mean(0)
    assert float(moment.trace()) == pytest.approx(32, rel=1e-3)
    basis = basis_of(seen, 6, "pca")
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)
    best = moment.diagonal().topk(6).values.sum()
    assert (basis * (moment @ basis)).sum() > best


def test_influence_is_one_minus_the_cosine_and_the_idlest_layer_goes_first() -> None:
    teacher = random_decoder(DENSE)
    block = teacher.layers[1]
    assert isinstance(block, Block)
    assert isinstance(block.mlp, MLP)
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(0.01)
        block.mlp.down_proj.weight.mul_(0.01)
    seen = observe(teacher, CALIBRATION, "importance")
    with torch.no_grad():
        found = []
        for ids in CALIBRATION:
            kept = Kept()
            teacher.hidden(ids, kept=kept)
            found.append(1 - cosine_similarity(kept.entering[0], kept.entering[1], dim=-1))
    assert seen.influence[0] == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)
    assert seen.influence[1] < 1e-3
    assert most_influential(2, seen.influence) == [0, 2]
    assert evenly_spaced(1, 3) == [0]
    student = random_decoder(dataclasses.replace(DENSE, layers=2), seed=1)
    assert from_teacher(student, teacher, CALIBRATION, depth="influence").layers == [0, 2]
    assert (logits(student) - logits(teacher)).square().mean() < 1e-3 * logits(teacher).square().mean()


def without(teacher: Decoder, layer: int) -> Decoder:
    """A shallower decoder of the teacher's other layers."""
    fewer = copy.deepcopy(teacher)
    del fewer.layers[layer]
    return fewer


@pytest.mark.parametrize("masked", [True, False])
def test_losses_without_a_layer_are_those_of_a_decoder_that_lacks_it(masked: bool) -> None:
    teacher = random_decoder(MOE).eval()
    g = torch.Generator().manual_seed(4)
    masks = [torch.rand(ids.shape, generator=g) < 0.4 for ids in CALIBRATION]
    want = []
    for layer in range(3):
        fewer, losses = without(teacher, layer).eval(), []
        for ids, mask in zip(CALIBRATION, masks, strict=True):
            with torch.no_grad():
                found = -fewer(ids)[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            losses.append(found[mask[:, 1:]] if masked else found.flatten())
        want.append(float(torch.cat(losses).mean()))
    assert without_each(teacher, [0, 1, 2], CALIBRATION, masks if masked else ()) == pytest.approx(want, rel=1e-5)


def test_the_layers_that_are_missed_least_go_first_and_the_student_says_so() -> None:
    teacher = random_decoder(dataclasses.replace(DENSE, layers=4)).eval()
    for i, size in ((0, 0.3), (2, 1e-3)):  # the third layer hardly does anything, the first one little
        block = teacher.layers[i]
        assert isinstance(block, Block)
        assert isinstance(block.mlp, MLP)
        with torch.no_grad():
            for m in (block.self_attn.o_proj, block.mlp.down_proj):
                m.weight.mul_(size)
    # rows that the teacher itself finds likely, so that whatever is left out is missed
    rows = [ids[:, :4] for ids in CALIBRATION]
    with torch.no_grad():
        for _ in range(16):
            rows = [torch.cat((ids, teacher(ids)[:, -1:].argmax(-1)), 1) for ids in rows]
    dropped = least_missed(teacher, 1, rows)
    assert dropped[0].layer == 2
    assert [len(d.losses) for d in dropped] == [4, 3, 2]
    assert all(d.losses[d.layer] == min(d.losses.values()) for d in dropped)
    assert least_missed(teacher, 4, rows) == []
    student = random_decoder(dataclasses.replace(DENSE, layers=3), seed=1)
    taken = from_teacher(student, teacher, rows, depth="perplexity")
    assert taken.layers == [0, 1, 3]
    told = taken.report["left_out"]
    assert told == [{"layer": 2, "loss_without": {i: round(x, 4) for i, x in dropped[0].losses.items()}}]
    even = random_decoder(dataclasses.replace(DENSE, layers=3), seed=1)
    assert "left_out" not in from_teacher(even, teacher, rows, depth="even").report


def one_moe() -> tuple[MoE, Tensor]:
    moe = random_decoder(MOE).layers[0].mlp
    assert isinstance(moe, MoE)
    return moe, torch.randn(60, 32, generator=torch.Generator().manual_seed(3))


def test_scores_by_output_are_weights_times_norms_token_by_token() -> None:
    moe, x = one_moe()
    with torch.no_grad():
        want = torch.zeros(4)
        for row in x:
            weight, chosen = (moe.gate.weight @ row).softmax(0).topk(2)
            for w, e in zip(weight / weight.sum(), chosen.tolist(), strict=True):
                gate, up = moe.experts.gate_up[e].chunk(2)
                y = moe.experts.down[e] @ (torch.nn.functional.silu(gate @ row) * (up @ row))
                want[e] += w * y.norm()
        torch.testing.assert_close(output_scores(moe, x, routing(moe, x)), want, atol=1e-4, rtol=1e-4)


def test_a_much_used_expert_that_says_nothing_is_left_out_by_its_output() -> None:
    moe, x = one_moe()
    with torch.no_grad():
        use = routing(moe, x).use
        busy = int(use.argmax())
        moe.experts.down[busy].mul_(1e-3)
        by_use = candidates(moe, x, 24, "use", "select").report["experts"]
        by_output = candidates(moe, x, 24, "output", "select").report["experts"]
    assert busy in by_use  # type: ignore[operator]
    assert busy not in by_output  # type: ignore[operator]


def test_merging_an_expert_with_shuffled_copies_of_itself_gives_it_back() -> None:
    moe, _ = one_moe()
    whole = expert(moe, 0)
    orders = [torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    back = merged([whole, *(whole.taken(o) for o in orders)], torch.tensor([0.4, 0.3, 0.2, 0.1]))
    for a, b in zip(back, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_neurons_are_matched_as_well_as_the_best_of_all_orders() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (Neurons(*(torch.randn(s, generator=g) for s in ((4, 3), (4, 3), (3, 4)))) for _ in range(2))
    fit = a.gate @ b.gate.T + a.up @ b.up.T + a.down.T @ b.down
    best = max(itertools.permutations(range(4)), key=lambda o: float(fit[range(4), list(o)].sum()))
    got = merged([a, b], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(got.gate, (a.gate + b.gate[list(best)]) / 2)


def test_every_expert_is_in_one_group_with_the_centre_it_is_routed_like() -> None:
    logits_NE = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    logits_NE[:, 3] = logits_NE[:, 1] * 2
    groups = grouped([1, 0], logits_NE)
    assert sorted(e for g in groups for e in g) == [0, 1, 2, 3]
    assert [g[0] for g in groups] == [1, 0]
    assert 3 in groups[0]


@pytest.mark.parametrize("score", ["use", "output"])
def test_a_merged_mlp_fills_the_width_and_tells_its_groups(score: str) -> None:
    teacher = random_decoder(MOE)
    student = random_decoder(dataclasses.replace(DENSE, intermediate_size=20), seed=1)
    taken = from_teacher(student, teacher, CALIBRATION, score=score, how="merge")  # type: ignore[arg-type]
    for layer in taken.report["layers"]:  # type: ignore[attr-defined]
        assert sorted(e for g in layer["merged"] for e in g) == [0, 1, 2, 3]
        assert layer["share_of_routing"] == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(logits(student)).all()
