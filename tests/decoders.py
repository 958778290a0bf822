"""Random decoders for tests."""

from __future__ import annotations

import torch

from gori.data import Example
from gori.model import Decoder, ModelConfig
from gori.quantize.calibration import Batch, of_examples


def random_decoder(cfg: ModelConfig, seed: int = 0) -> Decoder:
    """Random weights; norms and biases off their defaults, so that leaving one out shows."""
    g = torch.Generator().manual_seed(seed)
    model = Decoder(cfg).initialise(g).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def batches(vocab: int, seed: int = 0, rows: int = 12) -> list[Batch]:
    """Rows of random tokens, the first five of each a prompt."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in range(rows):
        ids = torch.randint(0, vocab, (10 + n % 5,), generator=g).tolist()
        found.append(Example(ids, [False] * 5 + [True] * (len(ids) - 5)))
    return of_examples(found, pad=0, batch_tokens=60).batches
