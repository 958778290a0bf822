"""A checkpoint's integers to one .pte for XNNPACK.

Knows which graph is lowered and what a runner must be told; the graph, its lowering and the reader are files of their
own, the proof that the file computes what the checkpoint does is gori.export.build's. Nothing is quantized here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from gori.console import log
from gori.errors import GoriError, one_line
from gori.export import runner_file
from gori.export.executorch_warnings import upstream_warnings
from gori.export.weights import Options, Weights, linear_names

PTE = "model.pte"


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Lower and write model.pte, and runner.bin for the C++ runner; which linears XNNPACK took.

    Raises GoriError, and writes nothing, for a linear that it did not take.
    """
    load_exporter()
    with upstream_warnings():
        from gori.export.executorch_graph import ROWS, Graph
        from gori.export.executorch_lower import lower

        log(f"lowering {w.cfg.layers} layers for XNNPACK")
        rows = min(ROWS, o.chunk)
        told = metadata(w, o) | {"get_logits_rows": rows}
        lowered = lower(Graph(w, o.context).eval(), o.chunk, told, rows)
    (out / PTE).write_bytes(lowered.pte)
    count = len(linear_names(w.cfg, w.head_name))
    log(f"{len(lowered.delegated)}/{count} linears delegated")
    facts: dict[str, Any] = {
        "delegated_linears": len(lowered.delegated),
        "linears": count,
        "planned_bytes": lowered.planned_bytes,
    }
    if (o.source / "tokenizer.json").exists():
        why_not = runner_file.write(o.source, out, o.system)
        facts["notes"] = [why_not] if why_not else []
    else:  # the export's driver says so in the manifest
        why_not = "no tokenizer"
    if o.runner:
        if why_not:
            raise GoriError(f"no prefix can be saved: {why_not}")
        save_prefix(o.runner, out)
    return facts


def save_prefix(runner: Path, directory: Path) -> None:
    """Have the C++ runner compute what stands before every utterance, and keep its keys and values as prefix.bin."""
    command = [str(runner), str(directory), "--save-prefix", str(directory / "prefix.bin")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise GoriError(f"{runner} does not run ({e.strerror}): `make runner` builds build/gori-call") from e
    if done.returncode:
        raise GoriError(f"{runner} saved no prefix: {one_line(RuntimeError(done.stderr))}")


def load_exporter() -> None:
    """Import what lowers; GoriError if the wheel is missing."""
    try:
        with upstream_warnings():
            from gori.export import executorch_graph  # noqa: F401
    except ImportError as e:
        raise GoriError("exporting to ExecuTorch needs its wheel: pip install 'gori[executorch]'") from e


def metadata(w: Weights, o: Options) -> dict[str, int | bool | list[int]]:
    """The constant methods by which ExecuTorch's runners, and gori's, know a decoder."""
    return {
        "get_vocab_size": w.cfg.vocab_size,
        "get_max_context_len": o.context,
        "get_max_seq_len": o.chunk,
        "get_bos_id": -1 if o.bos_id is None else o.bos_id,
        "get_eos_ids": list(o.eos_ids),
        "get_n_layers": w.cfg.layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
