"""A checkpoint's integers in the layout that optimum-rbln compiles for ATOM-Max, and all that a machine without
Rebellions' SDK can say about it.

Writes checkpoint/, reference/, compile_request.json, compile_atom_max.py and report.json. Where the SDK is installed it
compiles too; where it is not, nothing carries a compiled file's name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from gori import checkpoint
from gori.artifact import write_json
from gori.console import log
from gori.errors import GoriError
from gori.export import atom_max_checks as checks
from gori.export import atom_max_driver as driver
from gori.export import atom_max_graph as graph
from gori.export import atom_max_ops as ops
from gori.export import atom_max_plan as planning
from gori.export.atom_max_read import FACTS, SCALES
from gori.export.atom_max_run import CHECKPOINT, REFERENCE, REQUEST, checkpoint_weights
from gori.export.weights import EMBEDDING, HEAD, Options, Weights, array, linear_names

OPTIMUM_RBLN = "0.12.0"
"""The version whose loader and rules were read and run."""
PYTHON = "GORI_RBLN_PYTHON"
"""Names the interpreter of an environment with Rebellions' SDK."""
COMPILE, REPORT, COMPILED = "compile_atom_max.py", "report.json", "compiled"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
LARGEST = 65504.0
"""Of float16."""


def write(w: Weights, out: Path, o: Options) -> dict[str, Any]:
    """Write everything; what the compiler was asked for and what was checked.

    Raises GoriError, before the checks, for what optimum-rbln's layout does not hold or its rules refuse.
    """
    plan = planning.make_plan(o.context, o.chunk, o.backend)
    check_weights(w)
    load = checks.load_of(w)
    devices = planning.choose_devices(load, plan)
    eager = checks.expected(w, plan)
    write_checkpoint(w, out / CHECKPOINT, o.source)
    weights = checkpoint_weights(out / CHECKPOINT, w.cfg, plan.context)
    programs = write_graphs(w, plan, weights, out / REFERENCE)
    request = {
        "schema_version": 1,
        "optimum_rbln": OPTIMUM_RBLN,
        "checkpoint": CHECKPOINT,
        "rbln_config": plan.rbln_config(weight_type(w), devices),
    }
    write_json(out / REQUEST, request)
    shutil.copyfile(driver.__file__, out / COMPILE)
    report = {
        "schema_version": 1,
        "compiled": False,
        "executed_on_npu": False,
        "numbers": checks.numbers(w.cfg, plan, programs, weights, eager),
        "operators": checks.legality(programs),
        "rules": {"optimum_rbln": OPTIMUM_RBLN, "met": True, "rbln_config": request["rbln_config"]},
        "memory": {"label": "estimate", **planning.memory_table(load, plan)},
        "roofline": planning.roofline(load, plan, devices),
        "float16_tables": checks.rounding_of_tables(w, [n for n in (EMBEDDING, HEAD) if n in w.integers]),
        "notes": remarks(w),
    }
    if python := sdk_python():
        report["compiled_files"] = compile_with_sdk(out, python)
        report["compiled"] = True
    write_json(out / REPORT, report)
    return metrics(report, w, devices)


def metrics(report: dict[str, Any], w: Weights, devices: int) -> dict[str, Any]:
    """What the manifest repeats of the report."""
    numbers = report["numbers"]
    return {
        "compiled": report["compiled"],
        "executed_on_npu": False,
        "devices": devices,
        "layout_bytes": layout_bytes(w),
        "overflows_float16": numbers["float16"]["overflows"],
        "kl_mean_float16": numbers["float16"].get("kl_mean"),
        "kl_mean_bfloat16": numbers["bfloat16"].get("kl_mean"),
        "unknown_operators": report["operators"]["unknown"],
        "host_operators": report["operators"]["host"],
        "notes": report["notes"],
        "memory_notes": [
            "the compiler's workspace on the card, whose size is not public",
            "caches of a batch: those of one sequence are counted; report.json has the table by devices",
        ],
    }


def layout_bytes(w: Weights) -> int:
    """Bytes of what optimum-rbln's layout must hold: a byte an integer, also of four bits; two a scale and a float."""
    names = {*linear_names(w.cfg, w.head_name), EMBEDDING}
    held = sum(2 * t.numel() for n, t in w.floats.items() if n not in names or n not in w.integers)
    for name, t in w.integers.items():
        float16 = name in (EMBEDDING, HEAD)
        held += t.q.numel() * (2 if float16 else 1) + 2 * t.scale.numel()
    copied = w.head_name == EMBEDDING
    return held + 2 * copied * w.cfg.vocab_size * w.cfg.hidden_size


def projections(w: Weights) -> list[str]:
    """The seven linears of every layer, which alone may be integers on this target."""
    return linear_names(w.cfg, w.head_name)[:-1]


def check_weights(w: Weights) -> None:
    """Refuse what the loader would read as something else."""
    if w.integers and (floats := [n for n in projections(w) if n not in w.integers]):
        raise GoriError(
            f"{floats[0]} is float and others are integers, but optimum-rbln reads the projections of a quantized "
            "checkpoint as integers, every one: quantize all of them, or export the float checkpoint"
        )
    for name in projections(w):
        if name in w.integers and w.integers[name].scale.shape[1] != 1:
            group = w.integers[name].scheme.group_size
            raise GoriError(
                f"{name} has scales for groups of {group}, which optimum-rbln collapses to one a row without a word: "
                "quantize with --scheme w4a16-channel or w8a16-channel"
            )
    for name, t in carried_floats(w).items():
        largest = float(t.abs().max()) if t.numel() else 0.0
        if not largest <= LARGEST:
            raise GoriError(f"{name} holds {largest:g}, float16 ends at {LARGEST:g}: train with more weight decay")


def carried_floats(w: Weights) -> dict[str, Tensor]:
    """What the checkpoint directory holds in float16, still float32: every float, and integer tables multiplied out."""
    tables = {n: w.integers[n].dequantize() for n in (EMBEDDING, HEAD) if n in w.integers}
    return w.floats | tables


def weight_type(w: Weights) -> str | None:
    """optimum-rbln's name for the projections' integers: int4 if all have four bits, int8 if any has eight."""
    bits = {w.integers[n].scheme.bits for n in projections(w) if n in w.integers}
    return None if not bits else "int4" if bits == {4} else "int8"


def write_checkpoint(w: Weights, out: Path, source: Path) -> None:
    """The directory that the loader reads: one safetensors file, config.json, the tokenizer's files; and beside them
    what it ignores and gori's reader needs, the bits of each tensor and the scales of integer tables."""
    out.mkdir()
    tensors = {n: t.half() for n, t in carried_floats(w).items()}
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    for name in projections(w):
        if name in w.integers:
            t = w.integers[name]
            tensors[name], tensors[f"{name}_scale"] = t.q.contiguous(), t.scale.half().contiguous()
    checkpoint.write_tensors(dict(sorted(tensors.items())), out / checkpoint.WEIGHTS)
    cfg = replace(w.cfg, tied=w.head_name == EMBEDDING)
    write_json(out / "config.json", checkpoint.config_to_hf(cfg) | {"dtype": "float16"})
    bits = {n: t.scheme.bits for n, t in sorted(w.integers.items())}
    write_json(out / FACTS, {"schema_version": 1, "bits": bits})
    for name, file in SCALES.items():
        if name in w.integers:
            np.save(out / file, array(w.integers[name].scale.half()))
    for file in TOKENIZER:
        if (source / file).exists():
            shutil.copyfile(source / file, out / file)


def write_graphs(w: Weights, plan: planning.Plan, weights: dict[str, Tensor], out: Path) -> dict[int, ExportedProgram]:
    """Prefill (0), decode of one sequence (1), and of each batch size asked for: two at least, so that a batch is
    checked in any case."""
    out.mkdir()
    sizes = sorted({1, *plan.batches} | ({2} if plan.batch < 2 else set()))
    cfg = replace(w.cfg, tied=w.head_name == EMBEDDING)
    programs = {0: graph.export_graph(cfg, plan, weights, sizes[-1], None)}
    graph.save_graph(programs[0], out / "prefill.pt2")
    for n in sizes:
        programs[n] = graph.export_graph(cfg, plan, weights, sizes[-1], n)
        graph.save_graph(programs[n], out / f"decode_b{n}.pt2")
    log(f"reference graphs: prefill of {plan.chunk}, decode of {', '.join(map(str, sizes))}")
    return programs


def remarks(w: Weights) -> list[str]:
    """What a reader of the report must know."""
    found = ["nothing here ran on an NPU; reference graphs are evidence about numbers, not the compiler's input"]
    if w.head_name == EMBEDDING:
        found.append("the tied table is there twice: optimum-rbln does not tie the head of a quantized checkpoint")
    tables = [n for n in (EMBEDDING, HEAD) if n in w.integers]
    if tables:
        found.append(
            f"{', '.join(tables)}: held as float16 products of integer and scale, since optimum-rbln keeps table and "
            "head float; the integers follow from these and the scales beside"
        )
    schemes = [w.integers[n].scheme for n in projections(w) if n in w.integers]
    if any(s.activation_bits == 8 for s in schemes):
        found.append("activations stay 16-bit floats: the scheme's 8 bits are not applied on this target")
    if {s.bits for s in schemes} == {4, 8}:
        found.append("projections of 4 bits travel as int8 beside those of 8: the compiler takes one type for all")
    return found


def sdk_python() -> str | None:
    """The interpreter that has Rebellions' SDK: the one that PYTHON names, this one, or none.

    optimum-rbln pins a transformers that gori does not support, so it is mostly another.
    """
    return os.environ.get(PYTHON) or (sys.executable if ops.sdk_present() else None)


def compile_with_sdk(out: Path, python: str) -> list[str]:
    """Run compile_atom_max.py in a process of its own; the files that it wrote."""
    log(f"compiling with Rebellions' SDK in {python}")
    command = [python, str(out / COMPILE), "--out", str(out / COMPILED)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise GoriError(f"{PYTHON} names {python}, which does not run ({e}): name the SDK's interpreter") from e
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise GoriError(
            f"compiling for ATOM-Max failed with exit {run.returncode} ({last}): nothing was written; check "
            "rebel-compiler's version against docs/atom-max.md"
        )
    return sorted(p.name for p in (out / COMPILED).iterdir())
