"""What a test's workers run in place of a real candidate: quick, and as bad as its method's name says."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gori.errors import GoriError
from gori.quantize.space import Candidate
from gori.quantize.sweep import Setting
from gori.quantize.workers import Outcome, Say, Task

METHODS = ("plain", "slow", "gori-error", "bug", "killed", "exits", "noisy", "nan")


def candidate(method: str, scheme: str = "w4a16-g32") -> Candidate:
    return Candidate("student", scheme, method, "w4-g32", None, "gguf")


def setting(out: Path, seed: int = 0) -> Setting:
    return Setting(out, {"student": Path("student")}, {"student": "hash"}, {"test": "hash"}, 16, seed)


def run(task: Task, say: Say) -> Outcome:
    say("quantize")
    method = task.candidate.method
    with open(task.out / "ran.txt", "a") as file:
        file.write(f"{method} {os.getpid()}\n")
    if method == "slow":
        time.sleep(0.6)
    if method == "noisy":
        os.write(2, b"said by native code\n")
    if method == "gori-error":
        raise GoriError("group size 32 does not divide 100: choose another")
    if method == "bug":
        raise ZeroDivisionError("float division\nby zero")
    if method == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if method == "exits":
        os._exit(7)
    say("measure")
    metrics: dict[str, float] = {"size_bytes": 1000 + len(method), "calls": 0.9, "kl_mean": 0.1}
    if method == "nan":
        metrics["kl_mean"] = float("nan")
    return {"state": "done", "metrics": metrics, "seconds": 1.0, "artifact": f"candidates/{task.key}/export"}
