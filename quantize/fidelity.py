"""How far a model is from the float one it was made of, over a calibration set: KL, likelihood, top-1 by token.

Two decoders in memory, batched and teacher-forced; knows nothing of files or engines. Shapes: N answer tokens, V tokens
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gori.model import Decoder
from gori.quantize.calibration import Batch, answer_hidden

CHUNK = 1024
"""Answer tokens whose logits exist at once."""


@dataclass(frozen=True)
class Fidelity:
    """One entry for each answer token."""

    kl_N: Tensor
    """KL(float || model) in nats, float64."""
    nll_N: Tensor
    """-log p(wanted token) of the model, nats."""
    nll_float_N: Tensor
    same_N: Tensor
    """bool: both find the same token likeliest."""
    rows_N: Tensor
    """int64: the row that the token belongs to."""

    @property
    def kl_mean(self) -> float:
        return float(self.kl_N.mean())

    def summary(self) -> dict[str, float]:
        """The figures that a manifest keeps."""
        return {
            "kl_mean": self.kl_mean,
            "kl_p99": float(self.kl_N.quantile(0.99)),
            "kl_max": float(self.kl_N.max()),
            "top1": float(self.same_N.double().mean()),
            "perplexity": float(self.nll_N.mean().exp()),
            "perplexity_float": float(self.nll_float_N.mean().exp()),
            "answer_tokens": len(self.kl_N),
        }


class Reference:
    """What the float model says to a calibration set; its hidden states are kept, its logits are formed when needed."""

    def __init__(self, model: Decoder, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.hidden = [answer_hidden(model, b) for b in batches]

    def compare(self, model: Decoder) -> Fidelity:
        """Another model of the same vocabulary over the same tokens."""
        return self.of(lambda i: model.logits(answer_hidden(model, self.batches[i])))

    @torch.inference_mode()
    def of(self, logits_of: Callable[[int], Tensor]) -> Fidelity:
        """The same from a function of the batch's number that gives its logits `[answers, V]`."""
        parts = []
        for i, b in enumerate(self.batches):
            row_N = b.rows_B.repeat_interleave(b.answer_BT.sum(1))
            got = logits_of(i)
            parts += [
                (*_compared(self.model.logits(self.hidden[i][at]), got[at], b.targets[at]), row_N[at])
                for at in (slice(n, n + CHUNK) for n in range(0, len(got), CHUNK))
            ]
        return Fidelity(*(torch.cat(p) for p in zip(*parts, strict=True)))


def _compared(want_NV: Tensor, got_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q = want_NV.double().log_softmax(-1), got_NV.double().log_softmax(-1)
    at = targets_N.unsqueeze(1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min_(0)  # float64 leaves -1e-17 of an exact zero
    same = want_NV.argmax(-1) == got_NV.argmax(-1)
    return kl, -q.gather(1, at).squeeze(1), -p.gather(1, at).squeeze(1), same
