"""What a sweep leaves to be read: report.html with its Pareto plots, table.csv and table.json.

The page is static and self-contained: no script, no font, no picture from elsewhere. Knows rows and a budget, nothing
of how candidates were made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from gori.artifact import os_errors, write_json, write_whole
from gori.quantize import svg
from gori.quantize.budget import Budget
from gori.quantize.pareto import (
    MORE_IS_BETTER,
    Row,
    deciding,
    front,
    interval,
    nearest_misses,
    number,
    ranked,
    tied,
    winner,
)
from gori.quantize.sweep_table import (
    CANDIDATE,
    COLUMNS,
    candidate_label,
    csv_text,
    live_table,
    miss_text,
    shared_fields,
    text_table,
    verdict_text,
)

__all__ = ["candidate_label", "live_table", "text_table", "write"]
SCHEMA_VERSION = 1
GROUPED_BY = ("student", "scheme", "method", "embedding", "target", "bits_per_weight")
"""Shape and colour tell apart the first of these that differs between candidates."""
OTHER = "other"
SHOWN_APART = ("title", "command", "students")


@dataclass(frozen=True)
class View:
    """One plot of the page."""

    id: str
    title: str
    x: str
    y: str
    y_kind: str = "linear"


SHARES = {"calls": "calls kept", "exact": "exact calls"}
"""The figures that may decide (gori.quantize.pareto), as titles name them."""


def views(first: str) -> tuple[View, ...]:
    """The plots of a page on which `first`, one of SHARES, decides."""
    said = SHARES[first]
    return (
        View(f"size-{first}", f"A. Size of the file, {said}", "size_bytes", first, "kept"),
        View("size-kl", "B. Size of the file, KL", "size_bytes", "kl_mean", "log"),
        View(f"decode-{first}", f"C. Decode speed, {said}", "decode_tps", first, "kept"),
        View(f"rss-{first}", f"D. Resident memory, {said}", "rss_mib", first, "kept"),
    )


AXIS_NAMES = {
    "size_bytes": "size of the file, {unit}",
    "rss_mib": "resident memory above the process's start, MiB",
    "decode_tps": "decode, tokens/s",
    "calls": "calls kept in the worse language, %",
    "exact": "exact calls in the worse language, %",
    "kl_mean": "mean KL from the float student, nats",
}


def write(out: Path, rows: Sequence[Row], budget: Budget | None, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write `out`/report.html, table.csv and table.json; returns the last one's content.

    `meta` says how the sweep was run: `title` and `command`, `students` with the facts of a sizing
    (gori.quantize.sizing), and any further names with text, numbers, lists or mappings (hashes, versions, rows, seed),
    which are shown at the end of the page.
    """
    body = table(rows, budget, meta)
    page = html(rows, budget, meta)
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # a byte-order mark: without it Excel takes UTF-8 for the system's code page
        write_whole(out / "table.csv", csv_text(rows, budget).encode("utf-8-sig"))
        write_whole(out / "report.html", page.encode())
    write_json(out / "table.json", body)
    return body


def table(rows: Sequence[Row], budget: Budget | None, meta: Mapping[str, Any]) -> dict[str, Any]:
    """table.json: every row, the fronts, the winner, and who came nearest. Figures that are not finite are null."""
    best = winner(rows, budget)
    return finite(
        {
            "schema_version": SCHEMA_VERSION,
            "meta": dict(meta),
            "budget": budget.text if budget else None,
            "winner": best["key"] if best else None,
            "verdicts": budget.verdict(best["metrics"]) if best and budget else [],
            "tied_with_winner": [r["key"] for r in tied(rows, budget)],
            "nearest_misses": [
                {"key": r["key"], "verdicts": budget.verdict(r["metrics"])}
                for r in nearest_misses(rows, budget)
                if budget
            ],
            "fronts": {v.id: front(rows, (v.x, v.y)) for v in views(deciding(rows))},
            "rows": [dict(r) for r in ranked(rows, budget)],
        }
    )


def finite(value: Any) -> Any:
    """The same value with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def html(rows: Sequence[Row], budget: Budget | None, meta: Mapping[str, Any]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("gori").joinpath("sweep.html.jinja").read_text(encoding="utf-8")
    order, hidden, groups = ranked(rows, budget), shared_fields(rows), grouping(rows)
    numbers = {r["key"]: i for i, r in enumerate(order, 1)}
    first = deciding(rows)
    plots = {v: p for v in views(first) if (p := plot(v, order, budget, numbers, hidden))}
    return environment.from_string(source).render(
        meta=meta,
        facts=list(flat({k: v for k, v in meta.items() if k not in SHOWN_APART})),
        sizing=meta.get("students"),
        budget=budget,
        best=winner(rows, budget),
        tied=tied(rows, budget),
        misses=nearest_misses(rows, budget),
        done=[r for r in order if r["state"] == "done"],
        failed=[r for r in order if r["state"] != "done"],
        alike=candidate_label(order[0]["candidate"], [k for k in CANDIDATE if k not in hidden]) if order else "",
        numbers=numbers,
        name=lambda row: candidate_label(row["candidate"], hidden),
        verdict_text=lambda row: verdict_text(row, budget),
        miss_text=miss_text,
        columns=COLUMNS,
        fronts={v.id: set(front(rows, (v.x, v.y))) for v in plots},
        first=first,
        kind=groups.kind,
        legend=[(name, svg.SHAPES[i], svg.COLOURS[i]) for name, i in groups.names.items()],
        plots=list(plots.values()),
        absent=[v.title for v in views(first) if v not in plots],
        area=(svg.WIDTH, svg.HEIGHT, svg.LEFT, svg.RIGHT, svg.TOP, svg.BOTTOM),
    )


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as names and texts: `versions.torch`, `2.13`."""
    found: list[tuple[str, str]] = []
    for k, v in value.items():
        if isinstance(v, Mapping):
            found += flat(v, f"{prefix}{k}.")
        else:
            found.append((f"{prefix}{k}", ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)))
    return found


@dataclass(frozen=True)
class Groups:
    """Which candidates share a shape and a colour."""

    kind: str | None
    """The part of a candidate that tells groups apart; None where all are alike."""
    names: dict[str, int]
    """Each group and the number of its shape and colour."""

    def of(self, row: Row) -> int:
        if self.kind is None:
            return 0
        name = _part(row, self.kind)
        return self.names[name if name in self.names else OTHER]


def grouping(rows: Sequence[Row]) -> Groups:
    """Groups of the candidates that are done by the first part that differs; those beyond the shapes share the last."""
    rows = [r for r in rows if r["state"] == "done"]
    kind = next((k for k in GROUPED_BY if len({_part(r, k) for r in rows}) > 1), None)
    names = [name for name, _ in Counter(_part(r, kind) for r in rows).most_common()] if kind else []
    most = len(svg.SHAPES)
    shown = sorted(names) if len(names) <= most else [*sorted(names[: most - 1]), OTHER]
    return Groups(kind, {name: i for i, name in enumerate(shown)})


def _part(row: Row, kind: str) -> str:
    value = row["candidate"].get(kind)
    return "none" if value is None else str(value)


def plotted(view: View, rows: Sequence[Row]) -> list[Row]:
    """Rows that have both figures of a plot, and can stand on its axes."""
    found = [r for r in rows if number(r, view.x) is not None and number(r, view.y) is not None]
    return [r for r in found if view.y_kind != "log" or (number(r, view.y) or 0) > 0]


def plot(
    view: View, rows: Sequence[Row], budget: Budget | None, numbers: Mapping[str, int], hidden: Sequence[str]
) -> svg.Scatter | None:
    """One view of the candidates; None where no candidate has both figures."""
    shown = plotted(view, rows)
    if not shown:
        return None
    keys, best, groups = set(front(shown, (view.x, view.y))), winner(rows, budget), grouping(rows)
    points = [
        svg.Point(
            x=number(r, view.x) or 0.0,
            y=number(r, view.y) or 0.0,
            name=f"{numbers[r['key']]}: {candidate_label(r['candidate'], hidden)}",
            number=numbers[r["key"]],
            group=groups.of(r),
            on_front=r["key"] in keys,
            best=best is not None and r["key"] == best["key"],
            y_interval=interval(r, view.y),
        )
        for r in shown
    ]
    ends = [end for p in points if (p.on_front or p.best) and p.y_interval for end in p.y_interval]
    x = axis(view.x, "linear", [p.x for p in points], [], budget)
    y = axis(view.y, view.y_kind, [p.y for p in points], ends, budget)
    return svg.scatter(view.id, view.title, description(points, x, y), x, y, points)


LEAST = {"calls": 0.02, "exact": 0.02, "kl_mean": 0.5}
"""What an axis spans at least; of other figures a tenth of the largest value."""


def axis(metric: str, kind: str, values: Sequence[float], ends: Sequence[float], budget: Budget | None) -> svg.Axis:
    """An axis over a figure's values and the ends of intervals, with the budget's bound on it."""
    if kind == "kept" and max(values) - min(values) < 0.1:
        kind = "linear"  # nothing to spread
    bound = budget.bound(metric) if budget else None
    shown = [*values, *(e for e in ends if kind != "log" or e > 0)]
    scale = svg.scale_of(shown, kind, bound.bound if bound else None, LEAST.get(metric, 0.1 * max(values)))
    unit, factor = "", 1.0
    if metric == "size_bytes":
        unit, factor = _unit(scale.high)
    elif metric in SHARES:
        factor = 0.01
    decimals = svg.Scale(scale.low / factor, scale.high / factor).decimals

    def text(v: float) -> str:
        if kind != "linear":
            return f"{v:.0e}".replace("e-0", "e-") if v < 1e-3 else f"{v / factor:.4g}"
        return f"{v / factor:,.{decimals}f}"

    name = AXIS_NAMES[metric].format(unit=unit)
    is_lower = MORE_IS_BETTER[metric]
    return svg.Axis(name, scale, text, is_lower, bound.bound if bound else None, bound.text if bound else "")


def _unit(size_bytes: float) -> tuple[str, float]:
    return next(((u, f) for u, f in (("GB", 1e9), ("MB", 1e6)) if size_bytes >= 2 * f), ("kB", 1e3))


def description(points: Sequence[svg.Point], x: svg.Axis, y: svg.Axis) -> str:
    """What a plot shows, in words."""
    best = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    span = ", ".join(
        f"{a.name} from {a.text(min(v))} to {a.text(max(v))}"
        for a, v in ((x, [p.x for p in points]), (y, [p.y for p in points]))
    )
    names = "; ".join(f"{p.name} ({x.text(p.x)}, {y.text(p.y)})" for p in best)
    return f"{len(points)} candidates: {span}. On the front: {names}."
