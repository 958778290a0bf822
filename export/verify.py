"""`gori verify`: whether an artifact is whole, holds its student's integers and answers here as it did at home.

It works from the artifact alone, on a machine without torch where the engine needs none: hashes from the manifest,
integers read out of the engine's file, golden outputs run by this machine's engine, the signature if a key is given.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from gori.artifact import MANIFEST, check_integrity, read_manifest, read_object, sha256_file, sha256_json
from gori.errors import GoriError, MissingEngine
from gori.export import golden, golden_run
from gori.export.contents import EMBEDDING, HEAD, digests
from gori.targets import PARITY, TARGETS, exported_row

INTEGERS = "integers.json"


@dataclass
class Row:
    """What was found of one artifact."""

    directory: Path
    entry: dict[str, Any] = field(default_factory=dict)
    """parity.json: what was measured when the artifact was made."""
    integers: str = ""
    """One hash over every integer and scale: equal for artifacts that hold the same ones."""
    tensors: int = 0
    here: dict[str, Any] = field(default_factory=dict)
    """What golden inputs gave on this machine; empty where nothing was run."""
    not_run: str = ""
    """Why nothing was run here."""
    signed: bool | None = None
    """None: no key was given."""
    problem: str = ""
    """The sentence by which it was refused; empty for one that is good."""

    @property
    def ok(self) -> bool:
        return not self.problem

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self), "directory": str(self.directory)}


def artifacts(directory: Path) -> list[Path]:
    """The exported artifacts at or under a directory."""
    if not directory.is_dir():
        raise GoriError(f"{directory} is not a directory: name an exported artifact, or a directory of them")
    if (directory / MANIFEST).exists() or (directory / PARITY).exists():
        return [directory]
    places = {p.parent for name in (MANIFEST, PARITY) for p in directory.glob(f"**/{name}")}
    found = [p for p in sorted(places) if _is_export(p)]
    if not found:
        raise GoriError(f"{directory} holds no exported artifact: `gori export CHECKPOINT --target T --out DIR` does")
    return found


def _is_export(directory: Path) -> bool:
    if (directory / PARITY).exists():
        return True
    try:
        return read_manifest(directory).get("stage") == "export"
    except GoriError:
        return False


def verify_all(directory: Path, key: Path | None = None, *, run: bool = True) -> list[Row]:
    """A row for every artifact at or under a directory; a bad one does not keep the others from being checked."""
    return [verify_one(path, key, run=run) for path in artifacts(Path(directory))]


def verify_one(directory: Path, key: Path | None = None, *, run: bool = True) -> Row:
    """Check one artifact; what is wrong with it is in the row's `problem`."""
    row = Row(directory)
    steps: list[Callable[[], None]] = [lambda: _check_files(row), lambda: _check_integers(row)]
    if key:
        steps.insert(0, lambda: _check_signature(row, key))
    if run:
        steps.append(lambda: _run_golden(row))
    else:
        row.not_run = "--no-run"
    try:
        for step in steps:
            step()
    except MissingEngine as e:
        row.not_run = str(e)
    except GoriError as e:
        row.problem = str(e)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
            struct.error) as e:  # fmt: skip
        # files whose hashes fit and whose form does not: somebody else wrote them, manifest and all
        row.problem = f"{row.directory} holds what gori did not write ({type(e).__name__}: {e!s:.120}): export again"
    row.problem = " ".join(row.problem.split())
    return row


def _check_signature(row: Row, key: Path) -> None:
    from gori.export.signing import check_signature

    row.signed = False
    check_signature(row.directory, key)
    row.signed = True


def _check_files(row: Row) -> None:
    """Every file is the one that the manifest names, and the tokenizer the one that parity was measured with."""
    body = check_integrity(row.directory)
    if body.get("stage") != "export":
        raise GoriError(f"{row.directory} is the {body.get('stage')} stage's: only exported artifacts are verified")
    row.entry = read_object(row.directory / PARITY)
    if row.entry.get("schema_version") != 1 or row.entry.get("target") not in TARGETS:
        raise GoriError(f"{row.directory / PARITY} is of a version that this gori does not read: export again")
    check_entry(row.entry, row.directory / PARITY)
    for name, digest in row.entry["identity"].items():
        if not (row.directory / name).is_file() or sha256_file(row.directory / name) != digest:
            raise GoriError(f"{row.directory / name} is not the one that parity was measured with: export again")


GAP = ("kl_mean", "max_abs", "top1")
FIELDS: dict[str, type | tuple[type, ...]] = {
    "engine": str, "engine_version": str, "executed": bool, "ran": str, "identity": dict, "file_bytes": int,
    "packed_bytes": int,
}  # fmt: skip


def check_entry(entry: dict[str, Any], path: Path) -> None:
    """Refuse a parity.json that lacks what the ledger shows."""
    wrong = [n for n, kind in FIELDS.items() if not isinstance(entry.get(n), kind)]
    found = entry.get("parity", 0)
    if found is not None:
        gaps = [found.get(k) if isinstance(found, dict) else None for k in ("engine", "floor")]
        numbers = [g.get(n) if isinstance(g, dict) else None for g in gaps for n in GAP]
        counts = [entry.get("same_answers"), entry.get("answers")]
        if not all(isinstance(n, (int, float)) for n in (*numbers, *counts)):
            wrong.append("parity")
    if wrong or entry["packed_bytes"] < 1:
        raise GoriError(
            f"{path} does not have the field {(wrong or ['packed_bytes'])[0]!r} as gori writes it: export again"
        )


def _check_integers(row: Row) -> None:
    """The integers and scales in the engine's file, by their hashes."""
    target = exported_row(row.entry)
    try:
        reader = importlib.import_module(target.reader)
    except ImportError as e:
        raise MissingEngine(golden_run.missing(e, target)) from e
    want = read_object(row.directory / INTEGERS).get("tensors")
    if not isinstance(want, dict):
        raise GoriError(f"{row.directory / INTEGERS} does not name tensors and their hashes: export again")
    found = digests(reader.read(row.directory))
    if found != want:
        wrong = sorted(n for n in {*found, *want} if found.get(n) != want.get(n))
        raise GoriError(
            f"{len(wrong)} of {len(found)} tensors in {row.directory / target.file} are not those that were exported, "
            f"{wrong[0]} among them: export again"
        )
    row.tensors, row.integers = len(found), sha256_json(_shared_out(found))


def _shared_out(found: dict[str, str]) -> dict[str, str]:
    """Without a head that is the table once more: some formats keep a copy, some do not."""
    return {n: d for n, d in found.items() if n != HEAD or d != found.get(EMBEDDING)}


def _run_golden(row: Row) -> None:
    """Golden inputs through this machine's engine, in a process of its own."""
    target = exported_row(row.entry)
    if not target.opener:
        raise MissingEngine(target.stand_in)
    said = golden_run.in_process(row.directory)
    if said.get("missing"):
        raise MissingEngine(said["missing"])
    if said.get("problem"):
        raise GoriError(said["problem"])
    row.here = here = said["here"]
    if not here["met"]:
        raise GoriError(
            f"{row.directory} does not answer as it did when it was made: mean KL {here['kl_mean']:.2e} on golden "
            f"prompts, allowed {here['kl_bound']:.2e}, {here['same_answers']} of {here['answers']} answers, "
            f"{here['same_at_home']} then ({here['engine']} {here['engine_version']} here, "
            f"{row.entry['engine_version']} then)"
        )
    second = here["second"]
    if not golden.agrees(second):
        raise GoriError(
            f"{row.directory}: {second['engine']} gives {second['same_answers']} of {second['answers']} golden "
            "answers: export again"
        )


def same_integers(rows: list[Row]) -> bool | None:
    """Whether all artifacts hold the same integers; None where one was refused, not read, or holds none."""
    if not all(r.ok and r.tensors for r in rows):
        return None
    return len({r.integers for r in rows}) == 1


def ledger(rows: list[Row]) -> dict[str, Any]:
    """One JSON object over all artifacts."""
    body = {"ok": all(r.ok for r in rows), "same_integers": same_integers(rows)}
    return {**body, "artifacts": [r.as_dict() for r in rows]}


def caption(rows: list[Row]) -> str:
    """What can be said of all artifacts together."""
    if len(rows) < 2:
        return ""
    same = same_integers(rows)
    if same:
        return "all hold the same integers"
    sets: dict[str, list[str]] = {}
    for r in rows:
        if r.ok and r.tensors:
            sets.setdefault(r.integers[:8], []).append(r.directory.name)
    unread = [r.directory.name for r in rows if not (r.ok and r.tensors)]
    parts = [f"{digest}: {', '.join(names)}" for digest, names in sets.items()]
    return "; ".join([*parts, *([f"no integers read: {', '.join(unread)}"] if unread else [])])


COLUMNS = (
    "artifact", "run by", "integers", "KL (floor)", "Δlogit (floor)", "top-1", "answers", "text", "bytes (packed ×)",
    "here", "signed",
)  # fmt: skip
NARROW = 150
"""Columns of a terminal below which an artifact is a block of lines."""


def table(rows: list[Row], width: int = 200) -> str | Table:
    """The ledger for a reader. What was measured when an artifact was made, then what was found here."""
    good, refused = [r for r in rows if r.ok], [r for r in rows if not r.ok]
    said = "\n".join(f"REFUSED {r.directory.name}: {r.problem}" for r in refused)
    if not good:
        return said
    if width < NARROW:
        blocks = ["\n".join(f"{n:>16}  {c}" for n, c in zip(COLUMNS, _cells(r), strict=True)) for r in good]
        return "\n\n".join(filter(None, [*blocks, caption(rows), said]))
    found = Table(caption="\n".join(filter(None, [caption(rows), said])) or None)
    for name in COLUMNS:
        found.add_column(name, overflow="fold")
    for r in good:
        found.add_row(*_cells(r))
    return found


def _cells(r: Row) -> tuple[str, ...]:
    e, both = r.entry, r.entry.get("parity")
    ran = f"{e['engine']} {e['engine_version']}" + ("" if e["executed"] else " (not the device)")
    figures = ("–", "–", "–", "–")
    if both:
        got, floor = both["engine"], both["floor"]
        figures = (
            f"{got['kl_mean']:.1e} ({floor['kl_mean']:.1e})",
            f"{got['max_abs']:.1e} ({floor['max_abs']:.1e})",
            f"{got['top1']:.1%}",
            f"{e['same_answers']}/{e['answers']}{_second(e)}",
        )
    text = sha256_json(e["identity"])[:8] if e["identity"] else "–"
    here = r.not_run
    if r.here:
        here = f"KL {r.here['kl_mean']:.1e}, {r.here['same_answers']}/{r.here['answers']}{_second(r.here)}"
        here += f"\n{r.here['second_missing']}" if r.here["second_missing"] else ""
    size = f"{e['file_bytes']:,} ({e['file_bytes'] / e['packed_bytes']:.2f})"
    held = f"{r.tensors} {r.integers[:8]}" if r.tensors else "not read"
    signed = {None: "–", True: "yes", False: "no"}[r.signed]
    return (r.directory.name, ran, held, *figures, text, size, here, signed)


def _second(found: dict[str, Any]) -> str:
    """What the engine of a second file gave, as a line of its own."""
    other = found.get("second")
    return f"\n{other['engine']} {other['same_answers']}/{other['answers']}" if other else ""
