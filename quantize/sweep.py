"""A sweep: candidates given to an engine, what becomes of them written to the journal, speeds measured at the end.

Knows keys, rows and the order of things; how a candidate is made and measured comes in as functions, how candidates are
chosen as a search.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gori import console
from gori.artifact import LIBRARIES, library_versions, sha256_json
from gori.errors import GoriError, one_line
from gori.quantize.journal import Journal, held
from gori.quantize.search import Search
from gori.quantize.space import Candidate
from gori.quantize.workers import MACHINE, Engine, Event, Task
from gori.targets import TARGETS

SCHEMA = 1
"""Part of every key: raised when a candidate's figures come to mean something else."""
ROUNDS = 3
FIGURES = ("rss_mib", "load_ms", "prefill_tps", "decode_tps")
"""Of a speed event; a row has the median of each."""
AGAIN_S = 1.0
"""Between two tries to take a candidate that another process has."""
Row = dict[str, Any]
Measure = Callable[[Path, int], dict[str, Any]]
"""Artifact and threads → FIGURES, from a fresh process; raises GoriError."""
Show = Callable[[list[Row], list[dict[str, Any]]], None]
"""Told of finished rows and of those at work, again and again."""


@dataclass(frozen=True)
class Setting:
    """What all candidates of a sweep have in common."""

    out: Path
    students: Mapping[str, Path]
    hashes: Mapping[str, str]
    """Student → its checkpoint's content hash."""
    data: Mapping[str, str]
    """The prepared files' hashes."""
    samples: int | None
    seed: int

    def task(self, c: Candidate) -> Task:
        """A candidate with its keys: two with one key give the same file and the same answers."""
        common = [SCHEMA, self.hashes[c.student], dict(sorted(self.data.items())), self.samples, self.seed]

        def key(of: Candidate, libraries: Sequence[str]) -> str:
            parts = {k: v for k, v in of.as_dict().items() if k != "student"}
            return sha256_json([*common, parts, library_versions(libraries)])[:16]

        packages = [*LIBRARIES, *TARGETS[c.target].packages, "scipy"]
        return Task(
            key=key(c, packages),
            candidate=c,
            integers_key=key(c.integers, LIBRARIES),
            checkpoint=self.students[c.student],
            data=self.out / "data",
            out=self.out,
            samples=self.samples,
            seed=self.seed,
        )


@dataclass
class Sweep:
    """One run of `gori sweep`, which may be one of several in its directory or the continuation of another."""

    setting: Setting
    journal: Journal
    engine: Engine
    show: Show = lambda rows, running: None
    retry_failed: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)
    """Every candidate that was proposed, by key, in that order."""
    _at: dict[str, str] = field(default_factory=dict)
    """Key → the stage that is being worked on."""

    def run(self, search: Search) -> list[Task]:
        """Work through a search; afterwards every task that it proposed is finished, here or elsewhere."""
        rows: list[Row] | None = None
        while True:
            try:
                candidates = next(search) if rows is None else search.send(list(rows))
            except StopIteration:
                return list(self.tasks.values())
            found = [self.setting.task(c) for c in candidates]
            fresh = [t for t in found if t.key not in self.tasks]
            self.tasks |= {t.key: t for t in fresh}
            self._retry(fresh)
            self._generation(fresh)
            rows = [self.row(t) for t in found]

    def _retry(self, tasks: Sequence[Task]) -> None:
        finished = self.journal.refresh().finished
        for t in tasks:
            if self.retry_failed and finished.get(t.key, {}).get("event") == "failed":
                self.journal.append("retry", t.key)

    def _generation(self, tasks: Sequence[Task]) -> None:
        """Until each of the tasks is finished, whoever works on it."""
        waiting: dict[str, float] = {t.key: 0.0 for t in tasks}
        """Key → when it may be taken, monotonic seconds."""
        while True:
            finished = self.journal.refresh().finished
            waiting = {k: at for k, at in waiting.items() if k not in finished}
            self.show(self.rows(), self._running())
            if not waiting and not self._at:
                return
            now = time.monotonic()
            for key in [k for k, at in waiting.items() if at <= now][: self.engine.room()]:
                del waiting[key]
                self._at[key] = "start"
                self.engine.submit(self.tasks[key])
            for event in self.engine.events(0.5):
                if self._take(event):
                    waiting[event.task.key] = time.monotonic() + AGAIN_S

    def _running(self) -> list[dict[str, Any]]:
        return [{"candidate": self.tasks[k].candidate.as_dict(), "doing": doing} for k, doing in self._at.items()]

    def _take(self, event: Event) -> bool:
        """Account for an event; returns whether the candidate is to be tried again later."""
        key, outcome = event.task.key, event.outcome
        if outcome is None:
            if self._at[key] == "start":
                self.journal.append("started", key, candidate=event.task.candidate.as_dict())
            self._at[key] = event.doing or ""
            return False
        del self._at[key]
        if outcome["state"] == "held":
            return True
        what = {k: v for k, v in outcome.items() if k != "state"}
        self.journal.append(outcome["state"], key, candidate=event.task.candidate.as_dict(), **what)
        return False

    def rows(self) -> list[Row]:
        """The finished ones among the proposed, without speeds."""
        return [self.row(t) for k, t in self.tasks.items() if k in self.journal.state.finished]

    def row(self, task: Task) -> Row:
        """A finished task as the table has it, without speeds."""
        event = self.journal.state.finished[task.key]
        return {
            "key": task.key,
            "candidate": task.candidate.as_dict(),
            "state": event["event"],
            "error": event.get("error"),
            "metrics": dict(event.get("metrics") or {}),
            "seconds": event.get("seconds"),
            "artifact": event.get("artifact"),
        }

    def with_speeds(self, machine: str, threads: int) -> list[Row]:
        """All rows, with the medians of what was measured on a machine with so many threads."""
        rows = self.rows()
        for row in rows:
            row["metrics"] |= medians(self.speeds(row["key"], machine, threads))
        return rows

    def speeds(self, key: str, machine: str, threads: int) -> list[dict[str, Any]]:
        """The rounds of a candidate on a machine."""
        found = self.journal.state.speeds.get(key, [])
        return [e for e in found if e["machine"] == machine and e["threads"] == threads]


def medians(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure over rounds, None where none was measured; and the rounds."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [e[name] for e in events if e.get(name) is not None]
        found[name] = statistics.median(values) if values else None
    return {**found, "speed_rounds": sum("error" not in e for e in events)}


def measure_speeds(sweep: Sweep, measure: Measure, machine: str, threads: int, rounds: int) -> None:
    """Measure every finished file once a round, one process at a time while no candidate is worked on in the directory;
    what was measured here before counts. A file that cannot be measured is journaled with the error."""
    done = [t for t in sweep.tasks.values() if sweep.journal.state.finished[t.key]["event"] == "done"]
    with alone(sweep.setting.out), console.steps("speeds", rounds * len(done)) as bar:
        for number in range(rounds):
            for i, task in enumerate(done):
                bar.update(number * len(done) + i + 1, f"round {number + 1} of {rounds}")
                sweep.journal.refresh()
                if len(sweep.speeds(task.key, machine, threads)) <= number:
                    _measure_one(sweep, measure, task, machine, threads, number)


def _measure_one(sweep: Sweep, measure: Measure, task: Task, machine: str, threads: int, number: int) -> None:
    try:
        found = measure(sweep.setting.out / sweep.journal.state.finished[task.key]["artifact"], threads)
    except GoriError as e:
        found = {"error": one_line(e)}
        console.log(f"{task.key}: {found['error']}")
    kept = {k: v for k, v in found.items() if k not in ("machine", "round")}
    sweep.journal.append("speed", task.key, **{**kept, "machine": machine, "threads": threads, "round": number})


def alone(out: Path) -> Any:
    """Hold a directory's machine lock: nobody works on candidates there meanwhile."""
    with held(out / MACHINE, wait=False) as free:
        if not free:
            console.log("waiting for another gori sweep in this directory before speeds are measured")
    return held(out / MACHINE, wait=True)
