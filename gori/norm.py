"""Root mean square norm with its gradient in closed form. Knows nothing of what it normalises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight with the gradient in closed form: alone in a loop a quarter of autograd's time over the six
    operations (docs/training.md has what a whole step gains)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        y, scale = normed(x, eps)
        ctx.save_for_backward(y, scale, weight)
        return (weight * y.to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        y, scale, weight = ctx.saved_tensors
        D = y.shape[-1]
        along = (grad * y).reshape(-1, D)
        mean = (along @ weight.to(along.dtype)).div_(-D).view(*y.shape[:-1], 1)
        grad_x = (grad * weight).to(y.dtype).addcmul_(y, mean).mul_(scale)
        return grad_x.to(grad.dtype), along.sum(0).to(weight.dtype), None


def normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square along the last dimension, and the factor `[..., 1]`, both float32."""
    y = x.float()
    scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y * scale, scale


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 and given in the type that came (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Norm.apply(x, self.weight, self.eps)
        return (self.weight * normed(x, self.eps)[0].to(x.dtype)).to(x.dtype)
