"""One round of a .litertlm, timed by LiteRT-LM's own benchmark: the same keys as bench_round's.

The engine takes text, pads or cuts it to the length that is asked for, and tells rates of whole runs, each with a
freshly made engine: no single tokens, so a round's decode has one mean a run, and the 95th percentile is one of means.
It stops where the model says a stop token; `decode_tokens` is what was really decoded, which may be none. Its caches
and activations are of the type that it chooses itself.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gori import console
from gori.errors import GoriError
from gori.runtime.bench_round import FIRST_TOKEN_PROMPT
from gori.runtime.litert_lm import CHATTER, DEFAULT_THREADS, load_engine
from gori.runtime.measure import highest_mib, resident_mib

REPEATS = 3


def run(file: Path, threads: int | None, prompts: Sequence[int], decoded: int) -> dict[str, Any]:
    """Times of a bundle; a prompt that the engine does not take is left out and named."""
    engine, count = load_engine(), threads or DEFAULT_THREADS
    before_mib = resident_mib()
    with tempfile.TemporaryDirectory() as scratch, console.without_lines(*CHATTER):

        def once(prompt: int, tokens: int) -> Any:
            backend = engine.Backend.CPU(thread_count=count)
            return engine.Benchmark(
                str(file), backend, prefill_tokens=prompt, decode_tokens=tokens, cache_dir=scratch
            ).run()

        try:
            cold = once(FIRST_TOKEN_PROMPT, decoded)
            answers = [once(FIRST_TOKEN_PROMPT, decoded) for _ in range(REPEATS)]
            runs = {n: [once(n, 1) for _ in range(REPEATS)] for n in prompts}
        except RuntimeError as e:
            raise GoriError(f"{file} is not a .litertlm that this LiteRT-LM runs ({e}): export it again") from e
    if not answers[0].last_prefill_token_count:
        raise GoriError(f"{file} takes no prompt of {FIRST_TOKEN_PROMPT} tokens: export it with a larger --context")
    taken = {n: found for n, found in runs.items() if found[0].last_prefill_token_count == n}
    return {
        "engine": "LiteRT-LM",
        "engine_version": importlib.metadata.version("litert-lm-api"),
        "threads": count,
        "file_bytes": file.stat().st_size,
        "context": None,
        "stand_in": False,
        "load_ms": cold.init_time_in_second * 1e3,
        "rss_mib": None if before_mib is None else max(0.0, highest_mib() - before_mib),
        "peak_rss_mib": highest_mib(),
        "prompt_skipped": [n for n in prompts if n not in taken],
        "first_token_prompt": FIRST_TOKEN_PROMPT,
        "decode_tokens": round(statistics.median(a.last_decode_token_count for a in answers)),
        "prefill_ms": {
            str(n): [n / r.last_prefill_tokens_per_second * 1e3 for r in found] for n, found in taken.items()
        },
        "first_token_ms": [a.time_to_first_token_in_second * 1e3 for a in answers if a.last_decode_token_count],
        "decode_ms": [1e3 / a.last_decode_tokens_per_second for a in answers if a.last_decode_token_count],
    }
