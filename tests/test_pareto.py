"""Fronts against their definition by brute force; winners, ties and nearest misses against plain sorting rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.quantize.budget import parse
from gori.quantize.pareto import MORE_IS_BETTER, deciding, fitting, front, nearest_misses, ranked, tied, winner

AXES = ("size_bytes", "calls", "kl_mean")
figures = st.one_of(st.integers(0, 4).map(float), st.none(), st.sampled_from([math.nan, math.inf]))


def row(key: str, state: str = "done", **metrics: Any) -> dict[str, Any]:
    return {"key": key, "state": state, "candidate": {"scheme": "w4a8-g32"}, "metrics": metrics, "error": None}


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows with few distinct values, so that ties, gaps and failures are common."""
    states = st.sampled_from(["done"] * 6 + ["failed"])
    made = draw(st.lists(st.tuples(states, st.fixed_dictionaries(dict.fromkeys(AXES, figures))), max_size=14))
    return [row(f"k{i}", state, **metrics) for i, (state, metrics) in enumerate(made)]


def by_definition(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> set[str]:
    """Every row that no row beats, by comparing all with all."""
    whole = [r for r in rows if r["state"] == "done" and all(r["metrics"][a] is not None for a in axes)]
    whole = [r for r in whole if all(math.isfinite(r["metrics"][a]) for a in axes)]

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        better = {x: (a["metrics"][x] - b["metrics"][x]) * (1 if MORE_IS_BETTER[x] else -1) for x in axes}
        return min(better.values()) >= 0 and max(better.values()) > 0

    return {r["key"] for r in whole if not any(beats(other, r) for other in whole)}


@given(tables(), st.sampled_from([AXES[:1], AXES[:2], AXES[1:], AXES]))
def test_a_front_is_exactly_what_nothing_dominates(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> None:
    found = front(rows, axes)
    assert len(found) == len(set(found))
    assert set(found) == by_definition(rows, axes)
    assert set(found) == set(front(rows[::-1], axes))


def test_rows_that_are_equal_stand_on_a_front_together() -> None:
    rows = [row("a", size_bytes=1, calls=0.9), row("b", size_bytes=1, calls=0.9), row("c", size_bytes=1, calls=0.8)]
    assert front(rows, ("size_bytes", "calls")) == ["a", "b"]


def test_the_winner_keeps_most_calls_then_is_smaller_then_diverges_less() -> None:
    budget = parse("size=2kB")
    rows = [
        row("big", size_bytes=9000, calls=1.0, kl_mean=0.0),
        row("e", size_bytes=1900, calls=0.98, kl_mean=0.1),
        row("d", size_bytes=1800, calls=0.98, kl_mean=0.3),
        row("c", size_bytes=1800, calls=0.98, kl_mean=0.2),
        row("b", size_bytes=1800, calls=0.98, kl_mean=0.2, decode_tps=5),
        row("a", size_bytes=1800, calls=0.97, kl_mean=0.0),
        row("f", "failed"),
    ]
    assert [r["key"] for r in fitting(rows, budget)] == ["b", "c", "d", "e", "a"]
    assert winner(rows, budget) == rows[4]
    assert (winner(rows, None) or {})["key"] == "big"
    assert [r["key"] for r in ranked(rows, budget)] == ["b", "c", "d", "e", "a", "big", "f"]
    assert winner(rows, parse("size=1kB")) is None
    assert tied(rows, parse("size=1kB")) == []
    assert winner([], None) is None


def test_tied_are_those_that_fit_and_whose_intervals_overlap_the_winners() -> None:
    rows = [
        row("best", size_bytes=1500, calls=0.99, calls_ci=[0.97, 1.0]),
        row("touches", size_bytes=1500, calls=0.95, calls_ci=[0.93, 0.97]),
        row("below", size_bytes=1500, calls=0.94, calls_ci=[0.92, 0.96]),
        row("too large", size_bytes=9000, calls=0.985, calls_ci=[0.96, 1.0]),
        row("exact", size_bytes=1500, calls=0.98),
        row("unknown", size_bytes=1500),
    ]
    assert [r["key"] for r in tied(rows, parse("size=2kB"))] == ["exact", "touches"]


def test_between_students_exact_calls_of_the_worse_language_decide_and_tie() -> None:
    def of(student: str, ko: float, en: float, **metrics: Any) -> dict[str, Any]:
        exact = {"exact": (ko + en) / 2, "exact_by_language": {"ko": ko, "en": en}}
        ci = {"ko": [ko - 0.05, ko + 0.05], "en": [en - 0.01, en + 0.01]}
        made = row(f"{student}{metrics}", **exact, exact_by_language_ci=ci, exact_ci=[0, 1], **metrics)
        return {**made, "candidate": {"student": student}}

    rows = [of("a", 0.5, 0.9, calls=1.0), of("b", 0.7, 0.72, calls=0.9), of("b", 0.64, 0.99, calls=0.99)]
    assert [r["metrics"]["calls"] for r in fitting(rows, None)] == [0.9, 0.99, 1.0]
    assert tied(rows, None) == [rows[2]]
    assert deciding(rows) == "exact"
    assert deciding(rows[1:]) == "calls"
    assert [r["metrics"]["calls"] for r in fitting(rows[1:], None)] == [0.99, 0.9]


def test_nearest_is_the_least_largest_miss_and_what_was_not_measured_comes_last() -> None:
    budget = parse("size=1kB,calls=0.9")
    rows = [
        row("unmeasured", size_bytes=1001),
        row("two", size_bytes=1100, calls=0.81),
        row("one", size_bytes=1100, calls=0.95),
        row("far", size_bytes=1500, calls=0.95),
        row("fits", size_bytes=900, calls=0.95),
        row("failed", "failed"),
    ]
    assert [r["key"] for r in nearest_misses(rows, budget)] == ["one", "two", "far"]
    assert [r["key"] for r in nearest_misses(rows, budget, 9)] == ["one", "two", "far", "unmeasured"]
    assert nearest_misses(rows, None) == []


@given(tables(), st.integers(1, 4), st.integers(1, 4))
def test_every_row_is_ranked_once_and_fitting_ones_come_first(
    rows: list[dict[str, Any]], kb: int, quarters: int
) -> None:
    for r in rows:
        r["metrics"] = {**r["metrics"], "size_bytes": (r["metrics"]["size_bytes"] or 0) * 1000}
    budget = parse(f"size={kb}kB,calls={quarters / 4}")
    order = ranked(rows, budget)
    assert sorted(r["key"] for r in order) == sorted(r["key"] for r in rows)
    place = [2 if r["state"] == "failed" else 0 if budget.fits(r["metrics"]) else 1 for r in order]
    assert place == sorted(place)
    misses = [budget.largest_miss(r["metrics"]) for r, p in zip(order, place, strict=True) if p == 1]
    assert misses == sorted(misses)
    fit = [r["metrics"]["calls"] for r, p in zip(order, place, strict=True) if p == 0]
    best = winner(rows, budget)
    assert (best and best["metrics"]["calls"]) == (max(fit) if fit else None)


def test_an_unknown_axis_is_our_own_mistake() -> None:
    with pytest.raises(KeyError):
        front([row("a", speed=1.0)], ("speed",))
