"""How fast and how large artifacts are, side by side: each round is a fresh process for each of them in turn.

A B A B…: what disturbs a machine for seconds disturbs neighbours in a round alike, so the ratio is taken in each round
and its median is what is told. Knows what a round gives (bench_round), not how an engine is timed, and nothing of
tables. No torch.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gori import console
from gori.children import printed
from gori.errors import GoriError
from gori.runtime.bandwidth import ONE_THREAD, last_level_cache_bytes
from gori.runtime.litert_lm import BUNDLE
from gori.runtime.session import find_engine, open_session
from gori.runtime.step_bytes import step_bytes

Round = dict[str, Any]
"""What one process measured; the keys are those of bench_round.run."""
FACTS = ("engine", "engine_version", "threads", "file_bytes", "context", "stand_in", "prompt_skipped")
SIZES = ("load_ms", "rss_mib", "peak_rss_mib")


@dataclass(frozen=True)
class Entry:
    """One of those that are compared."""

    label: str
    measure: Callable[[], Round]
    """One round, in a process of its own."""
    path: Path | None = None
    """The artifact, beside which config.json says what a step must read."""


def entry(path: Path, threads: int | None, prompts: Sequence[int], decoded: int) -> Entry:
    """An artifact that a Session or LiteRT-LM runs; GoriError, before anything is measured, where nothing opens it."""
    bundle = path.suffix == Path(BUNDLE).suffix and path.is_file()
    if not bundle and find_engine(path)[0] is None:
        open_session(path)  # says what is wrong with it
    return Entry(str(path), lambda: one_round(path, threads, prompts, decoded), path)


def runner_entries(
    program: Path,
    artifacts: Sequence[tuple[Path, int | None]],
    prompts: Sequence[int],
    decoded: int,
) -> list[Entry]:
    """The C++ runner's gori-bench on those of the artifacts, each with its threads, that are ExecuTorch's."""
    found = []
    for path, threads in artifacts:
        engine, file = find_engine(path)
        if engine is not None and engine.name == "executorch":
            command = [str(program.resolve()), *_times(prompts, decoded, threads or 1), str(file)]
            label = f"{program.name} {path}"
            found.append(Entry(label, partial(printed, command, label), path))
    if not found:
        raise GoriError(f"{program} runs .pte files, and none of the artifacts is one: export one for executorch")
    return found


def _times(prompts: Sequence[int], decoded: int, threads: int | None) -> list[str]:
    """What to time, as arguments that a round's process takes in Python and in C++."""
    arguments = ["--decode", str(decoded), *(a for n in prompts for a in ("--prompt", str(n)))]
    return arguments + ([] if threads is None else ["--threads", str(threads)])


def one_round(path: Path, threads: int | None, prompts: Sequence[int], decoded: int) -> Round:
    """A round of an artifact in a fresh process."""
    arguments = _times(prompts, decoded, threads)
    return printed([sys.executable, "-m", "gori.runtime.bench_round", str(path), *arguments], str(path))


def bandwidth(threads: Sequence[int]) -> Round:
    """The machine's read bandwidth now, in a fresh process; see gori.runtime.bandwidth."""
    arguments = [a for n in threads for a in ("--threads", str(n))]
    command = [sys.executable, "-m", "gori.runtime.bandwidth", *arguments]
    return printed(command, "the read bandwidth", environment={**os.environ, **ONE_THREAD})


def compare(entries: Sequence[Entry], rounds: int) -> dict[str, Any]:
    """Measure all in turn, `rounds` times, and the read bandwidth once a round.

    Of every time the median over rounds of a round's median; `against_first` has the first one's time over this one's
    (above 1: this one is faster; memory: this one's over the first's), the median of the rounds' ratios, their lowest
    and highest, and of times the ratio of the shortest ones, which other work on the machine disturbed the least.
    """
    measured: list[list[Round]] = [[] for _ in entries]
    read: list[Round] = []
    with console.steps("bench", rounds * len(entries)) as bar:
        for i in range(rounds):
            for k, e in enumerate(entries):
                measured[k].append(e.measure())
                bar.update(i * len(entries) + k + 1, f"round {i + 1}, {e.label}")
            read.append(bandwidth(sorted({1, *(m[0]["threads"] for m in measured)})))
    return {
        "rounds": rounds,
        "cores": cores(),
        "bandwidth": {
            "buffer_bytes": read[0]["buffer_bytes"],
            "last_level_cache_bytes": last_level_cache_bytes(),
            "gb_per_s": {n: round(max(r["gb_per_s"][n] for r in read), 2) for n in read[0]["gb_per_s"]},
        },
        "artifacts": [
            {**described(e, found, read), **({"against_first": against(measured[0], found)} if k else {})}
            for k, (e, found) in enumerate(zip(entries, measured, strict=True))
        ],
    }


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described(e: Entry, found: Sequence[Round], read: Sequence[Round]) -> dict[str, Any]:
    """One artifact's figures."""
    first = found[0]
    body = {"path": e.label, **{k: first[k] for k in FACTS}}
    for k in SIZES:
        body[k] = None if first[k] is None else round(statistics.median(r[k] for r in found), 2)
    body["prefill"] = {n: row([r["prefill_ms"][n] for r in found], int(n)) for n in first["prefill_ms"]}
    body["first_token"] = row([r["first_token_ms"] for r in found])
    body["first_token_prompt"], body["decode_tokens"] = first["first_token_prompt"], first["decode_tokens"]
    body["decode"] = row([r["decode_ms"] for r in found], 1)
    return body | {"step": step(e, found, read)}


def row(rounds_ms: Sequence[Sequence[float]], tokens: int | None = None) -> dict[str, float] | None:
    """Milliseconds: the median of the rounds' medians, their lowest and highest, the 95th percentile of all; None if
    a round timed nothing."""
    if not all(rounds_ms):
        return None
    medians = [statistics.median(r) for r in rounds_ms]
    p50 = statistics.median(medians)
    out = {"p50_ms": p50, "low_ms": min(medians), "high_ms": max(medians)}
    out["p95_ms"] = float(np.quantile([t for r in rounds_ms for t in r], 0.95))
    rate = {} if tokens is None else {"tokens_per_second": round(tokens / p50 * 1e3, 1)}
    return {k: round(v, 4) for k, v in out.items()} | rate


def step(e: Entry, found: Sequence[Round], read: Sequence[Round]) -> dict[str, Any]:
    """Bytes that a decoded token must read, how many a second that makes, and the share of what the machine read in
    the same round with as many threads."""
    counted = step_bytes(e.path) if e.path else "it is no artifact of gori"
    if isinstance(counted, str):
        return {"unknown": counted}
    if not all(r["decode_ms"] for r in found):
        return {"unknown": "no token was decoded"}
    first = found[0]
    size = counted.at(first["first_token_prompt"] + (first["decode_tokens"] + 1) / 2)
    rates = [size / statistics.median(r["decode_ms"]) / 1e6 for r in found]
    threads = str(first["threads"])
    shares = [rate / r["gb_per_s"][threads] for rate, r in zip(rates, read, strict=True)]
    return {"bytes": size, "gb_per_s": round(statistics.median(rates), 2), "of_bandwidth": spread(shares)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {k: round(v, 3) for k, v in found.items()}


def against(first: Sequence[Round], other: Sequence[Round]) -> dict[str, Any]:
    """Ratios of what both have, round by round."""

    def faster(take: Callable[[Round], list[float] | None]) -> dict[str, float] | None:
        pairs = [(take(a), take(b)) for a, b in zip(first, other, strict=True)]
        both = [(a, b) for a, b in pairs if a and b]
        if not both:
            return None
        best = min(min(a) for a, _ in both) / min(min(b) for _, b in both)
        return spread([statistics.median(a) / statistics.median(b) for a, b in both]) | {"best": round(best, 3)}

    lengths = [n for n in first[0]["prefill_ms"] if n in other[0]["prefill_ms"]]
    memory = [b["rss_mib"] / a["rss_mib"] for a, b in zip(first, other, strict=True) if a["rss_mib"] and b["rss_mib"]]
    return {
        "prefill": {n: faster(lambda r, n=n: r["prefill_ms"][n]) for n in lengths},
        "decode": faster(lambda r: r["decode_ms"]),
        "first_token": faster(lambda r: r["first_token_ms"]),
        "load": faster(lambda r: None if r["load_ms"] is None else [r["load_ms"]]),
        "rss": spread(memory) if memory else None,
    }
