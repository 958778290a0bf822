"""Dropout whose masks come from a generator of its own, seeded for each step. Knows nothing of what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes a share `p` of what a block adds to the residual stream while training, and scales the rest up.

    Masks come from a generator of its own, seeded for each step: replicas on several threads then draw the same masks
    in every run (torch's own dropout draws from one generator that they would share).
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.0
        self.noise: torch.Generator | None = None

    def seed(self, seed: int, device: torch.device) -> None:
        self.noise = torch.Generator(device).manual_seed(seed) if self.p else None

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None or not self.training:
            return x
        keep = torch.rand(x.shape, generator=self.noise, device=x.device) >= self.p
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

    def twice(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward pass and of its recomputation, which draws the same masks again."""
        noise = self.noise
        if noise is None:
            return nullcontext(), nullcontext()
        first = noise.get_state()

        @contextmanager
        def again() -> Iterator[None]:
            now = noise.get_state()
            noise.set_state(first)
            yield
            noise.set_state(now)

        return nullcontext(), again()
