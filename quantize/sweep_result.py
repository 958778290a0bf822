"""What a sweep ends with: the report, OUT/winner.json, the printed table, and a sentence where nothing fits the budget.

Knows rows and what was asked for; nothing of how candidates are made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gori import console
from gori.errors import GateError

if TYPE_CHECKING:
    from gori.quantize.budget import Budget
    from gori.quantize.search import Search
    from gori.quantize.space import Candidate
    from gori.quantize.sweep import Row


@dataclass(frozen=True)
class Request:
    """The command line as it was read."""

    students: dict[str, Path]
    candidates: list[Candidate]
    left_out: dict[str, int]
    """Reason → combinations that cannot be made."""
    budget: Budget | None
    options: Mapping[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    """How the students came about, for the report."""

    def search(self) -> Search:
        """The order of candidates."""
        from gori.quantize import search

        o = self.options
        if o["search"] == "grid":
            return search.grid(self.candidates)
        return search.optuna(self.candidates, o["trials"], o["seed"], self.budget, o["sampler"])

    @property
    def total(self) -> int:
        """How many candidates will be measured."""
        count = len(self.candidates)
        return count if self.options["search"] == "grid" else min(count, self.options["trials"])


def alike(request: Request) -> list[str]:
    """Parts of a candidate's name that need not be told."""
    from gori.quantize.sweep_table import shared_fields

    return shared_fields([{"candidate": c.as_dict()} for c in request.candidates])


def finish(request: Request, out: Path, rows: list[Row], facts: dict[str, Any], as_json: bool) -> None:
    """Write the report and the winner, print the table; GateError where none fits."""
    from gori.quantize import pareto, sweep_report
    from gori.quantize.journal import held

    meta = meta_of(request, out, facts)
    with held(out / ".report.lock", wait=True):
        body = sweep_report.write(out, rows, request.budget, meta)
        best = pareto.winner(rows, request.budget)
        chosen = write_winner(out, best, request, rows)
    console.result({**body, "winner": chosen}, as_json, sweep_report.text_table(rows, request.budget))
    console.log(f"{out / 'report.html'}  {out / 'table.csv'}  {out / 'journal.jsonl'}")
    if best is not None:
        label = sweep_report.candidate_label(best["candidate"], alike(request))
        console.log(f"winner: {label}: {out / best['artifact']}")
    elif request.budget is not None:
        raise GateError(misses(rows, request, out))


def write_winner(out: Path, best: Mapping[str, Any] | None, request: Request, rows: list[Row]) -> dict[str, Any] | None:
    """OUT/winner.json: the candidate, where its file is, its verdicts, and who the rows cannot tell from it."""
    from gori.artifact import write_json
    from gori.quantize import pareto

    path = out / "winner.json"
    if best is None:
        path.unlink(missing_ok=True)
        return None
    body = {
        **best,
        "verdicts": request.budget.verdict(best["metrics"]) if request.budget else [],
        "tied": [r["key"] for r in pareto.tied(rows, request.budget)],
    }
    write_json(path, body)
    return body


def misses(rows: list[Row], request: Request, out: Path) -> str:
    """One sentence: who came nearest, and by how much each missed."""
    from gori.quantize import pareto
    from gori.quantize.sweep_report import candidate_label

    budget, hidden, found = request.budget, alike(request), []
    assert budget is not None
    for row in pareto.nearest_misses(rows, budget):
        missed = [v for v in budget.verdict(row["metrics"]) if not v["met"]]
        found.append(f"{candidate_label(row['candidate'], hidden)} ({', '.join(map(miss_of, missed))})")
    done = sum(r["state"] == "done" for r in rows)
    return f"none of {done} candidates fits {budget.text}; nearest: {'; '.join(found)} (everything is in {out})"


def miss_of(verdict: Mapping[str, Any]) -> str:
    if verdict["value"] is None:
        return f"{verdict['name']} was not measured"
    return f"{verdict['name']} is {verdict['value']:.4g}, bound {verdict['text']}, missed by {verdict['miss']:.1%}"


def meta_of(request: Request, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the sweep besides its rows."""
    from gori.artifact import LIBRARIES, library_versions
    from gori.parallel import cores
    from gori.targets import TARGETS

    o = request.options
    packages = {p for c in request.candidates for p in TARGETS[c.target].packages}
    return {
        "title": f"Sweep over {', '.join(request.students)}",
        "command": f"gori {' '.join(sys.argv[1:])}",
        **facts,
        **request.facts,
        "search": o["search"] if o["search"] == "grid" else f"optuna, {o['sampler']}, {o['trials']} trials",
        "seed": o["seed"],
        "samples": o["samples"],
        "left_out": request.left_out,
        "speeds": f"median of {o['rounds']} interleaved rounds, one process at a time, threads: {o['threads']}",
        "cores": cores(),
        "versions": library_versions([*LIBRARIES, *sorted(packages)]),
    }
