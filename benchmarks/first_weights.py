"""What a student's first weights alone are worth: its loss before any training, by shape and by how they were taken.

    python benchmarks/distillation.py --task incar --settings few --seeds 1 --variants "teacher,dense teacher" --out OUT
    python benchmarks/first_weights.py OUT
    python benchmarks/first_weights.py --cost 768,32,512,2048

OUT/base then has a mixture of experts and a dense teacher of the same active parameters. Cross-entropy, nats a token,
of the dev rows' answers; nothing is drawn, so there is one figure for each. Prints a Markdown table. --cost has random
weights: core-seconds and memory of one layer, for shapes as they are in large models.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gori import checkpoint, console, corpus
from gori.data import encode
from gori.distill.depth import loss_of
from gori.distill.initialise import from_teacher
from gori.distill.stage import TOKENS_A_NEURON, calibration
from gori.model import Decoder, ModelConfig
from gori.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "144 neurons": {"intermediate_size": 144},
    "48 neurons": {"intermediate_size": 48},
    "3 of 4 layers": {"layers": 3, "intermediate_size": 144},
    "2 of 4 layers": {"layers": 2, "intermediate_size": 144},
    "3 of 4 heads": {"heads": 3, "kv_heads": 3, "intermediate_size": 144},
    "width 96 of 128": {"hidden_size": 96, "tied": False, "intermediate_size": 144},
    "3 layers, 3 heads, 48 neurons": {"layers": 3, "heads": 3, "kv_heads": 3, "intermediate_size": 48},
}
WAYS: dict[str, dict[str, Any]] = {
    "experts selected": {"how": "select", "fit": False},
    "selected, fitted": {"how": "select"},
    "neurons of all": {"fit": False},
    "neurons, fitted": {},
}
DENSE: dict[str, dict[str, Any]] = {"as they are": {"fit": False}, "fitted": {}}
PCA: dict[str, dict[str, Any]] = {"pca": {"width": "pca", "fit": False}, "pca, fitted": {"width": "pca"}}


def cost(hidden: int, experts: int, each: int, neurons: int) -> None:
    """Take one layer of a mixture on one thread; its calibration is as long as a recipe's."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        kind="qwen3_moe", vocab_size=8192, hidden_size=hidden, layers=1, heads=hidden // 64, kv_heads=hidden // 128,
        head_dim=64, intermediate_size=each, experts=experts, experts_per_token=4, max_position=512, tied=False,
    )  # fmt: skip
    teacher = Decoder(cfg).eval()
    dense = replace(cfg, kind="qwen3", intermediate_size=neurons, experts=0, experts_per_token=0)
    student = Decoder(dense).eval()
    ids = [torch.randint(0, cfg.vocab_size, (8, 256)) for _ in range(TOKENS_A_NEURON * neurons // 2048)]
    before, began = console.peak_rss_mib(), time.process_time()
    from_teacher(student, teacher, ids)
    spent = time.process_time() - began
    print(
        f"{neurons} neurons of {experts} experts of {each}, width {hidden}: {spent:.0f} core-s a layer, "
        f"{console.peak_rss_mib() - before:.0f} MiB more than the models"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder that benchmarks/distillation.py wrote")
    parser.add_argument("--data", type=Path, help="folder of dev.jsonl and tools.json, by default OUT/base/data")
    parser.add_argument("--cost", metavar="WIDTH,EXPERTS,NEURONS OF ONE,STUDENT'S NEURONS")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.cost:
        cost(*map(int, a.cost.split(",")))
        return
    if a.out is None:
        parser.error("say which folder benchmarks/distillation.py wrote, or --cost")
    data = a.data or a.out / "base" / "data"
    tokenizer = Tokenizer.load(a.out / "base" / "tokenizer")
    rows = corpus.read(a.out / "few" / "train.jsonl", data / "dev.jsonl", [data / "dev.jsonl"], data / "tools.json")
    sample = calibration(rows.train, tokenizer, 144)
    held = [encode(c, tokenizer) for c in rows.dev]
    dev = [torch.tensor([e.ids]) for e in held], [torch.tensor([e.loss]) for e in held]
    for name, ways in (("teacher", WAYS), ("dense-teacher", DENSE)):
        teacher = checkpoint.load(a.out / "base" / name).eval()
        columns = [*ways, *PCA]
        print(f"\n{name}: {loss_of(teacher, *dev):.3f}\n\n| student | {' | '.join(columns)} |")
        print("|---|" + "---|" * len(columns))
        for label, shape in SHAPES.items():
            cells = {}
            for how, way in {**ways, **({} if shape.get("tied", True) else PCA)}.items():
                began = time.monotonic()
                cfg = replace(teacher.cfg, kind="qwen3", experts=0, experts_per_token=0, **shape)
                student = Decoder(cfg).eval()
                from_teacher(student, teacher, sample.ids, answers=sample.answers, **way)
                cells[how] = f"{loss_of(student, *dev):.3f}"
                console.log(f"{name}, {label}, {how}: {cells[how]} after {time.monotonic() - began:.1f} s")
            print(f"| {label} | {' | '.join(cells.get(c, '') for c in columns)} |", flush=True)


if __name__ == "__main__":
    main()
