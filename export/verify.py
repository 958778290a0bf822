"""`gori verify`: whether an artifact is whole, holds its student's integers and answers here as it did at home.

It works from the artifact alone, on a machine without torch where the engine needs none: hashes from the manifest,
integers read out of the engine's file, golden outputs run by this machine's engine, the signature if a key is given.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from gori.artifact import MANIFEST, check_integrity, read_manifest, read_object, sha256_file, sha256_json
from gori.errors import GoriError
from gori.export import golden
from gori.export.contents import digests
from gori.runtime.session import Session
from gori.targets import TARGETS, VARIANTS, Target

PARITY, INTEGERS = "parity.json", "integers.json"


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
    found = [p.parent for p in sorted(directory.glob(f"**/{MANIFEST}")) if _is_export(p.parent)]
    if (directory / MANIFEST).exists() or (directory / PARITY).exists():
        return [directory]
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
    except GoriError as e:
        row.problem = str(e)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as e:
        # files whose hashes fit and whose form does not: somebody else wrote them, manifest and all
        said = " ".join(str(e).split())[:120]
        row.problem = f"{row.directory} holds what gori did not write ({type(e).__name__}: {said}): export again"
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
    for name, digest in row.entry["identity"].items():
        if not (row.directory / name).is_file() or sha256_file(row.directory / name) != digest:
            raise GoriError(f"{row.directory / name} is not the one that parity was measured with: export again")


def _target(row: Row) -> Target:
    """The row of what was exported."""
    backend = row.entry.get("backend")
    if row.entry["target"] == "executorch" and backend:
        return VARIANTS[backend]
    return TARGETS[row.entry["target"]]


def _check_integers(row: Row) -> None:
    """The integers and scales in the engine's file, by their hashes."""
    target = _target(row)
    if not _importable(target.reader, target, row):
        return
    want = read_object(row.directory / INTEGERS).get("tensors")
    if not isinstance(want, dict):
        raise GoriError(f"{row.directory / INTEGERS} does not name tensors and their hashes: export again")
    found = digests(importlib.import_module(target.reader).read(row.directory))
    if found != want:
        wrong = sorted(n for n in {*found, *want} if found.get(n) != want.get(n))
        raise GoriError(
            f"{len(wrong)} of {len(found)} tensors in {row.directory / target.file} are not those that were exported, "
            f"{wrong[0]} among them: export again"
        )
    row.tensors, row.integers = len(found), sha256_json(_shared_out(found))


def _shared_out(found: dict[str, str]) -> dict[str, str]:
    """Without a head that is the table once more: some formats keep a copy, some do not."""
    head, table = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    return {n: d for n, d in found.items() if n != "lm_head.weight" or d != table or head is None}


def _importable(module: str, target: Target, row: Row) -> bool:
    try:
        importlib.import_module(module)
    except ImportError as e:
        row.not_run = f"needs {e.name}: pip install 'gori[{target.extra}]'"
        return False
    return True


def _run_golden(row: Row) -> None:
    """Golden inputs through this machine's engine."""
    target = _target(row)
    name, _, function = target.opener.partition(":")
    if not name:
        row.not_run = target.stand_in
    if row.not_run or not _importable(name, target, row):
        return
    open_directory: Callable[[Path, int | None], Session] = getattr(importlib.import_module(name), function)
    session = open_directory(row.directory, 1)
    found = golden.check(session, golden.read(row.directory))
    row.here = {**vars(found), "engine": session.info.engine, "engine_version": session.info.engine_version}
    row.here["second"] = golden.second_engine(target, row.directory, golden.read(row.directory).answers)
    if not found.met:
        raise GoriError(
            f"{row.directory} does not answer as it did when it was made: mean KL {found.kl_mean:.2e} on golden "
            f"prompts, allowed {found.kl_bound:.2e} ({session.info.engine} {session.info.engine_version} here, "
            f"{row.entry['engine_version']} then)"
        )


def ledger(rows: list[Row]) -> dict[str, Any]:
    """One JSON object over all artifacts."""
    held = {r.integers for r in rows if r.integers}
    return {"ok": all(r.ok for r in rows), "same_integers": len(held) <= 1, "artifacts": [r.as_dict() for r in rows]}


COLUMNS = (
    "artifact", "run by", "integers", "KL (floor)", "Δlogit (floor)", "top-1", "answers", "text", "bytes (packed ×)",
    "here", "signed",
)  # fmt: skip


def table(rows: list[Row]) -> Table:
    """The ledger for a reader: one line an artifact. What was measured when it was made, then what was found here."""
    found = Table()
    for name in COLUMNS:
        found.add_column(name, overflow="fold")
    for r in rows:
        signed = {None: "–", True: "yes", False: "NO"}[r.signed]
        if r.ok:
            found.add_row(r.directory.name, *_cells(r), signed)
        else:
            found.add_row(r.directory.name, *[""] * 8, f"REFUSED: {r.problem}", signed)
    held = {r.integers for r in rows if r.integers}
    if len(rows) > 1:
        found.caption = "all hold the same integers" if len(held) == 1 else f"{len(held)} different sets of integers"
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
    size = f"{e['file_bytes']:,} ({e['file_bytes'] / e['packed_bytes']:.2f})"
    return (ran, f"{r.tensors} {r.integers[:8]}", *figures, text, size, here)


def _second(found: dict[str, Any]) -> str:
    """What the engine of a second file gave, as a line of its own."""
    other = found.get("second")
    return f"\n{other['engine']} {other['same_answers']}/{other['answers']}" if other else ""
