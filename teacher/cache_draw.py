"""Few entries that stand for a teacher's whole distribution: drawn without bias, or the k largest.

Knows nothing of teachers, rows or files. Shapes: A answer tokens, V vocabulary, k entries at most, n entries of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gori.soft import Soft

CHUNK_BYTES = 64 << 20
"""Size of one [chunk, V] float64 tensor."""
REST = 1e-4
"""Mass that one drawn entry may stand for, so that a sure teacher has few entries."""


@dataclass(frozen=True)
class Drawn:
    """Entries of A tokens, and what they leave out."""

    soft: Soft
    mass: NDArray[np.float64]
    """[A], the distribution's sum: below 1 where a part of it has no token here (gori.teacher.align)."""
    top1: NDArray[np.bool_]
    """[A], whether the most probable token is among the entries."""


def uniforms(seed: int, epoch: int, row: int, answers: int) -> NDArray[np.float64]:
    """`[answers]` in [0, 1), a function of the arguments and the position alone: the same on every rank."""
    return np.random.default_rng([seed, 6007, epoch, row]).random(answers)


def draw(probs_AV: Tensor, uniform_A: Tensor, k: int) -> Drawn:
    """At most k entries a token whose weights have the probabilities as their expectations, float32.

    A token is taken with probability min(1, p / t), and then weighs max(p, t), where t is such that n are taken: those
    above t always, with their own probability, and of the others n - h, all with the weight t. No other n entries
    without bias have as small a sum of variances (VarOpt: Cohen et al., arXiv 0803.0473, section 2); they are drawn
    systematically, along one uniform number (Madow 1949). n is k, or as few as leave REST to the last of them. What the
    probabilities lack to 1 is drawn too, as no entry; with it weights sum to 1. Rounded by at most 2^-16 of themselves,
    as they are stored.
    """
    rows = _chunks(len(probs_AV), probs_AV.shape[1])
    return _join([_draw(probs_AV[r], uniform_A[r], k) for r in rows])


def _draw(p: Tensor, uniform: Tensor, k: int) -> Drawn:
    V, p = p.shape[1], p.double()
    mass = p.sum(-1)
    whole = torch.cat((p, (1 - mass).clamp(min=0).unsqueeze(1)), dim=1)
    value, ids = whole.topk(min(k, V + 1), dim=-1)
    place = torch.arange(value.shape[1], device=p.device)
    left = whole.sum(-1, keepdim=True) - value.cumsum(-1) + value  # by what is not among the `place` largest
    little = left <= REST
    count = torch.where(little.any(-1), little.int().argmax(-1) + 1, len(place)).unsqueeze(1)
    others = count - place  # to be drawn, were the `place` largest taken as they are
    certain = ((others == 1) | ((others > 0) & (value * others <= left))).int().argmax(-1, keepdim=True)
    is_certain = place < certain
    tail = whole.scatter(1, ids, torch.where(is_certain, 0.0, value)).cumsum(-1)
    each = tail[:, -1:] / (count - certain)
    drawn = torch.searchsorted(tail, (uniform.double().unsqueeze(1) + place - certain) * each, right=True)
    ids = torch.where(is_certain, ids, drawn.clamp(max=V))
    weight = torch.where(is_certain, value, each)
    return _drawn(p, ids, _stored(weight) * ((place < count) & (ids < V)), mass)


def _stored(weight: Tensor, down: bool = False) -> Tensor:
    """float32 whose last 8 bits are zero: rounded to the nearest, or down."""
    near = weight.float()
    if down:
        near = torch.where(near.double() > weight, torch.nextafter(near, torch.zeros_like(near)), near)
    return ((near.view(torch.int32) + (0 if down else 0x80)) & -256).view(torch.float32)


def largest(probs_AV: Tensor, k: int) -> Drawn:
    """The k most probable tokens; the rest of the mass is the tail, which is not stored. float32 weights, rounded down
    by at most 2^-15 of themselves, so that they never sum to more than the distribution."""
    parts = []
    for rows in _chunks(len(probs_AV), probs_AV.shape[1]):
        p = probs_AV[rows].double()
        value, ids = p.topk(min(k, p.shape[1]), dim=-1)
        parts.append(_drawn(p, ids, _stored(value, down=True), p.sum(-1)))
    return _join(parts)


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (8 * vocab))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _drawn(p: Tensor, ids: Tensor, weight: Tensor, mass: Tensor) -> Drawn:
    """Entries in order of their ids, those of weight 0 at the right with id 0."""
    kept = weight > 0
    order = torch.where(kept, ids, p.shape[1]).argsort(dim=-1, stable=True)
    ids, weight = torch.where(kept, ids, 0).gather(1, order), weight.gather(1, order)
    top = (ids == p.argmax(-1, keepdim=True)) & (weight > 0)
    soft = Soft(ids.to(torch.int32).cpu().numpy(), weight.cpu().numpy())
    return Drawn(soft, mass.cpu().numpy(), top.any(-1).cpu().numpy())


def _join(parts: list[Drawn]) -> Drawn:
    soft = Soft(np.concatenate([d.soft.ids for d in parts]), np.concatenate([d.soft.weights for d in parts]))
    return Drawn(soft, np.concatenate([d.mass for d in parts]), np.concatenate([d.top1 for d in parts]))
