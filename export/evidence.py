"""Papers that travel with an exported model: a CycloneDX ML-BOM, a static memory table and a model card.

They gather what the export measured and where the model came from. They are evidence for somebody's assessment and
claim no compliance with any regulation. No times are in them: the same export writes the same bytes.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import gori
from gori.artifact import Manifest, hash_files, sha256_json, write_json
from gori.export.weights import Options, Weights
from gori.targets import Target

BOM, MEMORY, CARD = "bom.cdx.json", "memory.json", "MODEL_CARD.md"
NO_CLAIM = "Evidence from one export. It claims no compliance with any standard or regulation."


def write(directory: Path, w: Weights, row: Target, o: Options, manifest: Manifest, entry: dict[str, Any]) -> None:
    """The three papers into an artifact's directory; `entry` is its parity.json."""
    table = memory(w, row, o, manifest.metrics)
    write_json(directory / MEMORY, table)
    (directory / CARD).write_text(card(w, row, o, manifest, entry, table), encoding="utf-8")
    write_json(directory / BOM, bom(directory, w, row, manifest))


def memory(w: Weights, row: Target, o: Options, metrics: dict[str, Any]) -> dict[str, Any]:
    """What a process needs for this model, by part, in bytes: from the file, the shapes and, where the writer knows it,
    the engine's own plan (`planned_bytes` of its metrics). Nothing is measured here."""
    width = 2 if row.arithmetic == "float16" else 4
    cfg, planned = w.cfg, metrics.get("planned_bytes")
    cache = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * o.context * width
    parts = {"file": metrics["file_bytes"], "kv_cache": cache}
    parts["activations" if planned else "logits"] = planned - cache if planned else cfg.vocab_size * width
    missing = [*([] if planned else ["activations"]), "the engine's own code and heap"]
    missing += metrics.get("memory_notes", ["copies of weights that it packs at loading"])
    missing += ["the tokenizer"]
    return {
        "schema_version": 1,
        "context": o.context,
        "chunk": o.chunk,
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "not_counted": ", ".join(missing),
    }


def card(w: Weights, row: Target, o: Options, manifest: Manifest, entry: dict[str, Any], table: dict[str, Any]) -> str:
    """A page for a reader who has only this directory."""
    cfg, m = w.cfg, manifest.metrics
    found = m["parity"]
    measured = [f"| KL to the checkpoint | not measured: {m.get('not_run')} |"]
    if found:
        got = found["engine"]
        measured = [
            f"| KL to the checkpoint | mean {got['kl_mean']:.2e}, max {got['kl_max']:.2e} nats; "
            f"noise floor {found['floor']['kl_mean']:.2e} |",
            f"| same first choice | {got['top1']:.2%} of {got['positions']} positions |",
        ]
    scheme = f"{w.spec.scheme}, embedding {w.spec.embedding}, method {w.spec.method}" if w.spec else "float32"
    ran = f"{entry['ran']}, the engine itself" if entry["executed"] else entry["ran"]
    lines = [
        f"# {row.file}: a {cfg.kind} decoder for {row.engine}",
        "",
        NO_CLAIM,
        "",
        "| | |",
        "|---|---|",
        f"| shape | {cfg.layers} layers, width {cfg.hidden_size}, {cfg.heads} heads ({cfg.kv_heads} key/value), "
        f"MLP {cfg.intermediate_size}, vocabulary {cfg.vocab_size} |",
        f"| weights | {scheme} |",
        f"| context, longest call | {o.context}, {o.chunk} tokens |",
        f"| file | {m['file_bytes']:,} bytes; integers and scales {m['packed_bytes']:,} |",
        f"| memory by shape | {table['total_bytes']:,} bytes ({MEMORY}) |",
        f"| integers read back | {m['tensors_read_back']} tensors, all identical to the checkpoint's |",
        f"| run by | {ran} |",
        *measured,
        f"| made with | gori {gori.__version__}, "
        + ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items()) if k != "gori")
        + " |",
        "",
        "## Where it came from",
        "",
        *([f"- {_origin(entry)}" for entry in manifest.lineage] or ["- a folder that gori did not make"]),
        f"- checkpoint, SHA-256 over its files: `{manifest.inputs['checkpoint']}`",
        "",
        "## What to know",
        "",
        *([] if entry["executed"] else [f"- not run on the device: {entry['ran']}"]),
        *[f"- {note}" for note in manifest.notes],
        "- What it was trained for and how well it does is not known to an export: see the training run's report.",
        "",
    ]
    return "\n".join(lines)


def _origin(entry: dict[str, Any]) -> str:
    inputs = ", ".join(f"{k} `{v[:12]}…`" for k, v in entry["inputs"].items())
    made = f"{entry['stage']} {entry['name']}, seed {entry['seed']}, content `{entry['content'][:12]}…`"
    return f"{made}, from {inputs}" if inputs else made


def bom(directory: Path, w: Weights, row: Target, manifest: Manifest) -> dict[str, Any]:
    """CycloneDX 1.6 of the model, its files, the stages and data behind it, and the libraries that made it."""
    files = hash_files(directory)
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": row.file,
        "version": manifest.inputs["checkpoint"][:16],
        "description": f"a {w.cfg.kind} decoder exported by gori for {row.engine}; {NO_CLAIM}",
        "hashes": [{"alg": "SHA-256", "content": sha256_json({k: v["sha256"] for k, v in files.items()})}],
        "modelCard": _model_card(w, manifest),
    }
    parts = [_file(name, facts) for name, facts in files.items()]
    data = [_data(label, value) for label, value in _data_hashes(manifest).items()]
    stages = [_stage(entry) for entry in manifest.lineage]
    libraries = [_library(name, version) for name, version in sorted(manifest.versions.items())]
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {"components": [{"type": "application", "name": "gori", "version": gori.__version__}]},
        },
        "components": [*parts, *data, *stages, *libraries],
        "dependencies": [{"ref": "model", "dependsOn": sorted(c["bom-ref"] for c in [*parts, *data, *stages])}],
    }
    return {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, sha256_json(body))}", **body}


def _model_card(w: Weights, manifest: Manifest) -> dict[str, Any]:
    found = manifest.metrics["parity"]
    figures: dict[str, float] = {}
    if found:
        got = found["engine"]
        figures = {"KL to the checkpoint, mean nats": got["kl_mean"], "same first choice": got["top1"]}
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": w.cfg.kind,
        },
        "quantitativeAnalysis": {"performanceMetrics": [{"type": k, "value": f"{v:.6g}"} for k, v in figures.items()]},
    }


def _file(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": facts["sha256"]}],
    }


def _data_hashes(manifest: Manifest) -> dict[str, str]:
    """Files of data by label, from every stage behind the model."""
    stages = {entry["as"] for entry in manifest.lineage} | {"checkpoint", "teacher", "tokenizer", "model"}
    found: dict[str, str] = {}
    for entry in manifest.lineage:
        for label, value in entry["inputs"].items():
            if label not in stages and value not in found.values():
                found[label if label not in found else f"{label} of {entry['stage']}"] = value
    return found


def _data(label: str, value: str) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data:{label}",
        "name": label,
        "hashes": [{"alg": "SHA-256", "content": value}],
        "data": [{"type": "dataset", "name": label}],
    }


def _stage(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model" if entry["stage"] in ("teacher", "distill", "quantize") else "data",
        "bom-ref": f"stage:{entry['stage']}:{entry['content'][:16]}",
        "name": f"{entry['stage']} {entry['name']}",
        "version": entry["content"][:16],
        "hashes": [{"alg": "SHA-256", "content": entry["content"]}],
    }


def _library(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "platform" if name == "python" else "library",
        "bom-ref": f"library:{name}",
        "name": name,
        "version": version,
        **({} if name in ("python", "gori") else {"purl": f"pkg:pypi/{name}@{version}"}),
    }
