"""Tuning of scales: integers stay as they are, scales (and norms) learn what the float model says.

After DWQ, distilled weight quantization, of Apple's mlx-lm; scales here are portable in every step, so that what is
trained is what is stored. Knows nothing of how the integers were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gori.model import Decoder
from gori.quantize.blocks import kept
from gori.quantize.calibration import Batch
from gori.quantize.fake import Weight, student
from gori.quantize.fitting import Rows, Trained, fit
from gori.quantized import Quantization, QuantizedTensor

EPOCHS, RATE, STEP_TOKENS, TEMPERATURE = 3, 0.001, 1024, 2.0


def tune(
    model: Decoder,
    tensors: Mapping[str, QuantizedTensor],
    spec: Quantization,
    batches: Sequence[Batch],
    *,
    teacher: Decoder | None = None,
    epochs: int = EPOCHS,
    lr: float = RATE,
    step_tokens: int = STEP_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    on_disk: Path | None = None,
) -> Trained:
    """Scales that bring the quantized model nearer to the float one, for the given integers, which are returned as they
    are; norms and biases learn along.

    `model` is the float decoder that was rounded, and the teacher where none is given. `lr` is the peak rate: a share
    of each scale, a step. Never worse than the start by the KL of a held-out tenth of the rows.
    Holds, beside `model` (which may be mapped): the integers as int8, three floats for each scale, one float weight at
    a time, one step's activations, and the teacher's hidden states at the answers (mapped files with `on_disk`).
    Raises GoriError where there are fewer than two rows.
    """
    weights = {n: Weight(t.q, t.scale.log(), t.scheme) for n, t in tensors.items()}
    fake = student(model, spec, weights)
    with kept(on_disk) as place:
        rows = Rows(teacher or model, batches, place)
        how = {"lr": lr, "step_tokens": step_tokens, "temperature": temperature, "seed": seed, "label": "tune"}
        return fit(fake, weights, rows, place, epochs=epochs, latent_lr=0.0, **how)
