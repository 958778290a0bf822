"""Random decoders for tests."""

from __future__ import annotations

import torch

from gori.model import Decoder, ModelConfig


def random_decoder(cfg: ModelConfig, seed: int = 0) -> Decoder:
    """Random weights; norms and biases off their defaults, so that leaving one out shows."""
    g = torch.Generator().manual_seed(seed)
    model = Decoder(cfg).initialise(g).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model
