"""What a forward pass leaves of its inside for those who ask.

Knows nothing of models. Shapes: B rows, T tokens, D width, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


class Kept:
    """Filled by a forward pass that is given it. No dataclass and no list: FSDP copies those on their way in."""

    def __init__(self, attended: Collection[int] = ()) -> None:
        """`attended`: layers whose queries, keys and values are kept."""
        self._wanted = frozenset(attended)
        self.entering: dict[int, Tensor] = {}
        """What enters each layer, `[B, T, D]`."""
        self.attended: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """Rotated queries `[B, T, H, d]`, rotated keys and values `[B, T, K, d]`."""

    def enters(self, layer: int, x_BTD: Tensor) -> None:
        self.entering[layer] = x_BTD

    def attends(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        if layer in self._wanted:
            self.attended[layer] = qkv
