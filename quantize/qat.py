"""Quantization-aware training: integers and scales learn together what a float teacher says.

A weight's latents are floats in units of its scale; their nearest integers are what every forward pass multiplies, and
what is returned. Scales learn as in LSQ (arXiv 1902.08153), by their logarithms, independent of the latents: a scale
that moves takes its integers along. Knows nothing of how the start was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gori.model import Decoder
from gori.quantize.blocks import kept
from gori.quantize.calibration import Batch
from gori.quantize.fake import Weight, student
from gori.quantize.fitting import Rows, Trained, fit
from gori.quantize.layout import weight_of
from gori.quantize.rtn import METHODS, nearest
from gori.quantized import Quantization, QuantizedTensor

EPOCHS, RATE, LATENT_RATE, STEP_TOKENS = 12, 0.002, 0.02, 1024
MARGIN = 0.49
"""How far from its integer a latent may start, in units of the scale."""


@torch.no_grad()
def latents(W_OI: Tensor, t: QuantizedTensor, margin: float = MARGIN) -> Tensor:
    """Latents `[O, I]` whose nearest integers are `t`'s: the float weight in units of the scale, brought into the
    integer's cell where another one was chosen."""
    out, width = t.q.shape
    q = t.q.float()
    u_OI = (W_OI.float().view(out, t.scale.shape[1], -1) / t.scale.unsqueeze(-1)).view(out, width)
    return q + (u_OI - q).clamp_(-margin, margin)


def qat(
    model: Decoder,
    spec: Quantization,
    batches: Sequence[Batch],
    *,
    teacher: Decoder | None = None,
    start: Mapping[str, QuantizedTensor] | None = None,
    epochs: int = EPOCHS,
    lr: float = RATE,
    latent_lr: float = LATENT_RATE,
    step_tokens: int = STEP_TOKENS,
    temperature: float = 1.0,
    margin: float = MARGIN,
    seed: int = 0,
    on_disk: Path | None = None,
) -> Trained:
    """Integers and scales of every weight of a layout, trained; norms and biases learn along."""
    start = start or nearest(model, spec, METHODS["mse"])
    with kept(on_disk) as place:
        weights = {
            n: Weight(place.keep(latents(weight_of(model, n), t, margin)), t.scale.log(), t.scheme)
            for n, t in start.items()
        }
        fake = student(model, spec, weights)
        rows = Rows(teacher or model, batches, place)
        how = {"lr": lr, "step_tokens": step_tokens, "temperature": temperature, "seed": seed, "label": "qat"}
        return fit(fake, weights, rows, place, epochs=epochs, latent_lr=latent_lr, **how)
