"""How fast and how large a Session is: load, prefill, decode, first token, resident memory. No torch of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori import console
from gori.runtime.session import Session, open_session


def _times_ms(run: Callable[[], object], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        out.append((time.perf_counter() - began) * 1e3)
    return out


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """p50 and p95 of milliseconds."""
    return {
        "p50_ms": round(statistics.median(times_ms), 3),
        "p95_ms": round(float(np.quantile(times_ms, 0.95)), 3),
    }


def bench(path: Path, threads: int | None, prompts: Sequence[int], decode_tokens: int, repeats: int) -> dict[str, Any]:
    """Measure one artifact. `prompts` are prefill lengths in tokens; those that do not fit the context are left out and
    named. Token ids are random but the same for every artifact of one vocabulary size."""
    began = time.perf_counter()
    session = open_session(path, threads)
    load_ms = (time.perf_counter() - began) * 1e3
    info = session.info
    ids = np.random.default_rng(0).integers(0, info.vocab_size, info.context).tolist()
    fitting = [n for n in prompts if n < info.context]
    out: dict[str, Any] = {
        "engine": info.engine,
        "engine_version": info.engine_version,
        "threads": info.threads,
        "file_bytes": info.file_bytes,
        "load_ms": round(load_ms, 1),
        "prefill": {str(n): _prefill(session, ids[:n], repeats) for n in fitting},
        "prefill_skipped": [n for n in prompts if n not in fitting],
        "decode": _decode(session, ids, decode_tokens, repeats),
        "peak_rss_mib": round(console.peak_rss_mib(), 1),
    }
    return out


def _prefill(session: Session, ids: list[int], repeats: int) -> dict[str, float]:
    def run() -> None:
        session.reset()
        session.prefill(ids)

    run()
    times = _times_ms(run, repeats)
    return {**percentiles(times), "tokens_per_second": round(len(ids) / statistics.median(times) * 1e3, 1)}


def _decode(session: Session, ids: list[int], count: int, repeats: int) -> dict[str, float]:
    """Times of single tokens after a short prompt; `ids` fill the context, which bounds how many there are."""
    times, prompt = [], min(16, len(ids) // 2)
    for _ in range(repeats):
        session.reset()
        session.prefill(ids[:prompt])
        for token in ids[prompt : prompt + count]:
            times += _times_ms(lambda token=token: session.decode(token), 1)
    return {**percentiles(times), "tokens_per_second": round(1e3 / statistics.median(times), 1)}
