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

EPOCHS, RATE, LATENT_RATE, STEP_TOKENS, TEMPERATURE = 4, 0.001, 0.004, 1024, 2.0
MARGIN = 0.2
"""How far from its integer a latent may start, in units of the scale: at a cell's edge the first steps would undo what
GPTQ chose, and KL rises tenfold before it falls (docs/quantization.md)."""


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
    temperature: float = TEMPERATURE,
    margin: float = MARGIN,
    seed: int = 0,
    on_disk: Path | None = None,
) -> Trained:
    """Integers and scales of every weight of a layout, trained; norms and biases learn along.

    `model` is the float decoder, and the teacher where none is given (one of the same vocabulary). `start` are integers
    and scales to begin with (None: nearest ones of searched scales). `lr` is the peak rate of scales, a share of each a
    step, `latent_lr` that of latents, in units of their scale. Never worse than the start by the KL of a held-out tenth
    of the rows; what is returned is what the best forward pass multiplied, bit for bit.
    Holds, beside `model`: three floats for each weight (latents and Adam's moments; mapped files with `on_disk`), the
    gradient of one weight at a time, a step's activations, and the teacher's hidden states at the answers.
    Raises GoriError where there are fewer than two rows.
    """
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
