"""Which candidates of a sweep no other beats, which one wins under a budget, and which came nearest to it.

Works on rows as the sweep's table has them; knows nothing of how they were made or shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gori.quantize.budget import Budget, measured

Row = Mapping[str, Any]
MORE_IS_BETTER: dict[str, bool] = {
    "size_bytes": False,
    "calls": True,
    "exact": True,
    "kl_mean": False,
    "kl_p99": False,
    "top1": True,
    "perplexity_ratio": False,
    "rss_mib": False,
    "load_ms": False,
    "prefill_tps": True,
    "decode_tps": True,
}
"""The figures that fronts are drawn over, and their direction."""
ORDER = ("size_bytes", "kl_mean", "decode_tps", "rss_mib")
"""What decides between candidates that are equal in the `deciding` figure: the smaller file, then less KL, then faster
decode, then less memory, then the key. A figure that was not measured comes last."""


def deciding(rows: Sequence[Row]) -> str:
    """The figure that decides: `calls`, the share kept of the float student's, or `exact` where there are several
    students. Each keeps its own, and a poor one that keeps all is not the better one."""
    return "exact" if len({r["candidate"].get("student") for r in rows}) > 1 else "calls"


def number(row: Row, metric: str) -> float | None:
    """A finite figure of a candidate that is done, else None."""
    return measured(row["metrics"], metric) if row["state"] == "done" else None


def interval(row: Row, metric: str) -> tuple[float, float] | None:
    """The interval `[low, high]` of a figure NAME, which its metrics hold as `NAME_ci`; None where they do not."""
    m = row["metrics"] if row["state"] == "done" else {}
    pair = m.get(f"{metric}_ci")
    if metric == "exact" and m.get("exact_by_language"):  # `measured` gives the worse language's
        worst = min(m["exact_by_language"], key=m["exact_by_language"].__getitem__)
        pair = (m.get("exact_by_language_ci") or {}).get(worst)
    return (float(pair[0]), float(pair[1])) if pair else None


def loss(row: Row, metric: str) -> float:
    """A figure turned so that less is better; inf where there is none."""
    value = number(row, metric)
    if value is None:
        return math.inf
    return -value if MORE_IS_BETTER[metric] else value


def front(rows: Sequence[Row], axes: Sequence[str]) -> list[str]:
    """Keys of the rows that no other dominates: none is at least as good on every axis and better on one.

    `axes` are keys of MORE_IS_BETTER. Failed rows, and rows that lack one of the axes, are neither on a front nor
    dominate; rows that are equal on every axis stand or fall together. Sorted from best to worst on the first axis. A
    row can only be dominated by one that comes before it in lexicographic order, so comparing with the front so far is
    enough (Chomicki et al., Skyline with presorting, ICDE 2003).
    """
    found: list[tuple[tuple[float, ...], str]] = []
    points = [(tuple(loss(r, a) for a in axes), str(r["key"])) for r in rows]
    for point, key in sorted(p for p in points if all(map(math.isfinite, p[0]))):
        if not any(dominates(other, point) for other, _ in found):
            found.append((point, key))
    return [key for _, key in found]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere more than `b` and somewhere less."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def rank(row: Row, first: str) -> tuple[Any, ...]:
    """What candidates that fit are sorted by: the deciding figure, ORDER, then the key."""
    return (*(loss(row, metric) for metric in (first, *ORDER)), str(row["key"]))


def fitting(rows: Sequence[Row], budget: Budget | None) -> list[Row]:
    """The candidates that are done and fit the budget (None: all that are done), best first."""
    done, first = [r for r in rows if r["state"] == "done"], deciding(rows)
    return sorted((r for r in done if budget is None or budget.fits(r["metrics"])), key=lambda r: rank(r, first))


def winner(rows: Sequence[Row], budget: Budget | None) -> Row | None:
    """The best candidate that fits the budget, by `rank`; None where none fits."""
    return next(iter(fitting(rows, budget)), None)


def tied(rows: Sequence[Row], budget: Budget | None) -> list[Row]:
    """The other fitting candidates that this data cannot tell from the winner, best first: those whose intervals of the
    deciding figure overlap the winner's, or, without intervals, whose figures are equal."""
    (best, *others), first = fitting(rows, budget) or [{}], deciding(rows)
    return [r for r in others if _overlap(_span(best, first), _span(r, first))]


def _span(row: Row, metric: str) -> tuple[float, float] | None:
    value = number(row, metric)
    return interval(row, metric) or (None if value is None else (value, value))


def _overlap(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    return a is not None and b is not None and a[0] <= b[1] and b[0] <= a[1]


def nearest_misses(rows: Sequence[Row], budget: Budget | None, n: int = 3) -> list[Row]:
    """The `n` candidates that come nearest to a budget without fitting it: least largest relative miss, then fewest
    bounds missed, then `rank`. Candidates that failed are left out."""
    if budget is None:
        return []

    first = deciding(rows)

    def order(row: Row) -> tuple[Any, ...]:
        missed = sum(not v["met"] for v in budget.verdict(row["metrics"]))
        return (budget.largest_miss(row["metrics"]), missed, *rank(row, first))

    return sorted((r for r in rows if r["state"] == "done" and not budget.fits(r["metrics"])), key=order)[:n]


def ranked(rows: Sequence[Row], budget: Budget | None) -> list[Row]:
    """All rows as a table shows them: those that fit, the nearest misses, then those that failed."""
    failed = sorted((r for r in rows if r["state"] != "done"), key=lambda r: str(r["key"]))
    return [*fitting(rows, budget), *nearest_misses(rows, budget, len(rows)), *failed]
