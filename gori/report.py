"""report.html: one self-contained page of what a run made, how good it is, and what it cost. No network, no script."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from gori.artifact import MANIFEST, os_errors, read_manifest
from gori.recipe import Recipe
from gori.summary import read_answers

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 44, 24
COLOURS = {"teacher": "#0072b2", "distill": "#d55e00", "control": "#009e73"}
"""Okabe and Ito's palette, told apart by colour-blind eyes; each curve is named beside it too."""
EXAMPLES = 10


@dataclass(frozen=True)
class Curve:
    """One training run's dev score over its steps, as SVG points."""

    name: str
    colour: str
    points: str
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Plot:
    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def write_report(out: Path, summary: dict[str, Any], recipe: Recipe) -> None:
    """Write OUT/report.html from the summary, the manifests, the training logs and the answers."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("gori").joinpath("report.html.jinja").read_text(encoding="utf-8")
    logs = {name: read_log(out / name) for name in COLOURS if (out / name / "log.jsonl").exists()}
    page = environment.from_string(source).render(
        summary=summary,
        recipe=recipe,
        lineage=lineage(out, summary),
        splits=list(next(iter(summary["accuracy"].values()))),
        plots=[
            plot("Loss on the answers (each run's own loss, logarithmic)", logs, "loss", is_loss=True),
            plot("Exact calls on dev rows while training", logs, "dev_exact", is_loss=False),
        ],
        examples=examples(out, summary),
        notes=notes(out),
        claim=claim(summary),
        size=(WIDTH, HEIGHT, LEFT, BOTTOM),
    )
    with os_errors(out):
        (out / "report.html").write_text(page, encoding="utf-8")


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def plot(title: str, logs: dict[str, list[dict[str, Any]]], key: str, is_loss: bool) -> Plot:
    """Curves of one logged figure over steps. A loss is smoothed by an exponential mean over about 20 steps and drawn
    on a logarithmic axis: it falls by two orders of magnitude, and the last halving decides over many calls."""
    series = {n: [(e["step"], e[key]) for e in rows if key in e] for n, rows in logs.items()}
    series = {n: _smooth(s) if is_loss else s for n, s in series.items() if s}
    if not series:
        return Plot(title, [], [], [])
    last = max(s[-1][0] for s in series.values())
    values = [v for s in series.values() for _, v in s]
    top = max(values) or 1.0
    low = max(min(values), 1e-4 * top) if is_loss else 0.0

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 70) * step / last
        share = math.log(max(value, low) / low) / math.log(top / low) if 0 < low < top else value / top
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * share, 1)

    curves = []
    for name, s in series.items():
        points = [at(*p) for p in s]
        text = " ".join(f"{x},{y}" for x, y in points)
        curves.append(Curve(name, COLOURS[name], text, points[-1][0] + 4, points[-1][1] + 4))
    x_ticks = [(at(last * i / 4, 0)[0], f"{last * i // 4}") for i in range(5)]
    marks = [low * (top / low) ** (i / 4) if low else top * i / 4 for i in range(5)]
    y_ticks = [(at(0, v)[1], f"{v:.2g}" if is_loss else f"{v:.2f}") for v in marks]
    return Plot(title, _apart(curves), x_ticks, y_ticks)


def _smooth(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    out, mean = [], series[0][1]
    for step, value in series:
        mean += (value - mean) / 20
        out.append((step, mean))
    return out


def _apart(curves: list[Curve]) -> list[Curve]:
    """Move labels that would overlap."""
    placed: list[Curve] = []
    for c in sorted(curves, key=lambda c: c.label_y):
        y = c.label_y
        if placed and y - placed[-1].label_y < 13 and abs(c.label_x - placed[-1].label_x) < 60:
            y = placed[-1].label_y + 13
        placed.append(Curve(c.name, c.colour, c.points, c.label_x, y))
    return placed


def lineage(out: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What was made of what: a row for each stage directory with its parts of the manifest."""
    rows = []
    names = ["data", "tokenizer", "teacher", "distill", "control", *sorted(p.name for p in out.glob("quantize*"))]
    names += sorted(p.relative_to(out).as_posix() for p in out.glob("export/*"))
    for name in names:
        if (out / name / MANIFEST).exists():
            body = read_manifest(out / name)
            size = sum(f["bytes"] for f in body["files"].values())
            seconds = summary["seconds"].get(name, 0.0)
            rows.append({**body, "directory": name, "made_of": _made_of(name, body), "size": size, "seconds": seconds})
    return rows


def _made_of(name: str, manifest: dict[str, Any]) -> str:
    """The stages whose contents a manifest names as inputs."""
    if name.startswith(("quantize", "export")):
        return "distill" if name.startswith("quantize") else "quantize"
    stages = [s for s in ("teacher", "tokenizer") if s in manifest["inputs"]]
    return ", ".join([*stages, "data"]) if name != "data" else ""


def notes(out: Path) -> list[str]:
    """Every manifest's notes that are not about norms, told once."""
    found: dict[str, None] = {}
    for path in sorted(out.rglob(MANIFEST)):
        for note in read_manifest(path.parent)["notes"]:
            if "a norm or bias" not in note:
                found[note] = None
    return list(found)


def examples(out: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Ten rows with the exported file's answers, spread over splits and languages: two wrong ones where there are."""
    rows = read_answers(out, summary["targets"][0] if summary["targets"] else "student")
    right, wrong = (_spread([r for r in rows if r["exact"] == exact]) for exact in (True, False))
    shown = right[: EXAMPLES - min(2, len(wrong))]
    return [*shown, *wrong[: EXAMPLES - len(shown)]]


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows reordered: the first of each split and language, then the second of each, and so on."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for r in rows:
        key = (r["split"], r["language"])
        turns.append((seen[key], r))
        seen[key] += 1
    return [r for _, r in sorted(turns, key=lambda t: t[0])]


def claim(summary: dict[str, Any]) -> str:
    """One sentence on student against control that the numbers support: both are single runs of one seed."""
    accuracy = summary["accuracy"]
    if "control" not in accuracy:
        return "No control was run, so nothing is claimed about what the teacher gave the student."
    n = sum(s["n"] for s in accuracy["student"].values())
    mine, other = (sum(s["exact"] * s["n"] for s in accuracy[m].values()) / n for m in ("student", "control"))
    error = (mine * (1 - mine) / n + other * (1 - other) / n) ** 0.5
    gap, noise = (mine - other) * 100, 1.96 * error * 100
    sampled = f"over {n} test rows (difference {gap:+.1f} points, ±{noise:.1f} from sampling rows)"
    verdict = "more often right than" if mine - other > 1.96 * error else "not shown to be better than"
    if other - mine > 1.96 * error:
        verdict = "less often right than"
    return (
        f"The distilled student is {verdict} its control {sampled}. One seed each: another seed may move either, "
        "so this is what this run shows, not a law."
    )
