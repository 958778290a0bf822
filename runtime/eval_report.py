"""What `gori eval` says: its JSON, its table, and gates on any figure with a word on whether the rows decide them.

Works on answers that were already given; knows nothing of models and engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from gori import gates
from gori.calls import Function
from gori.errors import GateError, GoriError
from gori.statistics import token_fidelity
from gori.summary import LANGUAGES, agreement, by_split, exactness, fidelity, split_entry

Answers = Sequence[dict[str, Any]]
Gate = tuple[str, str]
"""The figure's dotted path, and its bound, as in `>= 0.99`."""
SIGNIFICANT = 0.05
COMPARED = (
    "kept", "kept_ci", "kept_by_language", "kept_by_language_ci", "calls", "calls_ci", "calls_language",
    "lost", "gained", "mcnemar_p",
)  # fmt: skip
"""What of gori.summary.fidelity stands in the JSON; exactness has its names there from before."""


def body(
    answers: Answers, reference: Answers | None, functions: Mapping[str, Function], tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures over all rows, and under `splits` those of each where there are several.

    `tokens` is gori.statistics.token_fidelity of the two models, empty without a reference.
    """
    out = _entry(answers, reference, functions) | dict(tokens)
    splits = by_split(answers)
    if len(splits) > 1:
        theirs = by_split(reference or [])
        out["splits"] = {name: _entry(rows, theirs.get(name), functions) for name, rows in splits.items()}
    return out


def _entry(answers: Answers, reference: Answers | None, functions: Mapping[str, Function]) -> dict[str, Any]:
    alone = exactness(answers)
    out = split_entry(answers) | {"exact_ci": alone["exact_ci"]}
    out |= {f"{k}_ci": v for k, v in alone["exact_by_language_ci"].items()}
    if reference is not None:
        found = fidelity(answers, reference)
        out |= {k: found[k] for k in COMPARED}
        out |= {"same_calls": agreement(answers, reference, functions), "reference": split_entry(reference)}
    return out


def read_gate(text: str) -> Gate:
    """`calls >= 0.99` as a path and a bound; GoriError for anything else."""
    found = re.search(r"[<>]", text)
    name, bound = (text[: found.start()].strip(), text[found.start() :]) if found else (text.strip(), "")
    if not name:
        raise GoriError(f"gate {text!r} names no figure: write one before the comparison, as in 'calls >= 0.99'")
    gates.check({name: bound})
    return name, bound


def rehearse(wanted: Sequence[Gate], rows: Answers, against: bool) -> None:
    """Refuse a gate whose figure there will not be, before anything is computed; of `rows` only split and language are
    looked at."""
    made_up = [{**r, "utterance": "", "answer": "", "exact": True} for r in rows]
    tokens = token_fidelity([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [True, True], [0, 1])
    alone, compared = body(made_up, None, {}, {}), body(made_up, made_up, {}, tokens)
    for name, _ in wanted:
        gates.value_at(compared, name)
        if not against:
            try:
                gates.value_at(alone, name)
            except GoriError as e:
                raise GoriError(f"gate {name!r} compares with a reference: give one with --against") from e


def judge(wanted: Sequence[Gate], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"name", "value", "bound", "met", "interval", "decided"}` of each gate.

    The verdict is the figure's. `decided` is false where the bound lies inside the figure's interval, so that other
    rows of the same kind may well give the other verdict, and null where the figure has no interval. A figure that
    there is none of (a ratio to zero) meets no gate.
    """
    return [_judged(name, bound, figures) for name, bound in wanted]


def _judged(name: str, bound: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    try:
        (verdict,) = gates.verdicts({name: bound}, {}, figures)
    except GoriError:
        return {"name": name, "value": None, "bound": bound.strip(), "met": False, "interval": None, "decided": False}
    interval = interval_of(figures, name)
    edge = float(verdict["bound"].split()[1])
    decided = None if interval is None else not interval[0] <= edge <= interval[1]
    return {**verdict, "interval": interval, "decided": decided}


def interval_of(figures: Mapping[str, Any], path: str) -> list[float] | None:
    """The interval beside a figure: `a.b_ci` or `a_ci.b` of `a.b`."""
    *above, last = path.strip().split(".")
    beside = [*above, f"{last}_ci"]
    for way in [beside, [*above[:-1], f"{above[-1]}_ci", last]] if above else [beside]:
        at: Any = figures
        for part in way:
            at = at.get(part) if isinstance(at, Mapping) else None
        if at is not None:
            return at
    return None


def refuse_missed(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """GateError that names the gates that were missed."""
    missed = [f"{v['name']} is {_number(v['value'])}, wanted {v['bound']}" for v in verdicts if not v["met"]]
    if missed:
        raise GateError(f"{len(missed)} of {len(verdicts)} gates missed: {'; '.join(missed)}")


def table(figures: Mapping[str, Any]) -> Table:
    """Figure, model, reference and what the difference amounts to."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    compared = "reference" in figures
    for name in ("", "model", *(("reference", "change") if compared else ())):
        out.add_column(name, overflow="fold")
    for line in _lines(figures, compared):
        out.add_row(*line[: len(out.columns)])
    return out


def _lines(figures: Mapping[str, Any], compared: bool) -> list[tuple[str, str, str, str]]:
    lines = [_split_line(name, entry) for name, entry in figures.get("splits", {}).items()]
    lines.append(_split_line("exact", figures))
    for k in LANGUAGES:
        if k in figures:
            kept = _change(figures["kept_by_language"][k], figures["kept_by_language_ci"][k], 1) if compared else ""
            theirs = _number(figures["reference"][k]) if compared else ""
            lines.append((f"exact {k}", _with_interval(figures[k], figures[f"{k}_ci"]), theirs, kept))
    if compared:
        lines += _compared_lines(figures)
    return lines


def _split_line(name: str, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    share = f"{_with_interval(entry['exact'], entry['exact_ci'])} of {entry['n']} rows"
    if "reference" not in entry:
        return name, share, "", ""
    return name, share, _number(entry["reference"]["exact"]), _change(entry["kept"], entry["kept_ci"], 1)


def _compared_lines(f: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    flips = f"{f['lost']} lost, {f['gained']} gained, McNemar p {f['mcnemar_p']:.2g}"
    noise = ": within noise" if f["mcnemar_p"] > SIGNIFICANT else ""
    kl = f"mean {_with_interval(f['kl_mean'], f['kl_mean_ci'])}"
    tail = f"99 % {_with_interval(f['kl_p99'], f['kl_p99_ci'])}, max {_number(f['kl_max'])}"
    return [
        ("flips", "", "", flips + noise),
        ("same call", _number(f["same_calls"]), "", ""),
        ("same likeliest token", _with_interval(f["top1"], f["top1_ci"]), "", f"of {f['answer_tokens']} answer tokens"),
        ("KL, nats", kl, "", tail),
        (
            "perplexity",
            _number(f["perplexity"]),
            _number(f["perplexity_reference"]),
            _change(f["perplexity_ratio"], f["perplexity_ratio_ci"], -1),
        ),
    ]


def _change(ratio: float | None, interval: Sequence[float] | None, good: int) -> str:
    """A ratio to the reference, of which more is better (`good` 1) or worse (-1)."""
    if ratio is None or interval is None:
        return "no ratio" if ratio is None else f"x {_number(ratio)}"
    side = 0 if interval[0] <= 1 <= interval[1] else good if interval[0] > 1 else -good
    return f"x {_with_interval(ratio, interval)}: {('within noise', 'better', 'worse')[side]}"


def gate_lines(verdicts: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """One line a gate."""
    return [_gate_line(v, rows) for v in verdicts]


def _gate_line(v: Mapping[str, Any], rows: int) -> str:
    said = f"gate {v['name']} {v['bound']}: {_number(v['value'])}, {'met' if v['met'] else 'missed'}"
    if v["interval"] is None:
        return said
    ends = " to ".join(_number(x) for x in v["interval"])
    return f"{said}, {'' if v['decided'] else 'not '}decided by {rows} rows (95 % interval {ends})"


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return _number(value) + (f" [{', '.join(map(_number, interval))}]" if interval else "")


def _number(x: float | None) -> str:
    """Four decimals, or three digits of what is smaller than those show."""
    if x is None:
        return "none"
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.01 else f"{x:.2e}"
