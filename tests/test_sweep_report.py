"""The report of a sweep: a page that needs nothing else, every candidate where its figures are, CSV, JSON, tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gori.quantize import svg
from gori.quantize.budget import Budget, parse
from gori.quantize.pareto import front
from gori.quantize.sweep_report import html, plot, table, views, write
from gori.quantize.sweep_table import csv_text, live_table, text_table, verdict_text

VOID = {"meta", "br", "line", "rect", "path", "polyline", "circle"}
VIEWS = views("calls")
META = {"title": "<in-car>", "command": "gori sweep a --out b", "data": {"test": "0f3a"}, "targets": ["gguf", "litert"]}


def row(key: str, scheme: str = "w4a8-g32", state: str = "done", **metrics: Any) -> dict[str, Any]:
    candidate = {"student": None, "scheme": scheme, "method": "gptq", "embedding": "w8-channel", "target": "gguf"}
    error = None if state == "done" else metrics.pop("error", "it broke")
    body = {"key": key, "candidate": candidate, "state": state, "error": error, "seconds": 1.5, "artifact": f"c/{key}"}
    return {**body, "metrics": metrics}


def rows() -> list[dict[str, Any]]:
    return [
        row("a", size_bytes=900_000, calls=0.999, calls_ci=[0.99, 1.0], kl_mean=1e-4, kl_mean_ci=[5e-5, 2e-4],
            decode_tps=310.0, rss_mib=9.5, kept_by_language={"ko": 0.999, "en": 1.0}, lost=1, gained=0, rows=600,
            exact=0.91, exact_by_language={"ko": 0.9, "en": 0.92}, top1=0.999, prefill_tps=2000.0, load_ms=4.0),
        row("b", "w8a8-channel", size_bytes=1_500_000, calls=1.0, kl_mean=1e-5, decode_tps=200.0, rss_mib=12.0),
        row("c", "w2a16-g32", size_bytes=500_000, calls=0.42, kl_mean=0.9, decode_tps=330.0, rss_mib=7.0),
        row("d", "w3a16-g32", size_bytes=700_000, calls=0.97, kl_mean=math.nan),
        row("e", "w5a16-g32", "failed", error="=cmd() [bold] <script>alert('x')</script>"),
    ]  # fmt: skip


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps elements and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


@pytest.mark.parametrize("budget", [None, "size=1MB,rss=64MB,decode=300,calls=0.9", "size=1kB", "kl=0.2,prefill=1"])
def test_the_page_is_whole_and_needs_nothing_from_elsewhere(budget: str | None) -> None:
    text = html(rows(), parse(budget) if budget else None, META)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "style@import"} & {t for t, _ in page.elements}
    assert not [a for _, a in page.elements if {"src", "href", "xlink:href"} & a.keys()]
    assert not [k for _, a in page.elements for k in a if k.startswith("on")]
    assert not re.search(r"https?:|@import|url\(|@font-face", text)
    assert any("width=device-width" in (a.get("content") or "") for a in page.of("meta"))
    assert "prefers-color-scheme: dark" in text


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    body = [*rows(), row("f", "<b>w&\"'", size_bytes=1000, calls=0.5)]
    text = html(body, None, {**META, "<i>": "</code><script>"})
    page = Page(text)
    said = "".join(page.texts)
    assert "=cmd() [bold] <script>alert('x')</script>" in said
    assert "<b>w&\"'" in said
    assert "</code><script>" in said
    assert not page.of("script")
    assert not page.of("b")


def test_every_plot_has_a_title_and_a_description_that_names_its_front() -> None:
    text = html(rows(), parse("size=1MB"), META)
    page = Page(text)
    plots = [a for a in page.of("svg") if a.get("role") == "img"]
    assert len(plots) == len(VIEWS)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    for a in plots:
        assert set((a["aria-labelledby"] or "").split()) <= ids
    said = "".join(page.texts)
    assert "On the front: " in said
    assert "w2a16-g32 · gptq (500, 42)" in said


def test_exact_calls_decide_between_students_since_each_keeps_its_own() -> None:
    body = [
        row("poor", size_bytes=500_000, calls=1.0, exact=0.5, exact_by_language={"ko": 0.4, "en": 0.6}),
        row("good", size_bytes=800_000, calls=0.98, exact=0.9, exact_by_language={"ko": 0.85, "en": 0.95},
            exact_by_language_ci={"ko": [0.8, 0.9], "en": [0.9, 1.0]}),
    ]  # fmt: skip
    for r in body:
        r["candidate"]["student"] = r["key"]
    read = table(body, None, {})
    assert read["winner"] == "good"
    assert read["fronts"]["size-exact"] == ["poor", "good"]
    said = "".join(Page(html(body, None, {})).texts)
    assert "gives the most exact calls (row\xa01)" in said
    assert "On the front: 2: poor · w4a8-g32 · gptq (500, 40); 1: good · w4a8-g32 · gptq (800, 85)." in said
    assert "80.0–90.0; en 95.0 · ko 85.0" in said


def test_a_plot_without_figures_is_left_out_and_named() -> None:
    page = Page(html([row("a", size_bytes=1000, calls=0.5)], None, META))
    assert len([a for a in page.of("svg") if a.get("role") == "img"]) == 1
    assert "B. Size of the file, KL; C. Decode speed, calls kept; D. Resident" in "".join(page.texts)


def test_a_sizing_is_shown_with_its_errors_and_every_rung() -> None:
    ranked = [
        {"student": "l2-<d>64", "parameters": 12345, "rows": 40, "answer_probability": 0.5,
         "answer_probability_ci": [0.4, 0.6], "exact": 0.25, "exact_ci": [0.1, 0.4], "loss": 1.5, "loss_ci": [1.0, 2.0]}
    ]  # fmt: skip
    sizing = {
        "fitting": 3, "shapes": 9, "left_out": {"larger than the teacher": 4}, "measured": {"a": {}, "b": {}},
        "cost_model": {"size_bytes": {"error": 0.012, "worst": 0.034, "of": [1.0]}},
        "predicted": {"l2-<d>64": {"size_bytes": 77_000.0}}, "rungs": [{"share": 0.15, "ranking": ranked}] * 2,
    }  # fmt: skip
    said = " ".join("".join(Page(html(rows(), None, {**META, "students": sizing})).texts).split())
    assert "3 of 9 shapes were expected to fit (left out: 4 larger than the teacher)" in said
    assert "missed by 1.2 % of size_bytes (at most 3.4 %)." in said
    assert said.count("l2-<d>64") == 2
    assert "12,345" in said
    assert "0.400–0.600" in said


def test_a_sweep_in_which_all_failed_or_nothing_ran_still_has_a_page() -> None:
    for body in ([row("e", "w5a16-g32", "failed")], []):
        for budget in (None, parse("size=1MB")):
            assert "No candidate came to an end" in "".join(Page(html(body, budget, {})).texts)


def test_groups_differ_in_shape_and_in_colour() -> None:
    assert len(set(svg.SHAPES)) == len(set(svg.COLOURS)) == len(svg.SHAPES) == 8
    many = [row(f"k{i}", f"s{i // 2:02d}", size_bytes=1000 + i, calls=0.5) for i in range(24)]
    page = Page(html(many, None, {}))
    assert "other" in [t.strip() for t in page.texts]
    assert len({a["d"] for a in page.of("path") if a.get("stroke-width") == ".7"}) == 8


shares = st.floats(0.2, 1.05).map(lambda v: round(v, 4))


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], Budget]:
    size, kl = st.integers(1000, 10**7), st.floats(1e-6, 2.0)
    figures = st.fixed_dictionaries(
        {
            "size_bytes": size,
            "calls": shares,
            "kl_mean": kl,
            "decode_tps": st.floats(1, 900),
            "rss_mib": st.floats(1, 99),
        }
    )
    made = draw(st.lists(figures, min_size=1, max_size=12))
    bounds = f"size={draw(size)},calls={draw(st.floats(0.2, 1.0))},kl={draw(kl)},decode={draw(st.integers(1, 900))}"
    return [row(f"k{i}", f"s{i % 3}", **m) for i, m in enumerate(made)], parse(bounds + ",rss=50MiB")


@given(tables())
def test_marks_stand_where_their_figures_are_and_inside_the_region_when_they_meet_its_bounds(
    made: tuple[list[dict[str, Any]], Budget],
) -> None:
    body, budget = made
    numbers = {r["key"]: i for i, r in enumerate(body)}
    for view in VIEWS:
        p = plot(view, body, budget, numbers, [])
        assert p is not None
        assert len(p.marks) == len(body)
        bounds = [b for b in budget.bounds if b.limit.metric in (view.x, view.y)]
        for m in p.marks:
            r = body[m.point.number]
            assert svg.LEFT <= m.x <= svg.WIDTH - svg.RIGHT
            assert svg.TOP <= m.y <= svg.HEIGHT - svg.BOTTOM
            met = all(b.verdict(r["metrics"])["met"] for b in bounds)
            left, top, width, height = p.region or (math.inf,) * 4
            # drawn to a tenth of a unit
            inside = left - 0.1 <= m.x <= left + width + 0.11 and top - 0.11 <= m.y <= top + height + 0.11
            assert inside or not met
            strictly = left + 0.2 < m.x < left + width - 0.2 and top + 0.2 < m.y < top + height - 0.2
            assert met or not strictly


@given(tables())
def test_the_line_of_a_front_runs_through_its_marks_and_no_mark_is_beyond_it(
    made: tuple[list[dict[str, Any]], Budget],
) -> None:
    body, budget = made
    numbers = {r["key"]: i for i, r in enumerate(body)}
    for view in VIEWS:
        p = plot(view, body, budget, numbers, [])
        assert p is not None
        corners = [tuple(map(float, c.split(","))) for c in p.line.split()]
        on_front = {(m.x, m.y) for m in p.marks if m.point.on_front}
        assert on_front <= set(corners)
        assert {body[m.point.number]["key"] for m in p.marks if m.point.on_front} == set(front(body, (view.x, view.y)))
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            assert x0 == x1 or y0 == y1
            between = ((x0 + x1) / 2, (y0 + y1) / 2)
            assert all(reached(place, on_front, p) for place in ((x0, y0), between, (x1, y1)))
        assert all(reached((m.x, m.y), on_front, p) for m in p.marks)


def reached(place: tuple[float, float], on_front: set[tuple[float, float]], p: svg.Scatter) -> bool:
    """Whether some mark of the front is at least as good on both axes; units of y grow downwards."""
    across, down = (-1 if p.x.at_least else 1), (1 if p.y.at_least else -1)
    return any(across * x <= across * place[0] and down * y <= down * place[1] for x, y in on_front)


@given(tables())
def test_numbers_cover_neither_marks_nor_each_other(made: tuple[list[dict[str, Any]], Budget]) -> None:
    body, budget = made
    p = plot(VIEWS[0], body, budget, {r["key"]: i for i, r in enumerate(body, 1)}, [])
    assert p is not None
    boxes = []
    for m in p.marks:
        if m.label:
            x, y, anchor = m.label
            width = 6.4 * len(str(m.point.number))
            left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            boxes.append((left, y - 8, left + width, y))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for m in p.marks:
            assert not (a[0] < m.x < a[2] and a[1] < m.y < a[3])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_round_numbers_inside_the_axis(low: float, width: float) -> None:
    scale = svg.Scale(low, low + width)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 7
    steps = {round((b - a) / width, 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert all(low - 1e-6 * width <= t <= low + width + 1e-6 * width for t in ticks)


@given(st.sampled_from(["linear", "log", "kept"]), st.lists(st.floats(1e-6, 2.0), min_size=1, max_size=9))
def test_an_axis_keeps_the_order_of_its_values(kind: str, values: list[float]) -> None:
    scale = svg.scale_of(values, kind)
    shares = [scale.share(v) for v in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= s <= 1 for s in shares)
    if max(values) > 1.01 * min(values):
        assert shares[-1] - shares[0] > 0.8
    ticks = [scale.share(t) for t in scale.ticks()]
    assert ticks == sorted(ticks)


def test_noise_is_not_drawn_as_a_difference_and_intervals_of_a_front_are_drawn_whole() -> None:
    body = [
        row("a", size_bytes=799_360, calls=0.993, calls_ci=[0.972, 1.0145], decode_tps=11_107.8, rss_mib=12.41),
        row("b", "w8a8-channel", size_bytes=799_360, calls=0.989, decode_tps=11_104.0, rss_mib=12.40),
    ]
    for view in (VIEWS[0], VIEWS[2], VIEWS[3]):
        p = plot(view, body, None, {"a": 1, "b": 2}, [])
        assert p is not None
        (b, a) = sorted(p.marks, key=lambda m: -m.point.number)
        assert abs(a.x - b.x) < 0.06 * svg.WIDTH
        assert abs(a.y - b.y) < 0.1 * svg.HEIGHT
        assert a.bar is not None
        assert p.y.scale.holds(0.972)
        assert p.y.scale.holds(1.0145)
        texts = [t for _, t in p.x_ticks()]
        assert len(texts) == len(set(texts)) >= 2
        assert not any("e" in t for t in texts)


def test_csv_is_flat_and_opens_in_a_spreadsheet(tmp_path: Path) -> None:
    write(tmp_path, rows(), parse("size=1MB,calls=0.9"), META)
    raw = (tmp_path / "table.csv").read_bytes()
    assert raw.startswith("\ufeff".encode())
    found = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    assert [r["key"] for r in found] == ["a", "d", "b", "c", "e"]
    assert [r["fits"] for r in found] == ["1", "1", "0", "0", "0"]
    assert found[0]["calls_ci_low"] == "0.99"
    assert found[0]["kept_by_language_ko"] == "0.999"
    assert float(found[3]["largest_miss"]) == pytest.approx((0.9 - 0.42) / 0.9)
    assert found[1]["kl_mean"] == ""
    assert found[4]["error"].startswith("'=cmd()")
    assert len({len(r) for r in found}) == 1
    other = csv_text([row("z", size_bytes=1)], None).splitlines()[0].split(",")
    assert list(found[0])[: len(other)] == other


def test_json_holds_every_row_as_it_was_with_null_for_what_is_no_number(tmp_path: Path) -> None:
    body = write(tmp_path, rows(), parse("size=1MB,calls=0.9"), META)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == body
    wanted = {r["key"]: r for r in rows()}
    wanted["d"]["metrics"]["kl_mean"] = None
    assert {r["key"]: r for r in read["rows"]} == wanted
    assert read["winner"] == "a"
    assert read["nearest_misses"][0]["key"] == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "table.csv", "table.json"]


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    budget = parse("size=1MB")
    assert html(rows(), budget, META) == html(rows()[::-1], budget, META)
    assert table(rows(), budget, META) == table(rows()[::-1], budget, META)


def printed(renderable: object) -> str:
    console = Console(width=200, file=io.StringIO(), highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_printed_table_marks_the_winner_and_says_what_others_miss() -> None:
    text = printed(text_table(rows(), parse("size=1MB,calls=0.9")))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1].startswith("1 ★ w4a8-g32 · gptq 900 kB 99.9 ")
    assert lines[1].endswith(" fits")
    assert "misses size by 50 %" in lines[3]
    assert "misses calls by 53 %" in lines[4]
    assert "failed: =cmd() [bold] <script>" in lines[5]


def test_a_miss_names_each_bound_and_what_was_not_measured() -> None:
    body = row("x", size_bytes=4_000_000, calls=0.8999)
    said = verdict_text(body, parse("size=1MB,calls=0.9,decode=300"))
    assert said == "misses size by 3.0 times, calls by 0.011 %, decode not measured"


def test_the_live_table_shows_the_best_so_far_and_what_runs() -> None:
    many = [row(f"k{i:02d}", f"s{i:02d}", size_bytes=1000 + i, calls=0.5) for i in range(20)]
    text = printed(live_table([*many, rows()[-1]], [{"candidate": rows()[0]["candidate"], "doing": "export"}], 30))
    assert "s00 · gptq" in text
    assert "s15 · gptq" not in text
    assert "export" in text
    assert "21 of 30 candidates, 5 of them not shown, 1 failed" in text
