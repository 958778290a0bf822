"""A student's loss in the training loop: the terms at the answers' positions against a living or a cached teacher, what
happens inside the networks, and steps whose answers the student draws itself.

Knows nothing of recipes or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gori.distill import on_policy
from gori.distill.divergences import DIVERGENCES, STATES, divergences_of, parse
from gori.distill.losses import distillation_loss, sparse_loss
from gori.distill.states import Pairs, state_terms
from gori.evaluate import MAX_NEW_TOKENS
from gori.inner import Kept
from gori.model import Decoder
from gori.teacher.sharding import whole_here
from gori.teacher.stage import answer_loss
from gori.teacher.train import Loss, TrainBatch, to_tensors


@dataclass(frozen=True)
class Inside:
    """What states and attention are compared on."""

    pairs: Pairs
    """(student's layer, teacher's layer)."""
    projection: Tensor | None
    """[D', D] from the teacher's residual stream to the student's; None: as it is."""


@dataclass(frozen=True)
class Draws:
    """Which steps are on-policy, and how their answers are drawn."""

    share: float
    temperature: float
    start: float
    seed: int
    end: int
    """Token id that ends an answer."""
    pad: int
    prompts: Sequence[list[int]] | None = None
    """Where these are given, prompts are drawn from them and not the batch's own."""
    longest: int = MAX_NEW_TOKENS

    def now(self, progress: float) -> bool:
        return on_policy.chosen(self.share, self.start, progress, self.seed)

    def batch(self, model: Decoder, batch: TrainBatch) -> TrainBatch:
        """A batch of as many rows whose answers the model drew; a pure function of the model and the batch's seed."""
        asked = on_policy.prompts_of(batch.ids_BT, batch.loss_BT, batch.valid_BT)
        if self.prompts is not None:
            asked = on_policy.near(self.prompts, len(asked), batch.noise)
        with whole_here(model):
            said = on_policy.sampled(model, asked, self.end, self.temperature, batch.noise, self.longest)
        rows = on_policy.examples(asked, said)
        return to_tensors(rows, self.pad, batch.ids_BT.device, progress=batch.progress, noise=batch.noise)


def divergence_loss(
    teacher: Decoder,
    weights: Mapping[str, float],
    temperature: float,
    until: float = 1.0,
    *,
    inside: Inside | None = None,
    draws: Draws | None = None,
    compiled: bool = False,
) -> Loss:
    """The weighted distillation terms at the answers' positions; the teacher runs without gradient.

    From the share `until` of the steps on, the true answers alone: a student that has caught up with its teacher learns
    nothing more from it (early-stopped distillation: Cho and Hariharan, arXiv 1910.01348, section 4). In an on-policy
    step of `draws` the terms but "ce" are taken at answers that the student drew; no gradient goes through the draws
    (GKD, arXiv 2306.13649, algorithm 1). Terms on states (gori.distill.states) are compared on `inside`.
    """
    teacher.requires_grad_(False)
    alone = answer_loss(0.0, compiled)
    kinds = {name: parse(name)[0] for name, w in weights.items() if w}
    needs_teacher = any(kind != "ce" for kind in kinds.values())
    of_states = [k for k in STATES if k in kinds.values()]
    assert inside is not None or not of_states

    def loss(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        if batch.progress >= until:
            return alone(model, batch)
        drawn = draws is not None and draws.now(batch.progress)
        if draws is not None and drawn:
            batch = draws.batch(model, batch)
        inner, inner_teacher = _asked(inside, of_states)
        hidden = batch.answer_hidden(model, inner)
        taught = teacher_head = None
        if needs_teacher:
            with torch.no_grad():
                taught = batch.answer_hidden(teacher, inner_teacher)
            teacher_head = teacher.head_weight
        used = {k: weights[k] for k, kind in kinds.items() if kind in DIVERGENCES or (kind == "ce" and not drawn)}
        total, terms = distillation_loss(
            hidden, model.head_weight, taught, teacher_head, batch.targets, used, temperature, compiled=compiled
        )
        if inside is not None and inner is not None and inner_teacher is not None:
            valid, wanted = batch.valid_BT[:, :-1], batch.loss_BT[:, 1:]
            found = state_terms(inner, inner_teacher, valid, wanted, of_states, inside.pairs, inside.projection)
            total = total + sum(weights[k] * v for k, v in found.items())
            terms |= {k: v.item() for k, v in found.items()}
        told = {"on_policy": float(drawn)} if draws is not None else {}
        return total, _entry(total, terms) | told

    return loss


def _asked(inside: Inside | None, kinds: Sequence[str]) -> tuple[Kept | None, Kept | None]:
    """For the student's and the teacher's pass, where terms on states are wanted."""
    if inside is None or not kinds:
        return None, None
    s, t = inside.pairs[-1]
    attended = "attention" in kinds
    return Kept([s] if attended else []), Kept([t] if attended else [])


def cached_loss(
    weights: Mapping[str, float], temperature: float, until: float = 1.0, *, tail: bool, compiled: bool = False
) -> Loss:
    """The same of a teacher of whom each batch has a few entries at its answers (`TrainBatch.soft`): forward_kl and ce;
    see `sparse_loss` for `tail`."""
    alone = answer_loss(0.0, compiled)

    def loss(model: Decoder, batch: TrainBatch) -> tuple[Tensor, dict[str, float]]:
        if batch.progress >= until:
            return alone(model, batch)
        assert batch.soft is not None
        total, terms = sparse_loss(
            batch.answer_hidden(model), model.head_weight, *batch.soft, batch.targets, weights, temperature, tail,
            compiled=compiled,
        )  # fmt: skip
        return total, _entry(total, terms)

    return loss


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """Whether any term compares with a teacher."""
    return any(parse(name)[0] != "ce" for name, w in weights.items() if w)


def has_divergence(weights: Mapping[str, float]) -> bool:
    return bool(divergences_of(name for name, w in weights.items() if w))


def _entry(total: Tensor, terms: Mapping[str, float]) -> dict[str, float]:
    return {"loss": round(total.item(), 5), **{k: round(v, 5) for k, v in terms.items()}}
