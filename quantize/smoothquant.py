"""SmoothQuant: part of an input's range moved into the weights that read it, so that 8 bits per token hold the rest.

Xiao et al., arXiv 2211.10438. Knows nothing of how factors are folded into the network (fold.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gori.model import Decoder
from gori.quantize.calibration import Batch
from gori.quantize.fold import Seen, folded, log_level
from gori.quantized import Quantization

STEPS = 20
"""Strengths α that are tried: multiples of 1 / STEPS up to 1."""


def proposals(seen: Seen) -> Iterator[Tensor]:
    """`s_j = max|x_j|^α / max|w_j|^(1-α)` (eq. 4) for each α, with geometric mean 1; w over all linears that read x."""
    reach_I = log_level(seen.x_NI.abs().amax(0))
    weight_I = log_level(torch.cat([m.weight for m in seen.linears]).abs().amax(0))
    for i in range(STEPS + 1):
        alpha = i / STEPS
        yield (alpha * reach_I - (1 - alpha) * weight_I).exp()


def smoothquant(
    model: Decoder, batches: Sequence[Batch], spec: Quantization, *, on_disk: Path | None = None
) -> Decoder:
    """A new decoder of the same function, its linears' inputs smoothed; α for each site by the error of its outputs
    with rounded weights and, where the layout has them, 8-bit activations. Sites that no α helps stay as they are.

    With `on_disk` activations lie in mapped files there. Raises GoriError for a mixture of experts.
    """
    return folded(model, batches, spec, proposals, "smoothquant", on_disk)
