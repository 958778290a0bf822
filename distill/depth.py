"""Which of a teacher's layers a shallower student takes.

Knows nothing of students' modules. Shapes in names: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gori import console
from gori.errors import GoriError
from gori.model import Decoder

Depth = Literal["perplexity", "even", "influence"]
ROWS = 128
"""Calibration batches that `perplexity` reads."""


@dataclass(frozen=True)
class Dropped:
    """One layer that was left out, in the order of leaving."""

    layer: int
    losses: dict[int, float]
    """Cross-entropy, nats a token, without each of the layers that were still there."""


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `total` layers, first and last among them: 3 of 5 → [0, 2, 4]."""
    if count > total:
        raise GoriError(f"a student of {count} layers cannot be initialised from a teacher of {total}: use init random")
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def most_influential(count: int, influence: Sequence[float]) -> list[int]:
    """The layers that change the residual stream most, in their order (ShortGPT, arXiv 2403.03853)."""
    return sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:count])


def least_missed(
    teacher: Decoder, count: int, calibration: Sequence[Tensor], answers: Sequence[Tensor] = ()
) -> list[Dropped]:
    """The layers to leave out until `count` are left: one by one the one without which the teacher's loss on the
    calibration tokens is lowest (SLEB, arXiv 2402.09025, algorithm 1; Shortened LLaMA, arXiv 2402.02834, section 2.2).

    calibration: token ids int64 `[B, T]`, unpadded; answers: bool `[B, T]`, the tokens whose loss counts (those at 0
    never do), none: all.
    """
    kept, dropped = list(range(len(teacher.layers))), []
    total = sum(range(count + 1, len(kept) + 1))
    if len(kept) == count:
        return dropped
    with console.steps("layers", total) as bar:
        while len(kept) > count:
            losses = dict(zip(kept, without_each(teacher, kept, calibration[:ROWS], answers[:ROWS]), strict=True))
            worst = min(kept, key=lambda i: losses[i])
            bar.update(sum(range(len(kept), len(teacher.layers) + 1)), f"without {worst}: loss {losses[worst]:.3f}")
            kept.remove(worst)
            dropped.append(Dropped(worst, losses))
    return dropped


@torch.no_grad()
def loss_of(model: Decoder, calibration: Sequence[Tensor], answers: Sequence[Tensor] = ()) -> float:
    """Mean cross-entropy of the calibration tokens, nats a token; arguments as in `least_missed`."""
    total, counted = 0.0, 0
    for n, ids_BT in enumerate(calibration):
        wanted_BT = _wanted(ids_BT, n, answers)
        total += _loss_sum(model, model.hidden(ids_BT), ids_BT, wanted_BT)
        counted += int(wanted_BT.sum())
    return total / counted


def _wanted(ids_BT: Tensor, n: int, answers: Sequence[Tensor]) -> Tensor:
    """bool `[B, T - 1]`: of the n-th batch, the tokens after the first whose loss counts."""
    return answers[n][:, 1:] if answers else torch.ones_like(ids_BT[:, 1:], dtype=torch.bool)


def _loss_sum(model: Decoder, hidden_BTD: Tensor, ids_BT: Tensor, wanted_BT: Tensor) -> float:
    logits = model.logits(hidden_BTD[:, :-1][wanted_BT])
    return float(F.cross_entropy(logits.float(), ids_BT[:, 1:][wanted_BT], reduction="sum"))


@torch.no_grad()
def without_each(
    teacher: Decoder, kept: Sequence[int], calibration: Sequence[Tensor], answers: Sequence[Tensor] = ()
) -> list[float]:
    """Mean cross-entropy of the calibration tokens, one figure for each layer of `kept` that is left out.

    What comes before a layer is computed once for all that follow it: half the work of as many whole passes.
    """
    blocks = [teacher.layers[i] for i in kept]
    sums, counted = [0.0] * len(blocks), 0
    for n, ids_BT in enumerate(calibration):
        wanted_BT = _wanted(ids_BT, n, answers)
        counted += int(wanted_BT.sum())
        x_BTD = teacher.embed_tokens(ids_BT)
        rope = teacher.rope_of(x_BTD)
        for i, block in enumerate(blocks):
            y_BTD = x_BTD
            for later in blocks[i + 1 :]:
                y_BTD = later(y_BTD, rope, None, None, None)
            sums[i] += _loss_sum(teacher, teacher.norm(y_BTD), ids_BT, wanted_BT)
            x_BTD = block(x_BTD, rope, None, None, None)
    return [s / counted for s in sums]
