"""Speed of training: two ranks of one thread against one, in turn, and a GPU's utilisation on a mixture of experts.

    python benchmarks/ranks.py ranks --rounds 3        # tokens/s of 1 and 2 processes; leave two cores idle
    python benchmarks/ranks.py mfu --compile           # one GPU; torchrun --nproc-per-node N … for several

Both train the project's own loop on random tokens, every token predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gori.data import Example
from gori.model import Decoder, ModelConfig, parameter_count
from gori.ranks import current, joined
from gori.teacher.journal import peak_flops
from gori.teacher.stage import answer_loss
from gori.teacher.train import TrainSettings, fit

WARM = 3
"""First steps that are not counted."""

SIZES = {
    "hidden": (256, 1024), "layers": (4, 16), "experts": (8, 24), "experts-per-token": (2, 2),
    "expert-width": (128, 512), "sequence": (256, 2048), "vocabulary": (4096, 32768), "batch-tokens": (8192, 131072),
    "steps": (8, 20), "accumulate": (1, 4), "expert-parallel": (1, 1), "rounds": (3, 1),
}  # fmt: skip
"""Defaults for two CPU ranks, and for a GPU: there 0.7 billion parameters, 32,768 tokens at once."""


def decoder(a: argparse.Namespace) -> ModelConfig:
    """Heads of 64, a quarter as many keys and values."""
    heads = max(1, a.hidden // 64)
    return ModelConfig(
        kind="qwen3_moe", vocab_size=a.vocabulary, hidden_size=a.hidden, layers=a.layers, heads=heads,
        kv_heads=max(1, heads // 4), head_dim=64, intermediate_size=a.expert_width,
        experts=a.experts, experts_per_token=a.experts_per_token, max_position=a.sequence,
    )  # fmt: skip


def measure(a: argparse.Namespace) -> dict[str, float]:
    """Median speed of a short training; every rank calls it."""
    cfg = decoder(a)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, (64, a.sequence + 1))
    rows = [Example(row, np.ones(len(row), bool)) for row in ids]
    found: list[dict[str, float]] = []
    settings = TrainSettings(
        a.steps + WARM, a.batch_tokens + a.batch_tokens // a.sequence, 1e-3, 1e-3, checkpoint_every_s=1e9,
        compile=a.compile, recompute=a.recompute, accumulate=a.accumulate, expert_parallel=a.expert_parallel,
    )  # fmt: skip
    model = Decoder(cfg).initialise(torch.Generator().manual_seed(0))
    if torch.cuda.is_available() and current().world == 1:
        model.cuda()

    def examples(_: int) -> Sequence[Example]:
        return rows

    with tempfile.TemporaryDirectory() as state:
        fit(
            model, examples, answer_loss(0.01, a.compile), settings, seed=0, pad=0, label="benchmark",
            evaluate=lambda _: {}, state=Path(state) / "x", fingerprint="", record=found.append,
        )  # fmt: skip
    counted = found[WARM:]
    peak, _ = peak_flops(a.peak_tflops)
    speeds = {
        "loss": counted[-1]["loss"],
        "tokens_per_second": statistics.median(e["tokens"] / e["seconds"] for e in counted),
    }
    if peak:
        speeds["mfu"] = statistics.median(e["flops"] / e["seconds"] for e in counted) / peak
    if torch.cuda.is_available():
        speeds["median_step_seconds"] = statistics.median(e["seconds"] for e in counted)
        speeds["peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
    return {"ranks": current().world, "parameters": parameter_count(model), **speeds}


def in_turn(a: argparse.Namespace) -> None:
    """One rank, two ranks, one rank, …, each in processes of its own with one thread."""
    command = [sys.executable, __file__, "work", *sys.argv[2:]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command[1:]]
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for i in range(a.rounds):
        for ranks, started in ((1, command), (2, torchrun)):
            done = subprocess.run(
                started, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            speeds[ranks].append(json.loads(done.stdout)["tokens_per_second"])
            print(f"round {i + 1}: {ranks} ranks {speeds[ranks][-1]:,.0f} tokens/s", file=sys.stderr)
    shares = [two / one / 2 for one, two in zip(speeds[1], speeds[2], strict=True)]
    print(json.dumps({"tokens_per_second": speeds, "share_of_linear": shares, "median": statistics.median(shares)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranks", "mfu", "work"), help="work: one measurement, which ranks starts")
    large = len(sys.argv) > 1 and sys.argv[1] == "mfu"
    for name, sizes in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=sizes[large])
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    a = parser.parse_args()
    if a.what == "ranks":
        return in_turn(a)
    if a.what == "mfu" and not torch.cuda.is_available():
        sys.exit("ranks.py mfu needs a GPU, and torch sees none here")
    with joined() as me:
        found = measure(a)
        if me.first:
            print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
