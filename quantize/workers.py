"""Candidates on this machine: processes that stay alive from one to the next, so that torch is loaded once in each.

Knows how to give out tasks and to notice that a process died; nothing of what a task does. A candidate is held by a
lock of its own while a process works on it, so that several sweeps can share a directory.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from gori import parallel
from gori.errors import GoriError, one_line
from gori.quantize.journal import Journal, held
from gori.quantize.space import Candidate

Outcome = dict[str, Any]
"""`{"state": "done", "metrics", "seconds", "artifact"}`, `{"state": "failed", "error"}`, or `{"state": "held"}` where
another process has the candidate."""
PATIENCE_S = 20.0
"""For an idle process to end."""
MACHINE = ".machine.lock"
"""Held together by all who work on candidates in a directory, and alone by who measures speeds there."""


@dataclass(frozen=True)
class Task:
    """A candidate and where things lie; travels to another process."""

    key: str
    candidate: Candidate
    integers_key: str
    """What candidates with the same integers share."""
    checkpoint: Path
    data: Path
    """The prepared rows: `test.jsonl` and `calibration.jsonl`."""
    out: Path
    """The sweep's directory."""
    samples: int | None
    seed: int

    @property
    def directory(self) -> Path:
        """The candidate's own."""
        return self.out / "candidates" / self.key

    @property
    def lock(self) -> Path:
        return self.out / "candidates" / f".{self.key}.lock"


Say = Callable[[str], None]
Run = Callable[[Task, Say], Outcome]
"""Makes and measures one candidate, telling which stage it is at; it raises where that fails."""


@dataclass(frozen=True)
class Event:
    """Something that an engine reports of a task."""

    task: Task
    doing: str | None
    """The stage that begins; None where the task has ended."""
    outcome: Outcome | None = None


class Engine(Protocol):
    """Where candidates are worked on: this machine, or a cluster."""

    def room(self) -> int: ...
    def submit(self, task: Task) -> None: ...
    def events(self, timeout_s: float) -> list[Event]: ...
    def close(self) -> None: ...


def outcome_of(run: Run, task: Task, say: Say) -> Outcome:
    """What a run gives; an error is an outcome, too: a sentence of gori's, or the error's kind and first line."""
    try:
        outcome = run(task, say)
        if odd := [k for k, v in outcome["metrics"].items() if isinstance(v, float) and not math.isfinite(v)]:
            return {"state": "failed", "error": f"its {odd[0]} is {outcome['metrics'][odd[0]]}: it computes nothing"}
        return outcome
    except GoriError as e:
        return {"state": "failed", "error": one_line(e, 1000)}
    except Exception as e:
        traceback.print_exc()
        return {"state": "failed", "error": f"{type(e).__name__}: {one_line(e)} (more in its log.txt)"}


def claimed(run: Run, task: Task, say: Say) -> Outcome:
    """The same with the candidate's lock, and while nobody measures speeds."""
    with held(task.lock, wait=False) as got:
        if not got or finished_elsewhere(task):
            return {"state": "held"}
        with held(task.out / MACHINE, wait=True, shared=True):
            task.directory.mkdir(parents=True, exist_ok=True)
            with said_to(task.directory / "log.txt"):
                return outcome_of(run, task, say)


def finished_elsewhere(task: Task) -> bool:
    """Whether somebody finished a candidate after its task was given out."""
    return task.key in Journal(task.out).refresh().finished


class said_to:  # noqa: N801 (a context manager that reads as a phrase)
    """Send what this process writes, native code included, to the end of a file meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._saved = (os.dup(1), os.dup(2))
        with open(self._path, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, number)
            os.close(saved)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None


class Local:
    """`workers` processes of one thread each; one that dies takes its candidate's outcome with it, nothing else."""

    def __init__(self, run: Run, workers: int) -> None:
        self._run, self._count = run, workers
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def room(self) -> int:
        """Tasks that can be taken now."""
        return self._count - sum(w.task is not None for w in self._workers)

    def submit(self, task: Task) -> None:
        """Begin with a task; there must be room."""
        worker = next((w for w in self._workers if w.task is None and w.process.is_alive()), None) or self._start()
        worker.task = task
        worker.pipe.send(task)

    def events(self, timeout_s: float) -> list[Event]:
        """What happened until now; waits for the first event, at most `timeout_s`."""
        busy = {w.pipe: w for w in self._workers if w.task}
        found = []
        for pipe in wait(list(busy), timeout_s):
            assert isinstance(pipe, Connection)
            worker = busy[pipe]
            assert worker.task is not None
            try:
                doing, outcome = pipe.recv()
            except (EOFError, ConnectionResetError):
                doing, outcome = None, self._died(worker)
            found.append(Event(worker.task, doing, outcome))
            if outcome is not None:
                worker.task = None
        return found

    def close(self) -> None:
        """End all processes: those at work now, the others when they notice."""
        for w in self._workers:
            w.pipe.close()
            if w.task is not None:
                w.process.terminate()
        for w in self._workers:
            w.process.join(PATIENCE_S)
            w.process.kill()
            w.process.join()
        self._workers = []

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(there, self._run, os.getpid()), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it once, while the new process unpickles `run`
        try:
            process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}
        there.close()  # so that the pipe ends when the process does
        worker = _Worker(process, here)
        self._workers.append(worker)
        return worker

    def _died(self, worker: _Worker) -> Outcome:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        code = worker.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = ": not enough memory? try fewer --workers" if code == -signal.SIGKILL else ""
        return {"state": "failed", "error": f"its process ended by {how}{why}"}


def _work(pipe: Connection, run: Run, parent: int) -> None:
    """A worker's life: task after task, until the pipe or the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    parallel.begin(parent, 1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        outcome = claimed(run, task, lambda stage: pipe.send((stage, None)))
        pipe.send((None, outcome))
