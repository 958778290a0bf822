"""What the command line says: results on stdout, progress and logs on stderr, bars only on a terminal."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from gori.ranks import current

stderr = Console(stderr=True, highlight=False, emoji=False)


UNFOLDED = 200
"""Columns of a table that is not shown on a terminal."""
_bars = sys.stderr.isatty()


def plain() -> None:
    """Log lines in place of bars, for a process that shares the terminal with others."""
    global _bars
    _bars = False


@contextmanager
def without_lines(*parts: str) -> Iterator[None]:
    """Hold back what native code writes to stderr meanwhile; pass on all lines but those that hold one of `parts`."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            lines = held.read().decode("utf-8", errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not any(p in line for p in parts)))


def log(message: str) -> None:
    """One line of progress on stderr, of the first rank."""
    if not current().first:
        return
    stderr.print(message, markup=False, soft_wrap=True)


def table_width() -> int:
    """Columns for a table on stdout; a pipe or file has none, so that no cell is folded there."""
    return Console().width if sys.stdout.isatty() else UNFOLDED


def result(value: Any, as_json: bool, text: str | Table) -> None:
    """Print a command's result to stdout: one JSON object, or its text or table. The first rank prints it."""
    if not current().first:
        return
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    elif isinstance(text, Table):
        # markup would eat `gori[extra]`
        Console(highlight=False, emoji=False, markup=False, width=table_width()).print(text)
    else:
        print(text)


class Steps:
    """Progress of long work: a bar on a terminal, else a log line every so often."""

    def __init__(self, bar: Progress | None, task: TaskID | None, label: str, total: int, every_s: float) -> None:
        self._bar, self._task, self._label, self._total, self._every_s = bar, task, label, total, every_s
        self._said = time.monotonic()

    def update(self, done: int, note: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said > self._every_s or done == self._total:
            self._said = time.monotonic()
            log(f"{self._label} {done}/{self._total} {note}")


@contextmanager
def steps(label: str, total: int, every_s: float = 15.0) -> Iterator[Steps]:
    """Show progress of `total` steps."""
    if not _bars or current().world > 1:
        yield Steps(None, None, label, total, every_s)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=stderr) as bar:
        yield Steps(bar, bar.add_task(label, total=total, note=""), label, total, every_s)


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
