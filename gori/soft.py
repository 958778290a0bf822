"""A teacher's distribution at each answer token, as a few ids and weights. Knows nothing of how they were chosen.

Shapes: A answer tokens (those whose `loss` is true, the first token of a row never among them), k entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Soft:
    """Entries of one row's answer tokens; a token with fewer than k has weight 0 (and any id) in the rest."""

    ids: NDArray[Any]
    """int32 [A, k]"""
    weights: NDArray[Any]
    """float32 [A, k]; of samples they estimate the probability without bias, of the top k they are it."""


def join(softs: Sequence[Soft]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows one after the other, as wide as the widest: ids `[A, k]` and weights `[A, k]`."""
    total, k = sum(len(s.ids) for s in softs), max(s.ids.shape[1] for s in softs)
    ids, weights = np.zeros((total, k), np.int64), np.zeros((total, k), np.float32)
    at = 0
    for s in softs:
        rows, width = slice(at, at + len(s.ids)), s.ids.shape[1]
        ids[rows, :width], weights[rows, :width] = s.ids, s.weights
        at = rows.stop
    return ids, weights
