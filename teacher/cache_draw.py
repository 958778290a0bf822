"""Few entries that stand for a teacher's whole distribution: drawn without bias, or the k largest.

Knows nothing of teachers, rows or files. Shapes: A answer tokens, V vocabulary, R rounds of drawing, n entries of all.
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


@dataclass(frozen=True)
class Drawn:
    """Entries of A tokens, and what they leave out."""

    soft: Soft
    mass: NDArray[np.float64]
    """[A], the distribution's sum: below 1 where a part of it has no token here (gori.teacher.align)."""
    top1: NDArray[np.bool_]
    """[A], whether the most probable token is among the entries."""


def uniforms(seed: int, epoch: int, row: int, answers: int, rounds: int) -> NDArray[np.float64]:
    """`[answers, rounds]` in [0, 1), a function of the arguments and the position alone: the same on every rank."""
    return np.random.default_rng([seed, 6007, epoch, row]).random((answers, rounds))


def draw(probs_AV: Tensor, uniform_AR: Tensor, proposal: float) -> Drawn:
    """Random sampling knowledge distillation (arXiv 2503.16870, section 4): R draws with replacement from the proposal
    q ~ p^proposal, each entry's weight `count / R * p / q`, whose expectation is p.

    The weights are not scaled to sum to one: their sum has the expectation 1 (or `mass`) already, and dividing by it
    would make the estimate a ratio, which is biased. What p lacks to 1 is drawn too, as no entry. float32 weights; of
    another proposal than 1 they are rounded to float16, as they are stored.
    """
    parts = [_draw(probs_AV[rows], uniform_AR[rows], proposal) for rows in _chunks(len(probs_AV), probs_AV.shape[1])]
    return _join(parts)


def _draw(p: Tensor, uniform: Tensor, proposal: float) -> Drawn:
    (A, V), R = p.shape, uniform.shape[1]
    p = p.double()
    mass = p.sum(-1)
    whole = torch.cat((p, (1 - mass).clamp(min=0).unsqueeze(1)), dim=1)
    q = whole if proposal == 1 else whole.pow(proposal)
    q = q / q.sum(-1, keepdim=True)
    chosen = torch.searchsorted(q.cumsum(-1), uniform.double(), right=True).clamp(max=V)
    chosen = chosen.sort(-1).values
    first = torch.ones_like(chosen, dtype=torch.bool)
    first[:, 1:] = chosen[:, 1:] != chosen[:, :-1]
    run = first.cumsum(-1) - 1
    count = torch.zeros(A, R, dtype=torch.float64, device=p.device).scatter_add_(1, run, torch.ones_like(uniform))
    ids = torch.zeros(A, R, dtype=torch.long, device=p.device).scatter_(1, run, chosen)
    weight = count / R
    if proposal != 1:
        weight = (weight * whole.gather(1, ids) / q.gather(1, ids)).to(torch.float16).double()
    weight = torch.where((ids < V) & (count > 0), weight, 0.0)
    return _drawn(p, ids, weight, mass)


def largest(probs_AV: Tensor, k: int) -> Drawn:
    """The k most probable tokens; the rest of the mass is the tail, which is not stored. float32 weights, rounded down
    to float16, so that they never sum to more than the distribution."""
    parts = []
    for rows in _chunks(len(probs_AV), probs_AV.shape[1]):
        p = probs_AV[rows].double()
        value, ids = p.topk(min(k, p.shape[1]), dim=-1)
        half = value.to(torch.float16)
        down = torch.where(half.double() > value, torch.nextafter(half, torch.zeros_like(half)), half)
        parts.append(_drawn(p, ids, down.double(), p.sum(-1)))
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
    soft = Soft(ids.to(torch.int32).cpu().numpy(), weight.float().cpu().numpy())
    return Drawn(soft, mass.cpu().numpy(), top.any(-1).cpu().numpy())


def _join(parts: list[Drawn]) -> Drawn:
    soft = Soft(np.concatenate([d.soft.ids for d in parts]), np.concatenate([d.soft.weights for d in parts]))
    return Drawn(soft, np.concatenate([d.mass for d in parts]), np.concatenate([d.top1 for d in parts]))
