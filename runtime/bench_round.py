"""One round of one artifact in a process of its own: `python -m gori.runtime.bench_round ARTIFACT` prints one JSON
object, every time that was taken in it.

A fresh process, because ExecuTorch's pool is the process's and memory and loading only mean something where nothing
was loaded before. Token ids are random, but the same for every artifact of one vocabulary's size. Knows nothing of
other artifacts, medians or ratios. No torch where the engine needs none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori.errors import GoriError
from gori.runtime.litert_lm import BUNDLE
from gori.runtime.measure import highest_mib, load_library, resident_mib, took_ms
from gori.runtime.session import Session, open_session

FIRST_TOKEN_PROMPT = 32
"""Tokens of the prompt of which the time to the first token is taken, and after which tokens are decoded."""
FEWEST, MOST, LONG_ENOUGH_S = 2, 25, 0.25
"""Each thing is timed again until it took so long in all, at least and at most so often; once before is not counted."""


def run(path: Path, threads: int | None, prompts: Sequence[int], decoded: int) -> dict[str, Any]:
    """Open an artifact and time it; prompts longer than its context are left out and named."""
    if path.suffix == Path(BUNDLE).suffix:
        from gori.runtime.bench_litert_lm import run as run_bundle

        return run_bundle(path, threads, prompts, decoded)
    load_library(path)
    before_mib = resident_mib()
    began = time.perf_counter()
    session = open_session(path, threads)
    load_ms = (time.perf_counter() - began) * 1e3
    info = session.info
    first = min(FIRST_TOKEN_PROMPT, info.context // 2)
    decoded = min(decoded, info.context - first)
    times = time_session(session, [n for n in prompts if n <= info.context], first, decoded)
    peak_mib, apart = highest_mib(), info.engine == "tflite-runtime"
    return {
        "engine": info.engine,
        "engine_version": info.engine_version,
        "threads": info.threads,
        "file_bytes": info.file_bytes,
        "context": info.context,
        "stand_in": info.stand_in,
        "load_ms": load_ms,
        "rss_mib": None if before_mib is None or apart else max(0.0, peak_mib - before_mib),
        "peak_rss_mib": None if apart else peak_mib,
        "prompt_skipped": [n for n in prompts if n > info.context],
        "first_token_prompt": first,
        "decode_tokens": decoded,
        **times,
    }


def time_session(session: Session, prompts: Sequence[int], first: int, decoded: int) -> dict[str, Any]:
    """Milliseconds of whole prompts, of a prompt and the choice of its first token, and of every token decoded after
    it."""
    ids = np.random.default_rng(0).integers(0, session.info.vocab_size, session.info.context).tolist()

    def prefill(count: int) -> float:
        session.reset()
        return took_ms(lambda: session.prefill(ids[:count]))

    def answer() -> tuple[float, list[float]]:
        session.reset()
        to_first = took_ms(lambda: int(session.prefill(ids[:first]).argmax()))
        return to_first, [took_ms(lambda t=t: session.decode(t)) for t in ids[first : first + decoded]]

    prefills = {str(n): repeated(lambda n=n: prefill(n)) for n in prompts}
    answers = repeated(answer)
    return {
        "prefill_ms": prefills,
        "first_token_ms": [to_first for to_first, _ in answers],
        "decode_ms": [t for _, tokens in answers for t in tokens],
    }


def repeated(measure: Callable[[], Any]) -> list[Any]:
    """What a measurement gives again and again; the first time is not among it."""
    measure()
    found, began = [], time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - began < LONG_ENOUGH_S):
        found.append(measure())
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command that `gori bench` starts for each round of each artifact. A user's error is printed as
    `{"error": …}` with exit 1, since native code may have the last word on stderr."""
    parser = argparse.ArgumentParser(prog="gori.runtime.bench_round", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, action="append", default=[])
    parser.add_argument("--decode", type=int, default=64)
    a = parser.parse_args(arguments)
    try:
        json.dump(run(a.artifact, a.threads, a.prompt, a.decode), sys.stdout)
    except GoriError as e:
        json.dump({"error": str(e)}, sys.stdout)
        sys.exit(1)


if __name__ == "__main__":
    main()
