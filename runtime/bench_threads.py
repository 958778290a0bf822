"""How many threads pay for an artifact on this machine, by measuring: `--threads auto`.

Two threads were slower than one where both cores had other work, and one model's decode gains what another's loses: so
no rule, but a typical call, timed with each count in fresh processes, in turn. The answer holds for this machine as
busy as it is now.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gori import console
from gori.errors import GoriError
from gori.runtime.bench import Round, cores, one_round
from gori.runtime.bench_round import FIRST_TOKEN_PROMPT

DECODED, ROUNDS = 16, 3
"""A typical call is a prompt of FIRST_TOKEN_PROMPT tokens and DECODED tokens after it."""
ALL_UP_TO = 4
MUST_GAIN = 0.03
"""More threads are chosen only if they save more than this share of the time: they cost energy and other work."""


def counts(most: int) -> list[int]:
    """Which counts are tried on a machine of `most` cores: each up to 4, then doubled, and all."""
    doubled = [2**i for i in range(3, most.bit_length()) if 2**i <= most]
    return sorted({*range(1, min(ALL_UP_TO, most) + 1), *doubled, most})


def choose(path: Path, measure: Callable[[Path, int | None, Sequence[int], int], Round] = one_round) -> dict[str, Any]:
    """`{"chosen": N, "call_ms": {count: milliseconds}, …}`: the fewest threads that are as good as the fastest."""
    tried = counts(cores())
    took: dict[int, list[float]] = {n: [] for n in tried}
    with console.steps(f"threads for {path}", ROUNDS * len(tried)) as bar:
        for i in range(ROUNDS):
            for k, n in enumerate(tried):
                took[n].append(call_ms(path, measure(path, n, (), DECODED)))
                bar.update(i * len(tried) + k + 1, f"{n} threads")
    medians = {n: statistics.median(times) for n, times in took.items()}
    chosen = next(n for n in tried if medians[n] * (1 - MUST_GAIN) <= min(medians.values()))
    call = {"prompt_tokens": FIRST_TOKEN_PROMPT, "decode_tokens": DECODED, "rounds": ROUNDS}
    return {"chosen": chosen, "call_ms": {str(n): round(t, 3) for n, t in medians.items()}, **call}


def call_ms(path: Path, found: Round) -> float:
    """The time of a typical call: to the first token, and of those after it."""
    if not found["decode_ms"]:
        raise GoriError(f"{path} decodes no token after a prompt, so no call can be timed: name a number of threads")
    return statistics.median(found["first_token_ms"]) + DECODED * statistics.median(found["decode_ms"])
