"""A sweep's rows as text: names of candidates, figures with their units and intervals, tables for a terminal, CSV.

Knows nothing of how figures were measured, nor of plots.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from gori.quantize.budget import Budget, human_bytes
from gori.quantize.pareto import Row, fitting, interval, number, ranked, tied, winner

CANDIDATE = ("student", "scheme", "method", "embedding", "bits_per_weight", "target")
"""What a candidate is made of, in the order of its name and of the CSV's columns."""
METRICS = (
    "size_bytes", "calls", "calls_language", "kept", "exact", "lost", "gained", "mcnemar_p", "rows", "kl_mean",
    "kl_p99", "kl_max", "top1", "perplexity_ratio", "rss_mib", "load_ms", "prefill_tps", "decode_tps", "speed_rounds",
)  # fmt: skip
INTERVALS = ("calls_ci", "kept_ci", "exact_ci", "kl_mean_ci", "top1_ci", "perplexity_ratio_ci")
BY_LANGUAGE = ("exact_by_language", "kept_by_language")
LIVE_ROWS = 15
NONE = "–"


def candidate_label(candidate: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    """A candidate's name: `w4a8-g32 · gptq · table w8-channel · executorch`."""
    texts = {
        "embedding": "table {}".format,
        "bits_per_weight": "{} bits a weight".format,
    }
    parts = [(k, candidate.get(k)) for k in CANDIDATE if k not in leave_out]
    return " · ".join(texts.get(k, str)(v) for k, v in parts if v is not None and v != "")


def shared_fields(rows: Sequence[Row]) -> list[str]:
    """Parts of a candidate's name, besides scheme and method, that are the same for all and need not be told apart."""
    names = [k for k in CANDIDATE if k not in ("scheme", "method")]
    return [k for k in names if len({str(r["candidate"].get(k)) for r in rows}) <= 1]


@dataclass(frozen=True)
class Column:
    """One figure of a table."""

    header: str
    note: str
    """Its unit, or what it is of."""
    value: Callable[[Row], str]
    more: Callable[[Row], str] = lambda row: ""
    """A second line: an interval, the languages."""
    short: bool = False
    """Whether a terminal's table has it too."""


def _figure(metric: str, text: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = number(row, metric)
        return NONE if value is None else text(value)

    return cell


def _between(metric: str, text: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        pair = interval(row, metric)
        return "" if pair is None else f"{text(pair[0])}–{text(pair[1])}"

    return cell


def _languages(metric: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = row["metrics"].get(metric) or {}
        return " · ".join(f"{k} {100 * v:.1f}" for k, v in sorted(found.items()) if v is not None)

    return cell


def _both(*parts: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: "; ".join(filter(None, (p(row) for p in parts)))


def _flips(row: Row) -> str:
    lost, gained = number(row, "lost"), number(row, "gained")
    return NONE if lost is None or gained is None else f"−{lost:.0f} +{gained:.0f}"


def _share(v: float) -> str:
    return f"{100 * v:.1f}"


COLUMNS = (
    Column("size", "of the file", _figure("size_bytes", human_bytes), short=True),
    Column(
        "calls kept", "%, worse language", _figure("calls", _share),
        _both(_between("calls", _share), _languages("kept_by_language")), short=True,
    ),
    Column("flips", "lost, gained", _flips),
    Column(
        "exact", "% of rows, worse language", _figure("exact", _share),
        _both(_between("exact", _share), _languages("exact_by_language")), short=True,
    ),
    Column("KL", "nats, mean", _figure("kl_mean", "{:.3g}".format), _between("kl_mean", "{:.2g}".format), short=True),
    Column("KL 99 %", "nats", _figure("kl_p99", "{:.3g}".format)),
    Column("same top-1", "%", _figure("top1", _share)),
    Column("perplexity", "× float", _figure("perplexity_ratio", "{:.4g}".format)),
    Column("RSS", "MiB", _figure("rss_mib", "{:.1f}".format), short=True),
    Column("load", "ms", _figure("load_ms", "{:.0f}".format)),
    Column("prefill", "tokens/s", _figure("prefill_tps", "{:,.0f}".format), short=True),
    Column("decode", "tokens/s", _figure("decode_tps", "{:,.0f}".format), short=True),
)  # fmt: skip


def verdict_text(row: Row, budget: Budget | None) -> str:
    """`fits`, or which bounds are missed and by how much of the bound: `misses size by 12 %, calls by 0.4 %`."""
    if budget is None:
        return ""
    missed = [v for v in budget.verdict(row["metrics"]) if not v["met"]]
    parts = [f"{v['name']} {'not measured' if v['miss'] is None else 'by ' + miss_text(v['miss'])}" for v in missed]
    return f"misses {', '.join(parts)}" if parts else "fits"


def miss_text(miss: float) -> str:
    """A relative miss, never shown as nothing."""
    return f"{100 * miss:.2g} %" if miss < 1 else f"{miss:.1f} times"


def text_table(rows: Sequence[Row], budget: Budget | None, most: int | None = None) -> Table:
    """The table that a sweep prints: the winner first and marked ★, those that the data cannot tell from it ≈."""
    table = Table("", "candidate", box=None, pad_edge=False)
    columns = [c for c in COLUMNS if c.short]
    for c in columns:
        table.add_column(c.header, justify="right")
    table.add_column("budget" if budget else "")
    best, equal, hidden = winner(rows, budget), {r["key"] for r in tied(rows, budget)}, shared_fields(rows)
    for i, row in enumerate(ranked(rows, budget)[:most], 1):
        name = candidate_label(row["candidate"], hidden)
        if row["state"] != "done":
            table.add_row(str(i), Text(name), *([Text(NONE)] * len(columns)), Text(f"failed: {row.get('error')}"))
            continue
        is_best = best is not None and row["key"] == best["key"]
        sign = "★" if is_best else "≈" if row["key"] in equal else ""
        cells = [Text(c.value(row)) for c in columns]
        style = "bold" if is_best else None
        table.add_row(Text(f"{i} {sign}"), Text(name), *cells, Text(verdict_text(row, budget)), style=style)
    return table


def live_table(rows: Sequence[Row], running: Sequence[Mapping[str, Any]], total: int) -> Table:
    """What a sweep shows while it works: the best candidates so far, and what is being done.

    `running` holds `{"candidate": {...}, "doing": "export"}` of each candidate at work; `total` counts all candidates.
    """
    done, failed = (sum((r["state"] == "done") == is_done for r in rows) for is_done in (True, False))
    table = text_table([r for r in rows if r["state"] == "done"], None, LIVE_ROWS)
    hidden = shared_fields([*rows, *running])
    for r in running:
        table.add_row("…", Text(candidate_label(r["candidate"], hidden), style="dim"), Text(str(r.get("doing") or "")))
    more = f", {done - LIVE_ROWS} of them not shown" if done > LIVE_ROWS else ""
    ending = f", {failed} failed" if failed else ""
    table.caption = f"{len(rows)} of {total} candidates{more}{ending}"
    table.caption_justify = "left"
    return table


def csv_text(rows: Sequence[Row], budget: Budget | None) -> str:
    """All rows as CSV: one flat column a figure, always in one order, the languages' at the end.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    languages = sorted({x for r in rows for g in BY_LANGUAGE for x in ((r.get("metrics") or {}).get(g) or {})})
    names = [
        "rank", "key", "state", *CANDIDATE, *METRICS, *(f"{n}_{end}" for n in INTERVALS for end in ("low", "high")),
        "fits", "largest_miss", "seconds", "artifact", "error", *(f"{g}_{x}" for g in BY_LANGUAGE for x in languages),
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    fits = {r["key"] for r in fitting(rows, budget)}
    for i, row in enumerate(ranked(rows, budget), 1):
        cells = {"rank": i, "fits": int(row["key"] in fits), **_flat(row), "largest_miss": _largest(row, budget)}
        writer.writerow({k: _cell(v) for k, v in cells.items() if k in names})
    return out.getvalue()


def _largest(row: Row, budget: Budget | None) -> float | None:
    miss = budget.largest_miss(row["metrics"]) if budget and row["state"] == "done" else math.inf
    return miss if math.isfinite(miss) else None


def _flat(row: Row) -> dict[str, Any]:
    metrics = row.get("metrics") or {}
    flat = {k: row.get(k) for k in ("key", "state", "seconds", "artifact", "error")}
    flat |= {k: row["candidate"].get(k) for k in CANDIDATE} | {k: metrics.get(k) for k in METRICS}
    for name in INTERVALS:
        low, high = metrics.get(name) or (None, None)
        flat |= {f"{name}_low": low, f"{name}_high": high}
    for group in BY_LANGUAGE:
        flat |= {f"{group}_{k}": v for k, v in (metrics.get(group) or {}).items()}
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
