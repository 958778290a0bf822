"""summary.json: what a run reached, gathered from the manifests and the answers that its stages left on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gori.artifact import MANIFEST, read_manifest
from gori.calls import CallError, Function, parse, read_tools, same_calls
from gori.errors import GoriError
from gori.recipe import Recipe
from gori.statistics import LEVEL, Paired, as_list, kept_interval, mcnemar, pair, proportion_interval, worst_interval
from gori.targets import TARGETS, answering

LANGUAGES = ("ko", "en")
"""What a row's language may be."""


def split_entry(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"exact", "n", "ko", "en"}` of answered rows; a language's share only where it has rows."""
    out: dict[str, Any] = {"exact": _share(rows), "n": len(rows)}
    for language in LANGUAGES:
        some = [r for r in rows if r["language"] == language]
        if some:
            out[language] = _share(some)
    return out


def _share(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(bool(r["exact"]) for r in rows) / len(rows) if rows else 0.0


def read_answers(out: Path, model: str) -> list[dict[str, Any]]:
    """What a model answered to every test row."""
    text = (out / "evaluate" / model / "answers.jsonl").read_text(encoding="utf-8")
    # not splitlines: an answer may hold U+2028, which it takes for the end of a line
    return [json.loads(line) for line in text.split("\n") if line]


def by_split(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        found.setdefault(r["split"], []).append(r)
    return found


def agreement(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], functions: Mapping[str, Function]
) -> float:
    """Share of rows on which two models give the same call (or, where neither parses, the same text)."""
    return sum(_same(x["answer"], y["answer"], functions) for x, y in zip(a, b, strict=True)) / len(a)


def fidelity(
    answers: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], level: float = LEVEL
) -> dict[str, Any]:
    """Exact calls of a model beside a reference's on the same rows, with intervals; see gori.statistics.

    `kept` is exact(model) / exact(reference), `calls` that of the worse language. A language in which the reference is
    exact on no row has None and is passed over by `calls`. GoriError where the rows differ.
    """
    if [a["utterance"] for a in answers] != [r["utterance"] for r in reference]:
        raise GoriError("the two models answered different rows: compare answers to the same rows in the same order")
    alone, all_rows = exactness(answers, level), _paired(answers, reference)
    pairs = {
        k: _paired(*([r for r in rows if r["language"] == k] for rows in (answers, reference)))
        for k in alone["exact_by_language"]
    }
    kept = {k: p.kept for k, p in pairs.items()}
    worst = min(((v, k) for k, v in kept.items() if v is not None), default=(None, None))
    return {
        **alone,
        "kept": all_rows.kept,
        "kept_ci": as_list(kept_interval(all_rows, level)),
        "kept_by_language": kept,
        "kept_by_language_ci": {k: as_list(kept_interval(p, level)) for k, p in pairs.items()},
        "calls": worst[0],
        "calls_ci": as_list(worst_interval(list(pairs.values()), level)),
        "calls_language": worst[1],
        "lost": all_rows.lost,
        "gained": all_rows.gained,
        "mcnemar_p": mcnemar(all_rows.lost, all_rows.gained),
    }


def exactness(rows: Sequence[Mapping[str, Any]], level: float = LEVEL) -> dict[str, Any]:
    """Share of exact rows, over all and in each language that has rows, with exact intervals."""
    parts = {k: some for k in LANGUAGES if (some := [r for r in rows if r["language"] == k])}
    return {
        "rows": len(rows),
        "exact": _share(rows),
        "exact_ci": _share_interval(rows, level),
        "exact_by_language": {k: _share(some) for k, some in parts.items()},
        "exact_by_language_ci": {k: _share_interval(some, level) for k, some in parts.items()},
    }


def _share_interval(rows: Sequence[Mapping[str, Any]], level: float) -> list[float] | None:
    return as_list(proportion_interval(sum(bool(r["exact"]) for r in rows), len(rows), level))


def _paired(answers: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Paired:
    return pair([bool(a["exact"]) for a in answers], [bool(r["exact"]) for r in reference])


def _same(a: str, b: str, functions: Mapping[str, Function]) -> bool:
    if a == b:
        return True
    try:
        return same_calls(parse(a, functions), parse(b, functions))
    except CallError:
        return False


def summarize(out: Path, models: Mapping[str, Path], recipe: Recipe, eager: str) -> dict[str, Any]:
    """Gather accuracy, parameters, bytes and seconds; gates are added by the caller.

    `bytes` is the size of the weights' file; `seconds` of each stage that ran; `agreement` the share of test rows on
    which an exported file gives the same call as `eager`, the eager model of the same integers.
    """
    answers = {name: read_answers(out, name) for name in models}
    functions = read_tools(out / "data" / "tools.json")
    targets = answering(e.target for e in recipe.export)
    parameters, seconds = {}, {}
    for name, directory in models.items():
        body = read_manifest(directory) if (directory / MANIFEST).exists() else {}
        found = body.get("metrics", {}).get("parameters")
        if found:
            parameters[name] = found
    for directory in sorted(p.parent for p in out.rglob(MANIFEST)):
        body = read_manifest(directory)
        seconds[directory.relative_to(out).as_posix()] = _elapsed(body)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "accuracy": {name: {s: split_entry(r) for s, r in by_split(rows).items()} for name, rows in answers.items()},
        "agreement": {f"{t}/{eager}": agreement(answers[t], answers[eager], functions) for t in targets},
        "parameters": parameters,
        "bytes": {name: weights_bytes(directory) for name, directory in models.items()},
        "seconds": seconds,
        "targets": targets,
    }


def weights_bytes(directory: Path) -> int:
    """Bytes of the file or files that hold a model's weights; of an imported teacher they are in its own folder."""
    body = read_manifest(directory) if (directory / MANIFEST).exists() else {}
    if body.get("stage") == "import":
        directory = Path(body["settings"]["folder"])
    exported = {t.file for t in TARGETS.values()}
    files = [p for p in directory.iterdir() if p.name in exported and p.is_file()]
    return sum(f.stat().st_size for f in files or directory.glob("*.safetensors"))


def _elapsed(manifest: Mapping[str, Any]) -> float:
    began, ended = (datetime.strptime(manifest[k], "%Y-%m-%dT%H:%M:%SZ") for k in ("started", "finished"))
    return (ended - began).total_seconds()
