"""A checkpoint's integers to one .tflite for LiteRT, and to a .litertlm where the checkpoint has a tokenizer.

Knows what is written and what a runtime must be told; the graph, the file format and the bundle are files of their own.
No converter is involved: nothing is traced, and nothing is quantized here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gori.console import log
from gori.export.litert_bundle import write_bundle
from gori.export.litert_graph import build
from gori.export.litert_read import BUNDLE
from gori.export.litert_weights import Kernels
from gori.export.weights import Options, Weights
from gori.runtime.litert import METADATA, MODEL


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write model.tflite, and model.litertlm if a tokenizer.json travels with the checkpoint."""
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
    return {"signatures": names}
