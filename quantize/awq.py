"""AWQ: inputs that carry much get finer steps in the weights that read them.

Lin et al., arXiv 2306.00978. Knows nothing of how factors are folded into the network (fold.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from gori.model import Decoder
from gori.quantize.calibration import Batch
from gori.quantize.fold import Seen, folded, log_level
from gori.quantized import Quantization

STEPS = 4
"""Strengths α and β that are tried: multiples of 1 / STEPS up to 1, each with each."""


def proposals(seen: Seen) -> Iterator[Tensor]:
    """`s_j = mean|x_j|^α / rms(w_j)^β` with geometric mean 1, for each α and β.

    β = 0 is the paper's search (eq. 5). If rounding errors grew with the root mean square of a group's weights,
    α = β = 1/2 would be best: by Cauchy and Schwarz `Σ (w_j s_j)² · Σ (x_j / s_j)²` is least at `s_j² = x_j / w_j`.
    Columns are measured over all linears that read x, each over its own root mean square.
    """
    weights = [m.weight for m in seen.linears]
    relative_OI = torch.cat([w / w.square().mean().sqrt().clamp(min=1e-12) for w in weights])
    input_I, weight_I = log_level(seen.x_NI.abs().mean(0)), log_level(relative_OI.square().mean(0).sqrt())
    for i, j in product(range(STEPS + 1), repeat=2):
        if i or j:
            yield ((i * input_I - j * weight_I) / STEPS).exp()


def awq(model: Decoder, batches: Sequence[Batch], spec: Quantization, *, on_disk: Path | None = None) -> Decoder:
    """A new decoder of the same function, whose weights lose less by rounding to the schemes of a layout; α and β for
    each site by the error of its outputs (`Seen.error`), no factors where none has less.

    A tied head that the layout holds apart becomes a weight of its own. With `on_disk` activations lie in mapped files
    there. Raises GoriError for a mixture of experts.
    """
    return folded(model, batches, spec, proposals, "awq", on_disk)
