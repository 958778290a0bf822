"""Independent stages at once, each in a process with its share of the cores; one run at a time in a directory."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gori import console
from gori.artifact import os_errors
from gori.errors import GoriError
from gori.ranks import current

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A module's function and its arguments; both travel to another process."""


_share: int | None = None


def cores() -> int:
    """Cores that this process may use: its share where it runs beside others."""
    if _share is not None:
        return _share
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def together(jobs: Sequence[Job], share: int, at_once: int | None = None) -> None:
    """Run jobs at once, one process of `share` cores each; on a single core one after the other, here.

    `at_once` processes take more jobs than that one after the other.

    The first error is raised when all have ended, so that what the others did is kept. A job's process ends with its
    parent, even if that is killed. Under torchrun every rank runs all of them, one after the other: each job may need
    all ranks.
    """
    if cores() < 2 or current().world > 1:
        for run, arguments in jobs:
            run(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    errors: list[BaseException] = []
    start = (os.getpid(), share)
    with ProcessPoolExecutor(at_once or len(jobs), mp_context=context, initializer=begin, initargs=start) as pool:
        for done in as_completed([pool.submit(run, *arguments) for run, arguments in jobs]):
            if error := done.exception():
                errors.append(error)
    if errors:
        raise errors[0]


def begin(parent: int, share: int) -> None:
    """Before a job's imports: its cores, plain log lines, and an end when the parent ends."""
    global _share
    _share = share
    os.environ["OMP_NUM_THREADS"] = str(share)
    console.plain()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold a directory's lock, the first rank for all; a second run there is refused, not mixed in."""
    if not current().first:
        yield
        return
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / ".lock", "w")  # noqa: SIM115 (held until the run ends)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise GoriError(f"another gori run works in {out}: wait for it or choose another --out") from e
        yield
