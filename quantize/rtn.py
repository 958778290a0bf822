"""Round-to-nearest with portable scales, of one tensor and of a whole decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize.layout import check_width, layout, weight_of
from gori.quantized import Quantization, QuantizedTensor, TensorScheme


def portable(scale: Tensor) -> Tensor:
    """Round float32 scales to the nearest value that bfloat16 and float16 both hold exactly: a bfloat16 mantissa inside
    float16's normal range [2^-14, 65280]. XNNPACK keeps block scales in bfloat16; GGUF, Core ML, LiteRT in float16."""
    return scale.clamp(2.0**-14, 65280.0).to(torch.bfloat16).float()


METHODS: dict[str, tuple[float, ...]] = {
    "rtn": (1.0,),
    "mse": (1.0, *(0.7 + 0.025 * i for i in range(12)), *(1.025 + 0.025 * i for i in range(4))),
}
"""Method → the scales that are tried for a group, as multiples of the one that just holds its largest weight; the one
with the least squared error is kept (on a tie the first). `mse` clips outliers where the others gain more by it."""


def round_to_nearest(
    weight: Tensor, s: TensorScheme, name: str = "weight", factors: Sequence[float] = METHODS["rtn"]
) -> QuantizedTensor:
    """Symmetric round-to-nearest of float32 `[out, in]`: scale = factor * absmax / (2^(bits-1) - 0.5) per group, made
    portable first, so that the integers are the nearest ones for the scale that is stored."""
    out, width = weight.shape
    check_width(width, s, name)
    group = s.group_size or width
    if not torch.isfinite(weight).all():
        raise GoriError(f"{name} holds NaN or infinity: its training diverged; lower the learning rate and train again")
    grouped = weight.float().view(out, width // group, group)
    low, high = -(2 ** (s.bits - 1)), 2 ** (s.bits - 1) - 1
    holding = grouped.abs().amax(-1) / (high + 0.5)

    def rounded(scale: Tensor) -> Tensor:
        return (grouped / scale.unsqueeze(-1)).round_().clamp_(low, high)

    scale = portable(holding * factors[0])
    if len(factors) > 1:
        least = torch.full_like(scale, torch.inf)
        for tried in (portable(holding * f) for f in factors):
            error = (rounded(tried) * tried.unsqueeze(-1) - grouped).square_().sum(-1)
            scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    return QuantizedTensor(rounded(scale).to(torch.int8).view(out, width), scale, s)


def rtn(
    model: Decoder, scheme_name: str, embedding: str | None = None, method: str = "rtn"
) -> tuple[dict[str, QuantizedTensor], Quantization]:
    """Quantize every linear of a float decoder by round-to-nearest, the embedding by its own scheme (see `layout`);
    `method` is one of METHODS."""
    spec = replace(layout(model, scheme_name, embedding), method=method)
    return nearest(model, spec, METHODS[method]), spec


def nearest(model: Decoder, spec: Quantization, factors: Sequence[float]) -> dict[str, QuantizedTensor]:
    """Every weight of a layout, rounded to nearest."""
    return {n: round_to_nearest(weight_of(model, n), s, n, factors) for n, s in spec.tensors.items()}


def rtn_step(model: Decoder, spec: Quantization) -> dict[str, QuantizedTensor]:
    """`rtn` as a step of a method (gori.quantize.methods)."""
    return nearest(model, spec, METHODS["rtn"])


def mse_step(model: Decoder, spec: Quantization) -> dict[str, QuantizedTensor]:
    """`mse` as a step of a method."""
    return nearest(model, spec, METHODS["mse"])
