"""Terms on hidden states and attention relations against plain loops, and in a student's loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from decoders import random_decoder
from gori.data import Example
from gori.distill.objective import Inside, divergence_loss
from gori.distill.states import check_pairs, default_pairs, hidden_terms, relation_loss, state_terms
from gori.errors import GoriError
from gori.inner import Kept
from gori.model import Block, Decoder, ModelConfig
from gori.teacher.train import TrainBatch, to_tensors

TEACHER = ModelConfig(
    kind="qwen3", vocab_size=53, hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate_size=40,
    init_std=0.3, max_position=64,
)  # fmt: skip
STUDENT = dataclasses.replace(TEACHER, hidden_size=24, layers=2, heads=2, kv_heads=1, head_dim=12)


def batch() -> TrainBatch:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 53, (n,), generator=g).tolist() for n in (9, 6, 7)]
    return to_tensors([Example(r, [False] * 4 + [True] * (len(r) - 4)) for r in rows], 0, torch.device("cpu"))


def slow_relation_loss(student: list[Tensor], taught: list[Tensor], heads: list[int], lengths: list[int]) -> float:
    """One head, row and token after the other, in float64."""
    total = []
    for mine, theirs, R in zip(student, taught, heads, strict=True):
        found = []
        for row, length in enumerate(lengths):
            both = [x[row].double().reshape(x.shape[1], R, -1) for x in (mine, theirs)]
            for r in range(R):
                for t in range(1, length):  # the first token is not wanted
                    q, p = (torch.softmax(x[: t + 1, r] @ x[t, r] / x.shape[-1] ** 0.5, 0) for x in both)
                    found.append(float((p * (p / q).log()).sum()))
        total.append(sum(found) / len(found))
    return sum(total) / len(total)


def test_relations_equal_a_loop_over_heads_and_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    draw = lambda heads, d: torch.randn(3, 5, heads, d, generator=g)  # noqa: E731
    student, taught = [draw(2, 6), draw(1, 6), draw(1, 6)], [draw(4, 8), draw(2, 8), draw(2, 8)]
    lengths = [5, 3, 4]
    valid = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    want = slow_relation_loss(student, taught, [2, 1, 1], lengths)
    wanted = valid.clone()
    wanted[:, 0] = False
    assert relation_loss(student, taught, valid, wanted).item() == pytest.approx(want, rel=1e-5)
    assert relation_loss(taught, taught, valid, wanted).item() == pytest.approx(0, abs=1e-6)


def test_hidden_terms_equal_their_definitions_on_wanted_tokens() -> None:
    g = torch.Generator().manual_seed(2)
    s, t = torch.randn(2, 4, 6, generator=g), torch.randn(2, 4, 6, generator=g)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    error, cosine = hidden_terms(s, t, valid)
    a, b = torch.cat((s[0], s[1, :2])), torch.cat((t[0], t[1, :2]))
    want = sum(mse_loss(x, y).item() / y.square().mean().item() for x, y in zip(a, b, strict=True)) / len(a)
    assert error.item() == pytest.approx(want, rel=1e-5)
    assert cosine.item() == pytest.approx(1 - cosine_similarity(a, b).mean().item(), rel=1e-5)


def test_what_enters_a_layer_is_compared_through_the_projection() -> None:
    student, teacher, b = random_decoder(STUDENT), random_decoder(TEACHER, 1), batch()
    projection = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    seen: dict[str, Tensor] = {}
    for name, model, layer in (("student", student, 1), ("teacher", teacher, 3)):
        model.layers[layer].register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    loss = divergence_loss(
        teacher, {"forward_kl": 1.0, "hidden": 0.5, "attention": 0.3}, 1.0, inside=Inside([(1, 3)], projection)
    )
    total, entry = loss(student, b)
    want = hidden_terms(seen["student"], seen["teacher"] @ projection, b.loss_BT[:, 1:])[0]
    assert entry["hidden"] == pytest.approx(want.item(), rel=1e-3)
    assert entry["loss"] == pytest.approx(
        entry["forward_kl"] + 0.5 * entry["hidden"] + 0.3 * entry["attention"], abs=1e-4
    )
    grads = torch.autograd.grad(total, list(student.layers[0].parameters()), allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_a_student_that_is_its_teacher_loses_nothing_inside() -> None:
    teacher, b = random_decoder(TEACHER), batch()
    kept = Kept([3])
    with torch.no_grad():
        b.answer_hidden(teacher, kept)
        pairs = default_pairs(4, 4)
        kinds = ["hidden", "cosine", "attention"]
        found = state_terms(kept, kept, b.valid_BT[:, :-1], b.loss_BT[:, 1:], kinds, pairs, None)
    assert pairs == [(1, 1), (2, 2), (3, 3)]
    assert all(abs(v.item()) < 1e-5 for v in found.values())


def test_queries_keys_and_values_are_those_of_what_entered_the_layer() -> None:
    model, b, kept = random_decoder(TEACHER), batch(), Kept([2])
    block = model.layers[2]
    assert isinstance(block, Block)
    with torch.no_grad():
        b.answer_hidden(model, kept)
        x = kept.entering[2]
        again = block.self_attn.qkv(block.input_layernorm(x), model.rope_of(x))
    assert list(kept.attended) == [2]
    assert all(torch.equal(a, b) for a, b in zip(kept.attended[2], again, strict=True))


@pytest.mark.parametrize("layer", [0, 3])
def test_recomputed_blocks_have_the_same_gradients(layer: int) -> None:
    """With activation checkpointing queries and keys leave a block by the side."""
    teacher, b, found = random_decoder(TEACHER, 1), batch(), []
    weights = {"hidden": 1.0, "attention": 1.0, "ce": 0.5}
    loss = divergence_loss(teacher, weights, 1.0, inside=Inside([(2, 2), (layer, layer)], None))
    for recompute in (False, True):
        model = random_decoder(TEACHER).train()
        for block in model.layers:
            assert isinstance(block, Block)
            block.recompute = recompute
        total, _ = loss(model, b)
        total.backward()
        found.append([p.grad for p in model.parameters()])
    for a, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c)


def test_pairs_that_a_model_lacks_are_refused() -> None:
    with pytest.raises(GoriError, match=r"layer pair \[1, 4\]: the student has layers 0..1, the teacher 0..3"):
        check_pairs([(0, 0), (1, 4)], 2, 4)
    assert default_pairs(1, 4) == [(0, 0)]


def test_states_do_not_change_what_a_decoder_says() -> None:
    model: Decoder = random_decoder(TEACHER)
    ids, kept = batch().ids_BT, Kept(range(4))
    with torch.no_grad():
        assert torch.equal(model.hidden(ids), model.hidden(ids, kept=kept))
    assert [tuple(s.shape) for s in kept.entering.values()] == [(3, 9, 32)] * 4
    assert [tuple(t.shape) for t in kept.attended[3]] == [(3, 9, 4, 8), (3, 9, 2, 8), (3, 9, 2, 8)]


def test_parts_of_a_batch_weighed_by_their_answers_are_the_whole_batch() -> None:
    """So that ranks, threads and micro-batches give one loss."""
    student, teacher, b = random_decoder(STUDENT), random_decoder(TEACHER, 1), batch()
    projection = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    weights = {"forward_kl": 1.0, "hidden": 1.0, "cosine": 1.0, "attention": 1.0}
    loss = divergence_loss(teacher, weights, 1.0, inside=Inside([(1, 3)], projection))
    parts = [TrainBatch(b.ids_BT[rows], b.loss_BT[rows], b.valid_BT[rows]) for rows in (slice(0, 1), slice(1, 3))]
    shares = [len(p.targets) / len(b.targets) for p in parts]
    with torch.no_grad():
        whole = loss(student, b)[0].item()
        joined = sum(loss(student, p)[0].item() * share for p, share in zip(parts, shares, strict=True))
    assert joined == pytest.approx(whole, rel=1e-5)
