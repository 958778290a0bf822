"""The rows of a sweep: a seeded sample to answer and one to calibrate with, as files that can travel.

Knows where a checkpoint's corpus lies; nothing of candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori.artifact import Manifest, make, read_manifest, sha256_file
from gori.calls import Function, read_tools
from gori.data import Conversation, encode, read_conversations
from gori.errors import GoriError
from gori.quantize import calibration
from gori.quantize.journal import held
from gori.tokenizer import Tokenizer

TEST, CALIBRATION = "test.jsonl", "calibration.jsonl"
CALIBRATION_ROWS = 4096
"""Training rows that are kept, from which each method draws its own sample."""

Line = tuple[bytes, Conversation, str]
"""A row as it was written, as it was read, and its file's name."""


def prepare(
    out: Path,
    students: Mapping[Path, int],
    data: Sequence[Path],
    calibrate: Sequence[Path],
    rows: int,
    seed: int,
) -> dict[str, Any]:
    """Write OUT/data: `rows` test rows, drawn from a seed so that every file and language keeps its share, and
    CALIBRATION_ROWS training rows; returns the metrics of its manifest.

    `students` are checkpoints with the most tokens that a row may have; a row too long for one of them is left out and
    counted. Files that are not named are those of the run that the checkpoints came from.
    """
    data, calibrate = corpus(list(students), data, calibrate)
    inputs = {f"{label}/{p.name}": sha256_file(p) for label, files in _labelled(data, calibrate) for p in files}
    for student in students:
        inputs |= {f"{name} of {student}": sha256_file(student / name) for name in ("tokenizer.json", "tools.json")}
    manifest = Manifest("sweep-data", "rows", seed, {"rows": rows, "lengths": list(students.values())}, inputs)

    def build(tmp: Path) -> None:
        functions = functions_of(next(iter(students)))
        lines = read_lines(data, functions)
        fitting = [line for line in lines if all(_length(line[1], s) <= most for s, most in students.items())]
        test = stratified(fitting, [(name, c.language) for _, c, name in fitting], rows, seed)
        train = read_lines(calibrate, functions)
        kept = stratified(train, [0] * len(train), CALIBRATION_ROWS, seed)
        for name, chosen in ((TEST, test), (CALIBRATION, kept)):
            (tmp / name).write_bytes(b"".join(line + b"\n" for line, _, _ in chosen))
        if not test:
            raise GoriError(f"none of {len(lines)} rows fits the students' context: name other --data")
        manifest.metrics |= {
            "rows": len(test),
            "rows_by_language": dict(sorted(Counter(c.language for _, c, _ in test).items())),
            "rows_by_file": dict(sorted(Counter(name for _, _, name in test).items())),
            "rows_too_long": len(lines) - len(fitting),
            "calibration_rows": len(kept),
        }

    with held(out / ".data.lock", wait=True):
        make(out / "data", manifest, build)
    return read_manifest(out / "data")["metrics"]


def _labelled(data: Sequence[Path], calibrate: Sequence[Path]) -> list[tuple[str, Sequence[Path]]]:
    return [("test", data), ("calibration", calibrate)]


def corpus(students: Sequence[Path], data: Sequence[Path], calibrate: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of test rows and of training rows: those that were named, or those beside the checkpoints, which must then
    be the same for all."""
    if data and calibrate:
        return list(data), list(calibrate)
    found = [calibration.beside(s) for s in students]
    for student, other in zip(students, found, strict=True):
        for kind in ("test", "train"):
            if [sha256_file(p) for p in other[kind]] != [sha256_file(p) for p in found[0][kind]]:
                raise GoriError(
                    f"{student} and {students[0]} come from runs with other {kind} rows: name --data and --calibration"
                )
    return list(data) or found[0]["test"], list(calibrate) or found[0]["train"]


def functions_of(student: Path) -> dict[str, Function]:
    """The tools that a checkpoint carries."""
    tools = student / "tools.json"
    if not tools.exists():
        raise GoriError(f"{tools} does not exist: a sweep counts calls, and a model that calls carries its tools")
    return read_tools(tools)


def read_lines(files: Sequence[Path], functions: Mapping[str, Function]) -> list[Line]:
    """Every row of some files, checked."""
    found: list[Line] = []
    for path in files:
        rows = read_conversations(path, functions)
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        found += [(line, c, path.name) for line, c in zip(lines, rows, strict=True)]
    return found


_tokenizers: dict[Path, Tokenizer] = {}


def _length(c: Conversation, student: Path) -> int:
    if student not in _tokenizers:
        _tokenizers[student] = Tokenizer.load(student)
    return len(encode(c, _tokenizers[student]).ids)


def stratified(lines: Sequence[Line], strata: Sequence[Hashable], count: int, seed: int) -> list[Line]:
    """`count` of the lines in their order (all where there are no more), every stratum with its share: whole rows
    first, what is left by the largest remainder."""
    if count >= len(lines):
        return list(lines)
    members: dict[Hashable, list[int]] = {}
    for i, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(i)
    exact = {s: len(m) * count / len(lines) for s, m in members.items()}
    quota = {s: int(e) for s, e in exact.items()}
    for s in sorted(exact, key=lambda s: quota[s] - exact[s])[: count - sum(quota.values())]:
        quota[s] += 1
    rng = np.random.default_rng([seed, 577])
    chosen = [i for s, m in members.items() for i in rng.permutation(m)[: quota[s]]]
    return [lines[i] for i in sorted(chosen)]
