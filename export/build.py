"""One export, whatever the target: write the file, read its integers back, run it, and only then let it appear.

Knows the order of proofs and what an artifact's directory holds besides the engine's file; nothing of any format
(gori.targets names the modules that do).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from gori import checkpoint, quantized
from gori.artifact import (
    LIBRARIES,
    Manifest,
    ancestry,
    content_hash,
    gate,
    library_versions,
    make,
    read_manifest,
    write_json,
)
from gori.artifact import sha256_file as sha256
from gori.console import log, peak_rss_mib
from gori.errors import GoriError
from gori.export import evidence, golden, parity
from gori.export.contents import compare, digests
from gori.export.verify import INTEGERS
from gori.export.weights import (
    Options,
    Weights,
    check_prompts,
    check_schemes,
    notes,
    packed_bytes,
    read_weights,
    resolve_lengths,
    wanted,
)
from gori.quantized import SCHEMA
from gori.runtime.eager import session_of, special_ids
from gori.runtime.session import Session, SessionInfo
from gori.targets import PARITY, Target, named
from gori.targets import target as target_row
from gori.tokenizer import SYSTEM_FILE as SYSTEM
from gori.tokenizer import copy_files

IDENTITY = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tools.json")
"""Files by which a text becomes the ids that a model was trained on, and back."""
SLACK = 1.15
"""Bytes of a file over its packed integers and scales, besides FIXED_BYTES."""
FIXED_BYTES = 100_000


@dataclass(frozen=True)
class Proof:
    """What running a file showed."""

    info: SessionInfo
    """Of the engine that ran."""
    found: parity.Parity
    golden: golden.Golden
    same_answers: int
    second: dict[str, Any] | None
    """What the engine of the target's second file gave."""
    seconds: float


def export(
    name: str,
    source: Path,
    out: Path,
    *,
    context: int | None = None,
    chunk: int | None = None,
    prompts: Sequence[Sequence[int]] = (),
    seed: int = 0,
    backend: str | None = None,
    system: str = "",
    runner: Path | None = None,
) -> dict[str, Any]:
    """Write a target's directory `out`, unless it is there already; returns the manifest's content.

    `context` is the tokens that the KV cache holds (default: the model's, 512 at most), `chunk` the tokens that one
    call takes (default 128, at most context - 1). `prompts` are token ids that are run besides random ones and the
    built-in utterances. `system` travels as system.txt and stands before every utterance; `runner`, a built gori-call,
    saves its keys and values in an ExecuTorch artifact (prefix.bin). Raises GoriError, and leaves nothing, for a scheme
    that the format does not hold, an integer that is not in the file, and logits beyond the noise floor.
    """
    row = find_row(name, backend)
    cfg = checkpoint.read_config(source)
    context, chunk = resolve_lengths(cfg, context, chunk)
    check_prompts(prompts, cfg.vocab_size, context)
    settings = {"target": name, "context": context, "chunk": chunk, "prompts": [list(p) for p in prompts]}
    settings |= {k: v for k, v in (("backend", backend), ("system", system), ("prefix", bool(runner))) if v}
    if runner and (name != "executorch" or backend):
        raise GoriError(f"a saved prefix is of the C++ runner, which runs executorch's XNNPACK files, not {name}")
    manifest = Manifest("export", name, seed, settings, {"checkpoint": content_hash(source)})
    manifest.versions = library_versions([n for n in LIBRARIES if n != "executorch"]) | library_versions(row.packages)
    manifest.lineage = ancestry({"checkpoint": source})
    bos_id, eos_ids = special_ids(source)
    options = Options(source, context, chunk, bos_id, eos_ids, backend, system, runner)

    def build(tmp: Path) -> None:
        weights = read_weights(source)
        check_schemes(weights.spec, row)
        copy_beside(source, tmp)
        if system:
            (tmp / SYSTEM).write_text(system, encoding="utf-8")
        hashes = write_and_read_back(row, weights, tmp, options, manifest)
        weights = replace(weights, integers={}, floats={})  # the reference needs the memory
        give_back()
        proof = prove(row, tmp, options, prompts, seed) if row.opener else None
        manifest.gates += gates(manifest.metrics, proof)
        if proof:
            manifest.metrics |= {"parity": proof.found.as_dict(), "parity_s": round(proof.seconds, 2)}
            golden.write(proof.golden, tmp)
        else:
            manifest.metrics |= {"parity": None, "not_run": row.stand_in}
        write_json(tmp / INTEGERS, {"schema_version": 1, "tensors": hashes})
        entry = ledger_entry(row, proof, manifest, tmp)
        write_json(tmp / PARITY, entry)
        evidence.write(tmp, weights, row, options, manifest, entry)

    make(out, manifest, build)
    return read_manifest(out)


def copy_beside(source: Path, directory: Path) -> None:
    """What travels with every engine's file: shape and schemes, tokenizer, template, generation settings, tools."""
    copy_files(source, directory)
    for name in ("config.json", SCHEMA):
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def find_row(name: str, backend: str | None) -> Target:
    """The row of a target or of a variant of ExecuTorch's; atom-max reads its variants itself."""
    if name == "executorch" and backend:
        from gori.export.executorch_backends import row

        return row(backend)
    return target_row(name)


def module(name: str, row: Target) -> ModuleType:
    """A target's writer, reader or opener; GoriError with the mend where its package is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if (e.name or "").startswith("gori"):
            raise
        raise GoriError(f"target {row.name} needs {e.name}: pip install 'gori[{row.extra}]'") from e


def write_and_read_back(row: Target, w: Weights, tmp: Path, o: Options, manifest: Manifest) -> dict[str, str]:
    """The engine's file, and what it holds, compared with the checkpoint tensor by tensor; hashes of its integers."""
    writer, reader = module(row.writer, row), module(row.reader, row)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    facts = writer.write(w, tmp, o)
    give_back()
    manifest.notes += facts.pop("notes", [])
    if not (o.source / "tokenizer.json").exists():
        manifest.notes.append(
            "no tokenizer.json: no utterance was spoken to it, and no text can be until one is beside it"
        )
    manifest.metrics |= facts
    want = wanted(w, copied_head=row.copied_head, float_bits=row.float_bits)
    compared = compare(reader.read(tmp), want, row.file)
    size, packed = size_bytes(tmp / row.file), packed_bytes(want)
    text = o.source / "tokenizer.json"
    manifest.metrics |= {
        "export_core_s": round(time.process_time() - cpu_s, 2),
        "export_wall_s": round(time.monotonic() - wall_s, 2),
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "tensors_read_back": compared,
        "file_bytes": size,
        "packed_bytes": packed,
        "text_bytes": text.stat().st_size if row.carries_tokenizer and text.exists() else 0,
    }
    manifest.notes += notes(w, want)
    log(f"{compared} tensors read back exact, {packed:,} packed → {size:,} bytes in {row.file}")
    return digests(want)


def give_back() -> None:
    """Free what is left in cycles (exporters leave graphs there) and hand freed memory back to the system, which glibc
    keeps: 300 MiB after a 100M model was lowered."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def open_artifact(row: Target, directory: Path) -> Session:
    """The engine over a written directory, on one thread, or what stands in for it here."""
    module(row.opener.partition(":")[0], row)
    return named(row.opener)(directory, 1)


def prove(row: Target, tmp: Path, o: Options, prompts: Sequence[Sequence[int]], seed: int) -> Proof:
    """Run the written file and the eager checkpoint, one after the other, and compare; GoriError beyond the floor."""
    began = time.process_time()
    spoken = golden.utterance_prompts(o.source, o.context)
    vocab_size = checkpoint.read_config(o.source).vocab_size
    random = parity.default_prompts(vocab_size, o.context, o.chunk, seed)
    runs, info, given = run_both(row, tmp, o, [*random, *spoken.values(), *map(list, prompts)], spoken)
    found, everything = parity.judge(runs), runs
    for again in range(1, parity.SETS):
        if not parity.is_close(found):
            break
        log(f"{parity.describe(found)}: close to the bound {found.kl_bound:.2e}, {len(random)} more prompts")
        random = parity.default_prompts(vocab_size, o.context, o.chunk, seed + 1000 * again)
        everything = parity.pooled(everything, run_both(row, tmp, o, random, {})[0])
        found = parity.judge(everything)
    log(parity.describe(found))
    parity.require_parity(found, row.engine)
    answers = [{"text": t, "prompt": p, "answer": given[t][1]} for t, p in spoken.items()]
    same = sum(mine == theirs for mine, theirs in given.values())
    second = golden.second_engine(row, tmp, answers)
    if second and not golden.agrees(second):
        raise GoriError(
            f"{second['engine']} gives {second['same_answers']} of {second['answers']} answers of the reference where "
            f"{row.engine} gives {same} of {len(answers)}: nothing was written; report the model's tokenizer.json"
        )
    return Proof(info, found, golden_of(runs, answers, same), same, second, time.process_time() - began)


def run_both(
    row: Target, tmp: Path, o: Options, prompts: list[list[int]], spoken: dict[str, list[int]]
) -> tuple[parity.Runs, SessionInfo, dict[str, tuple[list[int], list[int]]]]:
    """What engine and reference say to prompts, and their greedy answers to utterances. One is closed before the other
    is opened: a stand-in may need as much memory as the model."""
    session = open_artifact(row, tmp)
    info, got = session.info, parity.engine_runs(session, prompts)
    mine = {text: golden.greedy(session, prompt, o.eos_ids) for text, prompt in spoken.items()}
    del session
    give_back()
    model = quantized.load(o.source, rounding=row.activations)
    eager = session_of(model, o.source, o.context)
    given = {text: (mine[text], golden.greedy(eager, prompt, o.eos_ids)) for text, prompt in spoken.items()}
    runs = parity.join(prompts, got, parity.reference_runs(model, prompts, row.arithmetic), info)
    return runs, info, given


def golden_of(runs: parity.Runs, answers: list[dict[str, Any]], same: int) -> golden.Golden:
    """What the reference said to each prompt, and how far an engine may be from it: as far as the noise floor of the
    same prompts, measured with the same tokens kept, or twice what the engine was at home."""
    kept = runs.cut(golden.DECODED)
    want = torch.cat(kept.want).numpy()
    top, log_p = golden.distributions(want)

    def mean_kl(rows: list[torch.Tensor]) -> float:
        other = golden.log_softmax(torch.cat(rows).numpy())
        return float(golden.divergence(log_p, np.take_along_axis(other, top, -1)).mean())

    floor = max(mean_kl(run) for run in kept.noisy)
    bound = max(parity.FACTOR * floor, 2 * mean_kl(kept.got)) + parity.KL_EPSILON
    return golden.Golden([list(p) for p in runs.prompts], top, log_p, bound, same, answers)


def ledger_entry(row: Target, proof: Proof | None, manifest: Manifest, tmp: Path) -> dict[str, Any]:
    """parity.json: what `gori verify` shows of an artifact. No times: the same export gives the same bytes."""
    m, settings = manifest.metrics, manifest.settings
    ran: dict[str, Any] = {"engine": row.engine, "engine_version": "", "executed": False, "parity": None}
    if proof:
        info = proof.info
        ran |= {"engine": info.engine, "engine_version": info.engine_version, "executed": not info.stand_in}
        ran |= {"parity": m["parity"], "same_answers": proof.same_answers, "answers": len(proof.golden.answers)}
        ran["second"] = proof.second
    return {
        "schema_version": 1,
        "target": row.name,
        "file": row.file,
        "backend": settings.get("backend"),
        **ran,
        "ran": row.engine if ran["executed"] else row.stand_in,
        "activations": row.activations,
        "context": settings["context"],
        "chunk": settings["chunk"],
        "integers_identical": m["tensors_read_back"],
        "identity": identity(tmp),
        "file_bytes": m["file_bytes"],
        "packed_bytes": m["packed_bytes"],
    }


def identity(directory: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer, its template and the tools that travel with a model."""
    return {name: sha256(directory / name) for name in IDENTITY if (directory / name).exists()}


def gates(metrics: dict[str, Any], proof: Proof | None) -> list[dict[str, Any]]:
    bound = round(metrics.get("layout_bytes", metrics["packed_bytes"]) * SLACK) + FIXED_BYTES + metrics["text_bytes"]
    size = gate("file_bytes", metrics["file_bytes"], bound, at_least=False)
    if proof is None:
        return [size]
    found = proof.found
    return [
        gate("parity kl_mean", found.engine.kl_mean, found.kl_bound, at_least=False),
        gate("parity single tokens", found.single.engine_p05, found.single.bound, at_least=False),
        gate("parity longer prompts", found.longer.engine_p05, found.longer.bound, at_least=False),
        size,
    ]
