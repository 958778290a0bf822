"""Which number types products and sums are made in."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(t: Tensor) -> torch.dtype:
    """What a tensor's products are made in: autocast's type, or without it, and of float64, the tensor's own."""
    kind = t.device.type
    if t.dtype == torch.float64 or t.is_meta or not torch.is_autocast_enabled(kind):
        return t.dtype
    return torch.get_autocast_dtype(kind)


def for_products(t: Tensor) -> Tensor:
    return t.to(product_dtype(t))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 for float64: for sums and logits."""
    return torch.promote_types(dtype, torch.float32)
