"""Round-to-nearest with portable scales, of one tensor and of a whole decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize.schemes import canonical, embedding_scheme, matching_embedding, scheme
from gori.quantized import EMBEDDING, HEAD, Quantization, QuantizedTensor, TensorScheme, quantizable


def portable(scale: Tensor) -> Tensor:
    """Round float32 scales to the nearest value that bfloat16 and float16 both hold exactly: a bfloat16 mantissa inside
    float16's normal range [2^-14, 65280]. XNNPACK keeps block scales in bfloat16; GGUF, Core ML, LiteRT in float16."""
    return scale.clamp(2.0**-14, 65280.0).to(torch.bfloat16).float()


def check_width(width: int, s: TensorScheme, name: str) -> None:
    """Refuse a layer whose inputs the scheme's groups do not divide."""
    if s.group_size and width % s.group_size:
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        raise GoriError(
            f"group size {s.group_size} does not divide in_features {width} of {name}: "
            f"its divisors are {', '.join(map(str, divisors))}; choose such a width or a scheme ending in -channel"
        )
    if s.bits == 4 and width % 2:
        raise GoriError(f"in_features {width} of {name} is odd and int4 is stored in pairs: choose an 8-bit scheme")


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
    """Quantize every linear of a float decoder by round-to-nearest, the embedding by its own scheme; `method` is one of
    METHODS.

    `embedding=None` takes the linear scheme's bits and groups. A tied head shares the embedding's integers where bits
    and groups agree, and is quantized like a linear, apart, where they do not.
    """
    scheme_name = canonical(scheme_name)
    s, embedding = scheme(scheme_name), embedding or matching_embedding(scheme_name)
    e = embedding_scheme(embedding)
    factors = METHODS[method]
    tensors = {n: round_to_nearest(m.weight.detach(), s, n, factors) for n, m in quantizable(model).items()}
    table: Tensor = model.embed_tokens.weight.detach()  # type: ignore[union-attr,operator,assignment]
    if e is not None:
        tensors[EMBEDDING] = round_to_nearest(table, e, EMBEDDING, factors)
    shared = model.cfg.tied and e is not None and (e.bits, e.group_size) == (s.bits, s.group_size)
    if not shared:
        head: Tensor = table if model.cfg.tied else model.lm_head.weight.detach()  # type: ignore[assignment]
        tensors[HEAD] = round_to_nearest(head, s, HEAD, factors)
    floats = {n: "a norm or bias: one vector" for n, p in model.named_parameters() if p.dim() == 1}
    if e is None:
        floats[EMBEDDING] = "--embedding float"
    spec = Quantization(
        scheme=scheme_name,
        embedding=embedding,
        method=method,
        tensors={n: t.scheme for n, t in tensors.items()},
        shared_head=shared,
        head_activation_bits=s.activation_bits if shared else 16,
        float_tensors=floats,
    )
    return tensors, spec
