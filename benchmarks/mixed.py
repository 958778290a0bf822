"""Mixed precision by sensitivity against a uniform scheme and against first-and-last-wide, at equal bytes.

    python benchmarks/mixed.py CHECKPOINT --scheme w4a16-g32 --wide w8a16-g32

`first and last wide` holds the first and the last block in the wide scheme, all else in the narrow one; the mix gets
the same number of bytes. Then the mix gets the bytes of the uniform scheme. KL on test rows, with 95 % intervals over
rows; `--method` rounds all of them alike.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gori import checkpoint, quantized
from gori.model import Decoder
from gori.quantize import calibration
from gori.quantize.fidelity import Reference
from gori.quantize.layout import layout, mixed, weight_of
from gori.quantize.methods import function
from gori.quantize.mix import Mix, mixed_layout
from gori.quantize.schemes import EMBEDDINGS, SCHEMES
from gori.quantize.stage import frozen, with_floats
from gori.quantized import EMBEDDING, HEAD, Quantization, packed_bytes
from gori.statistics import mean_interval
from gori.tokenizer import Tokenizer


def size_bytes(model: Decoder, spec: Quantization) -> int:
    return sum(packed_bytes(weight_of(model, n).shape, s) for n, s in spec.tensors.items())


def first_and_last_wide(model: Decoder, uniform: Quantization, wide: str) -> Quantization:
    ends = ("model.layers.0.", f"model.layers.{len(model.layers) - 1}.")
    return mixed(
        model, "ends wide", {n: SCHEMES[wide] if n.startswith(ends) else s for n, s in uniform.tensors.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scheme", default="w4a16-g32")
    parser.add_argument("--wide", default="w8a16-g32")
    parser.add_argument("--choices", default="w4a16-g32,w4a16-g64,w4a16-g128,w5a16-g32,w8a16-g32,w8a16-channel")
    parser.add_argument("--embedding", default="w8-channel", help="the same in all, with the head apart")
    parser.add_argument("--method", default="gptq", choices=["mse", "gptq"])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--mix-rows", type=int, default=64)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = frozen(checkpoint.load(a.checkpoint, mapped=True)), Tokenizer.load(a.checkpoint)
    files, longest = calibration.beside(a.checkpoint), model.cfg.max_position
    train, test = (calibration.read_rows(files[k], files["tools"][0]) for k in ("train", "test"))
    seen = calibration.sample(train, tokenizer, 256, longest).batches
    reference = Reference(model, calibration.sample(test, tokenizer, a.rows, longest, seed=1).batches)
    lines = []

    def measure(label: str, spec: Quantization) -> None:
        extra = {"batches": seen} if a.method == "gptq" else {}
        tensors = function(a.method)(model, spec=spec, **extra)
        found = reference.compare(quantized.apply(with_floats(model, {}), tensors, spec))
        sums = np.bincount(found.rows_N.numpy(), weights=found.kl_N.numpy())
        low, high = mean_interval(sums, np.bincount(found.rows_N.numpy())) or (0.0, 0.0)
        line = {"layout": label, "bytes": size_bytes(model, spec), "kl_mean": found.kl_mean, "low": low, "high": high}
        lines.append(line)
        print(f"{label:<42}{line['bytes']:>12,} bytes  KL {found.kl_mean:.2e} [{low:.2e}, {high:.2e}]", flush=True)

    assert EMBEDDINGS[a.embedding] is not None
    uniform = layout(model, a.scheme, a.embedding)
    wide = first_and_last_wide(model, uniform, a.wide)
    mix = Mix(tuple(a.choices.split(",")), (a.embedding,), rows=a.mix_rows, copied_head=True)
    # the table is the same in all: a shared one is left out by counting it twice and by asking for a head apart
    for label, spec in (("uniform", uniform), ("first and last wide", wide)):
        assert {EMBEDDING, HEAD} <= set(spec.tensors)
        measure(label, spec)
        chosen, _ = mixed_layout(model, replace(mix, size_bytes=size_bytes(model, spec)), seen)
        measure(f"by sensitivity, bytes of {label}", chosen)
    if a.out:
        a.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
