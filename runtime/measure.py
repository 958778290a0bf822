"""One artifact's cost in a process of its own: `python -m gori.runtime.measure ARTIFACT` prints one JSON object.

Memory and load time only mean something where nothing was loaded before, so every measurement is a fresh process.
Knows nothing of tokenizers or answers, and needs no torch where the engine needs none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gori import console
from gori.runtime.session import Session, find_engine, open_session

PROMPT, DECODED, REPEATS = 128, 32, 5
"""Tokens of the prompt, tokens decoded one by one after it, and how often; a shorter context takes fewer."""


def measure(
    path: Path, threads: int, prompt: int = PROMPT, decoded: int = DECODED, repeats: int = REPEATS
) -> dict[str, Any]:
    """Load, prefill and decode once more than `repeats` times; medians over the later ones.

    `rss_mib` is the highest resident memory after the engine's library was loaded, less what it was then: the model,
    its caches and the engine's buffers. None where the system does not tell, or the engine is another process.
    """
    load_library(path)
    before_mib = resident_mib()
    began = time.perf_counter()
    session = open_session(path, threads)
    load_ms = (time.perf_counter() - began) * 1e3
    context = session.info.context
    decoded = min(decoded, context // 2)
    prompt = min(prompt, context - decoded)
    ids = np.random.default_rng(0).integers(0, session.info.vocab_size, prompt + decoded).tolist()
    prefill_ms, decode_ms = times_ms(session, ids[:prompt], ids[prompt:], repeats)
    peak_mib, apart = highest_mib(), session.info.engine == "tflite-runtime"
    return {
        "engine": session.info.engine,
        "engine_version": session.info.engine_version,
        "threads": session.info.threads,
        "prompt_tokens": prompt,
        "decode_tokens": decoded,
        "rss_mib": None if before_mib is None or apart else round(max(0.0, peak_mib - before_mib), 2),
        "peak_rss_mib": round(peak_mib, 1),
        "load_ms": round(load_ms, 2),
        "prefill_tps": round(prompt / prefill_ms * 1e3, 1),
        "decode_tps": round(decoded / decode_ms * 1e3, 1),
    }


def times_ms(session: Session, prompt: list[int], after: list[int], repeats: int) -> tuple[float, float]:
    """Median milliseconds of the prompt and of all tokens after it; the first time is not counted."""
    found = []
    for _ in range(repeats + 1):
        session.reset()
        prefill = took_ms(lambda: session.prefill(prompt))
        found.append((prefill, sum(took_ms(lambda t=t: session.decode(t)) for t in after)))
    prefills, decodes = zip(*found[1:], strict=True)
    return statistics.median(prefills), statistics.median(decodes)


def took_ms(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def load_library(path: Path) -> None:
    """Load the engine's library, but no model, so that its own size is not counted to the model's."""
    engine, _ = find_engine(path)
    if engine is not None:
        module = importlib.import_module(engine.module)
        getattr(module, "load_engine", lambda: None)()


def resident_mib() -> float | None:
    """Resident memory now, MiB; None where the system has no /proc."""
    return _status_mib("VmRSS")


def highest_mib() -> float:
    """The highest resident memory so far, MiB."""
    return _status_mib("VmHWM") or console.peak_rss_mib()


def _status_mib(name: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return None


def main(arguments: list[str] | None = None) -> None:
    """The command that gori starts for each measurement."""
    parser = argparse.ArgumentParser(prog="gori.runtime.measure", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--decode", type=int, default=DECODED)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    a = parser.parse_args(arguments)
    json.dump(measure(a.artifact, a.threads, a.prompt, a.decode, a.repeats), sys.stdout)


if __name__ == "__main__":
    main()
