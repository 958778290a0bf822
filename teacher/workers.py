"""A step's gradient on several CPU cores: each thread takes a part of the rows with one-threaded operations.

Splitting rows, not operations, needs two meetings a step in place of two at every operation: as fast on idle cores, and
not brought to a halt when another program takes one of them. Knows nothing of what the loss means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from gori.model import Decoder

Item = TypeVar("Item")
Part = TypeVar("Part")
PartLoss = Callable[[Decoder, Part], tuple[Tensor, dict[str, float]]]


class Workers:
    """`count` threads, each with a replica of the model that shares its parameters."""

    def __init__(self, model: Decoder, count: int) -> None:
        self.count = count
        self._parameters = list(model.parameters())
        shared = {id(p): p for p in self._parameters}
        self._replicas = [model, *(copy.deepcopy(model, dict(shared)) for _ in range(count - 1))]
        self._pool = ThreadPoolExecutor(count)

    def train(self) -> None:
        for r in self._replicas:
            r.train()

    def compile(self) -> None:
        """torch.compile every replica's blocks."""
        for r in self._replicas:
            for block in r.layers:
                block.compile(dynamic=True)

    def gradient(
        self,
        parts: Sequence[Part],
        shares: Sequence[float],
        loss: Callable[[Decoder, Part], tuple[Tensor, dict[str, float]]],
    ) -> list[dict[str, float]]:
        """Add to every parameter's gradient that of `sum(share * loss(part))`, in the parts' order; returns what the
        loss reports of each part."""

        def work(replica: Decoder, part: Part, share: float) -> tuple[tuple[Tensor, ...], dict[str, float]]:
            value, entry = loss(replica, part)
            return torch.autograd.grad(value * share, self._parameters), entry

        found = [
            f.result() for f in [self._pool.submit(work, *a) for a in zip(self._replicas, parts, shares, strict=False)]
        ]
        for p, *grads in zip(self._parameters, *(g for g, _ in found), strict=True):
            for g in grads:
                p.grad = g if p.grad is None else p.grad.add_(g)
        return [entry for _, entry in found]

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients down to a norm of at most `largest`; returns their norm before."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, largest)

    def each(self, run: Callable[[Item], Any], items: Iterable[Item]) -> None:
        """Run a function on every item; the items must not share anything."""
        list(self._pool.map(run, items))

    def close(self) -> None:
        self._pool.shutdown()


def split(rows: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Rows in at most `count` parts of nearly equal number, none empty."""
    size = -(-len(rows) // count)
    return [rows[i : i + size] for i in range(0, len(rows), size)]
