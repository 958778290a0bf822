"""Tokens to their experts and back: rows gathered in the experts' order, with gradients that are gathers too.

No row is added into memory from several places (a GPU's atomics: slow, and of no fixed order) and nothing makes the
processor wait for a GPU. Knows nothing of what experts compute.

Shapes: N tokens, k experts a token, A = N*k assignments, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Sent(torch.autograd.Function):
    """Every token's row once for each of its experts; the gradient is the sum of a token's rows."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_A: Tensor, place_A: Tensor, k: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place_A)
        ctx.k = k
        return x_ND.index_select(0, order_A // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (place_A,) = ctx.saved_tensors
        by_token = grad_AD.index_select(0, place_A).view(-1, ctx.k, grad_AD.shape[1])
        return by_token.sum(1, dtype=grad_AD.dtype), None, None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, place_A: Tensor, order_A: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(order_A)
        return y_AD.index_select(0, place_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (order_A,) = ctx.saved_tensors
        return grad_AD.index_select(0, order_A), None, None


@dataclass(frozen=True)
class Routes:
    """Which rows stand where when they are sorted by expert."""

    order_A: Tensor
    """int64: of each sorted row, its assignment n * k + i."""
    place_A: Tensor
    """int64: of each assignment, its sorted row."""
    ends_E: Tensor
    """int32: where each expert's rows end."""
    k: int

    @classmethod
    def of(cls, expert_Nk: Tensor, experts: int) -> Routes:
        """For each token's experts, int64 `[N, k]`, of so many."""
        sorted_A, order_A = expert_Nk.flatten().sort(stable=True)
        every_E = torch.arange(experts, device=order_A.device)
        ends_E = torch.searchsorted(sorted_A, every_E, right=True, out_int32=True)
        steps_A = torch.arange(len(order_A), device=order_A.device)
        return cls(order_A, torch.empty_like(order_A).scatter_(0, order_A, steps_A), ends_E, expert_Nk.shape[1])

    def sent(self, x_ND: Tensor) -> Tensor:
        """Tokens' rows, sorted by expert, `[A, D]`."""
        return _Sent.apply(x_ND, self.order_A, self.place_A, self.k)  # pyright: ignore[reportReturnType]

    def unsorted(self, y_AD: Tensor) -> Tensor:
        """Sorted rows in the order of the assignments."""
        return _Permuted.apply(y_AD, self.place_A, self.order_A)  # pyright: ignore[reportReturnType]

    def back(self, y_AD: Tensor, weight_Nk: Tensor) -> Tensor:
        """Each token's weighted sum of what its experts made of it, `[N, D]`."""
        rows_NkD = self.unsorted(y_AD).view(*weight_Nk.shape, y_AD.shape[1])
        return (rows_NkD * weight_Nk.to(y_AD.dtype).unsqueeze(-1)).sum(1, dtype=y_AD.dtype)


def counts(expert_Mk: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, float32 [E]: whole numbers, whose sum has no order."""
    chosen = expert_Mk.flatten()
    ones = torch.ones(len(chosen), device=chosen.device)
    return torch.zeros(experts, device=chosen.device).scatter_add_(0, chosen, ones)
