"""Floating-point operations of a training step, and what GPUs could do: model FLOPs utilisation (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): forward plus twice that backward, attention as its full square,
active experts alone, nothing for what is computed again. Of the last block's MLP and of the head, the positions that
predict an answer, as the decoder computes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gori.data import Example
from gori.model import ModelConfig

PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0,
    "L4": 121.0, "RTX 4090": 165.0,
}  # fmt: skip
"""Dense bf16 TFLOP/s of the vendor's data sheets; the first whose words are all in a GPU's name is taken."""


def peak_tflops(gpu: str) -> float | None:
    """Of a GPU by the name that torch.cuda.get_device_name gives; None where the table has none."""
    words = gpu.replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if all(w in words for w in name.split())), None)


def training_flops(cfg: ModelConfig, rows: Sequence[Example]) -> float:
    """Of one step on all of `rows`."""
    inputs = np.array([len(e.ids) - 1 for e in rows], np.float64)
    answers = sum(int(np.count_nonzero(e.loss[1:])) for e in rows)
    D, width = cfg.hidden_size, cfg.heads * cfg.head_dim
    qkv = D * (width + 2 * cfg.kv_heads * cfg.head_dim)
    mlp = 3 * D * cfg.intermediate_size * max(1, cfg.experts_per_token) + D * cfg.experts
    after = width * D + mlp
    matrices = inputs.sum() * (cfg.layers * qkv + (cfg.layers - 1) * after) + answers * (after + D * cfg.vocab_size)
    attention = 2 * cfg.layers * width * np.square(inputs).sum()
    return float(3 * 2 * (matrices + attention))
