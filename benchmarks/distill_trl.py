"""A distillation step's tokens a second and peak memory against TRL's GKDTrainer: the same two models and batches.

    pip install trl==1.16.0
    python benchmarks/distill_trl.py --rounds 3

gori writes a student and a teacher as folders; TRL trains what transformers loads from them. A step is forward KL of
the teacher at the answers (TRL: beta 0, lmbda 0, so nothing is generated), both backward passes of the student and an
AdamW update, float32, one thread. Each measurement is a process of its own, the two in turn: two steps to warm up,
then --steps measured. Memory is the process' peak resident size less what it held with models and batches loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from losses import Peak, resident_bytes
from torch import Tensor

from gori import checkpoint
from gori.data import Example
from gori.distill.objective import divergence_loss
from gori.model import Decoder, ModelConfig, parameter_count
from gori.teacher.train import TrainBatch, to_tensors

WARM = 2
PAD, RATE = 0, 1e-4


def write_models(home: Path, a: argparse.Namespace) -> None:
    for name, width, layers, seed in (("student", a.width, a.layers, 0), ("teacher", 2 * a.width, 2 * a.layers, 1)):
        cfg = ModelConfig(
            kind="qwen3", vocab_size=a.vocabulary, hidden_size=width, layers=layers, heads=width // 64,
            kv_heads=width // 64, head_dim=64, intermediate_size=3 * width, max_position=4096,
        )  # fmt: skip
        (home / name).mkdir()
        checkpoint.save(Decoder(cfg).initialise(torch.Generator().manual_seed(seed)), home / name)


def rows(a: argparse.Namespace, seed: int) -> list[Example]:
    """Random tokens; the last `--answer` of each row are the answer."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, a.vocabulary, (a.rows, a.tokens), generator=g).tolist()
    return [Example(r, [False] * (a.tokens - a.answer) + [True] * a.answer) for r in ids]


def of_gori(home: Path, batches: list[TrainBatch]) -> Callable[[int], float]:
    student, teacher = checkpoint.load(home / "student").train(), checkpoint.load(home / "teacher").eval()
    loss = divergence_loss(teacher, {"forward_kl": 1.0}, 1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)

    def step(i: int) -> float:
        value, entry = loss(student, batches[i])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return entry["loss"]

    return step


def of_trl(home: Path, batches: list[TrainBatch]) -> Callable[[int], float]:
    from datasets import Dataset  # pyright: ignore
    from datasets.table import InMemoryTable  # pyright: ignore
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(home / n, dtype=torch.float32) for n in ("student", "teacher")
    )
    settings = GKDConfig(
        output_dir=str(home / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, use_cpu=True, report_to=[], bf16=False,
        gradient_checkpointing=False, learning_rate=RATE,
    )  # fmt: skip
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    # the trainer wants a data set and gets batches; with a fingerprint of its own none is made by pickling pyarrow
    data = Dataset(InMemoryTable.from_pylist([{"messages": said}]), fingerprint="one row")
    trainer = GKDTrainer(student, teacher, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(i: int) -> float:
        b = batches[i]
        labels = torch.where(b.loss_BT, b.ids_BT, torch.full_like(b.ids_BT, -100))
        inputs: dict[str, Tensor] = {"input_ids": b.ids_BT, "attention_mask": b.valid_BT.long(), "labels": labels}
        value = trainer.training_step(trainer.model, inputs, num_items_in_batch=(labels[:, 1:] != -100).sum())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return float(value)

    return step


WHO = {"gori": of_gori, "trl": of_trl}


def measure(who: str, home: Path, a: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    batches = [to_tensors(rows(a, i), PAD, torch.device("cpu")) for i in range(WARM + a.steps)]
    step = WHO[who](home, batches)
    before, peak = resident_bytes(), Peak()
    losses, spent = [], 0.0
    for i in range(WARM + a.steps):
        began = time.monotonic()
        losses.append(step(i))
        spent += (time.monotonic() - began) * (i >= WARM)
    extra = peak.end() - before
    return {"tokens_per_s": a.steps * a.rows * a.tokens / spent, "extra_bytes": extra, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one[0], Path(a.one[1]), a)))
        return
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        parser.error("trl is not installed: pip install trl==1.16.0, in an environment of its own if you like")
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), a)
        sizes = {n: parameter_count(checkpoint.load(Path(name) / n)) for n in ("student", "teacher")}
        for _ in range(a.rounds):
            for who in WHO:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", who, name]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{who} failed: {done.stderr.strip()[-2000:]}")
                found[who].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        who: {k: statistics.median(r[k] for r in f) for k in ("tokens_per_s", "extra_bytes")}
        for who, f in found.items()
    }
    print(
        f"student {sizes['student']:,} and teacher {sizes['teacher']:,} parameters, {a.vocabulary} entries, "
        f"{a.rows} rows of {a.tokens} tokens, {a.answer} of them answers; trl {version}"
    )
    print("| | tokens/s | extra MiB | loss of each step |\n|---|---|---|---|")
    for who, m in middle.items():
        losses = " ".join(f"{v:.4f}" for v in found[who][0]["losses"])
        print(f"| {who} | {m['tokens_per_s']:.0f} | {m['extra_bytes'] / 2**20:.0f} | {losses} |")
    speed, memory = (middle["gori"][k] / middle["trl"][k] for k in ("tokens_per_s", "extra_bytes"))
    print(f"gori: {speed:.2f} x the tokens a second, {memory:.2f} x the memory")
    if a.out:
        a.out.write_text(json.dumps({"trl": version, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
