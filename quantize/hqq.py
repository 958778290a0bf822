"""Scale search without data after HQQ: half-quadratic splitting on a loss that forgives outliers.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", with the scale as the unknown in
place of the zero point, which symmetric integers do not have. Shapes: O outputs, G groups, i inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gori.model import Decoder
from gori.quantize.layout import check_width, weight_of
from gori.quantize.rtn import METHODS, portable, round_to_nearest
from gori.quantized import Quantization, QuantizedTensor, TensorScheme

NORM = 0.7
"""p of the loss Σ|w - ŵ|^p: below one, a few large errors cost less than many small ones."""
ROUNDS = 20
BETA, GROWTH = 10.0, 1.01
"""Weight of the quadratic term, in units of the group's scale, and its growth a round."""


def shrunk(x: Tensor, beta: Tensor, norm: float) -> Tensor:
    """The minimiser over e of |e|^p + beta/2 (x - e)², by the generalised soft threshold that the article takes."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-12).pow(norm - 1) * (norm / beta)).clamp_min(0)


def searched(W_OI: Tensor, s: TensorScheme, name: str = "weight") -> QuantizedTensor:
    """Integers and portable scales of float32 `[out, in]` with the least Σ|w - ŵ|^p of all rounds, group by group; the
    start is the scale of least squared error, so that a group never gets worse than by it."""
    out, width = W_OI.shape
    check_width(width, s, name)
    low, high = -(2 ** (s.bits - 1)), 2 ** (s.bits - 1) - 1
    start = round_to_nearest(W_OI, s, name, METHODS["mse"]).scale
    W_OGi = W_OI.float().view(out, start.shape[1], -1)

    def integers(scale_OG: Tensor) -> Tensor:
        return (W_OGi / scale_OG.unsqueeze(-1)).round_().clamp_(low, high)

    def error(scale_OG: Tensor) -> Tensor:
        return (W_OGi - integers(scale_OG) * scale_OG.unsqueeze(-1)).abs().pow_(NORM).sum(-1)

    scale, best, least = start, start, error(start)
    for i in range(ROUNDS):
        q = integers(scale)
        unit = scale.unsqueeze(-1)
        e = unit * shrunk((W_OGi - q * unit) / unit, torch.tensor(BETA * GROWTH**i), NORM)
        fitted = ((W_OGi - e) * q).sum(-1) / q.square().sum(-1).clamp_min(1e-12)
        scale = portable(torch.where(fitted > 0, fitted, scale))
        now = error(scale)
        best, least = torch.where(now < least, scale, best), torch.minimum(now, least)
    return QuantizedTensor(integers(best).to(torch.int8).view(out, width), best, s)


def hqq(model: Decoder, spec: Quantization) -> dict[str, QuantizedTensor]:
    """Every weight of a layout; no data is looked at."""
    return {n: searched(weight_of(model, n), s, n) for n, s in spec.tensors.items()}
