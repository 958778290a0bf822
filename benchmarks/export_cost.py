"""What an export of a random student costs, target by target: core-seconds, peak memory, bytes over packed bytes.

Each export is a process of its own, the `gori export` that a user runs, parity check included; figures are the
system's own counts for that process (its children too) and the manifest's.

    python benchmarks/export_cost.py --out /tmp/cost                 # 100M: 12 layers, width 768, vocabulary 32,000
    python benchmarks/export_cost.py --out /tmp/cost --target gguf --scheme w8a8-channel --vocab 164000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from gori import checkpoint
from gori.artifact import write_json
from gori.model import Decoder, ModelConfig, parameter_count
from gori.quantize.stage import quantize
from gori.targets import TARGETS

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="default: all")
    parser.add_argument("--scheme", default="w4a8-g32", help="atom-max and tflite take w8a8-channel")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    a = parser.parse_args()
    targets = a.target or [*TARGETS]
    student, floats = random_student(a.out / f"student-{a.hidden}x{a.layers}-{a.vocab}", a.layers, a.hidden, a.vocab)
    print(f"float weights {floats / MIB:,.0f} MiB; 3 times that is {3 * floats / MIB:,.0f}")
    print("| target | scheme | file, core-s | whole process, core-s | peak RSS MiB | × floats | bytes | × packed |")
    print("|---|---|---|---|---|---|---|---|")
    for name in targets:
        scheme = a.scheme if a.scheme in TARGETS[name].linears else "w8a8-channel"
        source = a.out / f"{student.name}-{scheme}"
        quantize(student, scheme, None, "rtn", source)
        print(cost(name, scheme, source, a.out / f"{source.name}-{name}", floats), flush=True)


def random_student(out: Path, layers: int, hidden: int, vocab: int) -> tuple[Path, int]:
    """A Llama with random weights, and the bytes of its weights in float32."""
    heads = hidden // 64
    cfg = ModelConfig(
        kind="llama", vocab_size=vocab, hidden_size=hidden, layers=layers, heads=heads,
        kv_heads=max(1, heads // 3), head_dim=64, intermediate_size=hidden * 8 // 3 // 64 * 64, max_position=2048,
    )  # fmt: skip
    model = Decoder(cfg).initialise(torch.Generator().manual_seed(0))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(model, out)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2]})
    return out, 4 * parameter_count(model)


def cost(target: str, scheme: str, source: Path, out: Path, floats: int) -> str:
    """One row, of a fresh process."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    command = [sys.executable, "-m", "gori", "export", str(source), "--target", target, "--out", str(out), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        return f"| {target} | {scheme} | failed with {status} | | | | | |"
    m = json.loads(said)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"| {target} | {scheme} | {m['export_core_s']} | {usage.ru_utime + usage.ru_stime:.1f} | {peak / MIB:,.0f} | "
        f"{peak / floats:.2f} | {m['file_bytes']:,} | {m['file_bytes'] / m['packed_bytes']:.3f} |"
    )


if __name__ == "__main__":
    main()
