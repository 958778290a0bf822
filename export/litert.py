"""A checkpoint's integers to one .tflite for LiteRT, and to a .litertlm where the checkpoint has a tokenizer.

Knows what is written and what a runtime must be told; the graph, the file format and the bundle are files of their own.
No converter is involved: nothing is traced, and nothing is quantized here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gori.console import log
from gori.export.litert_bundle import load_builder, write_bundle
from gori.export.litert_bundle_read import BUNDLE
from gori.export.litert_graph import build
from gori.export.litert_weights import Kernels, dequantized_values
from gori.export.weights import Options, Weights
from gori.runtime.litert import METADATA, MODEL


def check() -> None:
    """MissingEngine unless what writes a .litertlm is here; a .tflite's writer is imported above."""
    load_builder()


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.tflite and, if a tokenizer.json travels with the checkpoint, model.litertlm."""
    metrics = write_tflite(w, out, o, Kernels.LITERT)
    if (o.source / "tokenizer.json").exists():
        metrics["litertlm_bytes"] = write_bundle(out, o)
        log(f"{BUNDLE}: {metrics['litertlm_bytes']:,} bytes, the same model with its tokenizer and template")
    return metrics


def write_tflite(w: Weights, out: Path, o: Options, kernels: Kernels) -> dict[str, Any]:
    """Write model.tflite for the kernels of one runtime."""
    file = build(w, o.context, o.chunk, kernels)
    facts = {
        "runtime": kernels.value,
        "vocab_size": w.cfg.vocab_size,
        "context": o.context,
        "chunk": o.chunk,
        "bos_id": o.bos_id,
        "eos_ids": list(o.eos_ids),
    }
    file.metadata(METADATA, json.dumps(facts, sort_keys=True).encode())
    names = [s.name for s in file.signatures]
    size = file.write(out / MODEL, "gori")
    log(f"{MODEL}: {size:,} bytes, signatures {', '.join(names)}")
    return {"signatures": names, "memory_notes": memory_notes(w, o, kernels, len(names))}


def memory_notes(w: Weights, o: Options, kernels: Kernels, signatures: int) -> list[str]:
    """What a process that runs the file needs besides the file and one set of caches, bytes where they are known."""
    cfg, floats = w.cfg, 4 * dequantized_values(w, kernels)
    row = 4 * cfg.kv_heads * cfg.head_dim
    caches, longest = 2 * cfg.layers * row * o.context, row * (o.context + o.chunk - 1)
    copies = f"the KV cache once more, as output ({caches:,} bytes)"
    if kernels is Kernels.LEGACY:
        copies = f"the KV cache as in- and output of {signatures} signatures and in the worker, {caches:,} bytes each"
    notes = [copies]
    if o.chunk > 1:
        notes.append(f"each cache with {o.chunk - 1} spare rows while a prefill runs ({longest:,} bytes a cache)")
    if floats:
        notes.append(f"float32 of dequantized linears in each of {signatures} signatures (up to {floats:,} bytes each)")
    if kernels is Kernels.LITERT:
        notes.append("the copy of linears that XNNPACK packs, dequantized ones as float32")
    return notes
