"""The text of `gori bench`: a column of figures for each artifact, and its ratio to the first. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

NONE = "–"


def text(body: dict[str, Any]) -> str:
    """All that was measured, in lines."""
    artifacts = body["artifacts"]
    names = [ascii_uppercase[i % 26] * (i // 26 + 1) for i in range(len(artifacts))]
    lines = [legend(n, a) for n, a in zip(names, artifacts, strict=True)]
    lines += ["", *columns(table(names, artifacts)), "", *bandwidth_lines(body, names)]
    return "\n".join([*lines, *notes(body, names)])


def legend(name: str, a: dict[str, Any]) -> str:
    """What a column is."""
    plural = "" if a["threads"] == 1 else "s"
    what = f"{a['engine']} {a['engine_version']}, {a['threads']} thread{plural}, {a['file_bytes']:,} bytes"
    return f"{name}  {a['path']}: {what}"


def table(names: Sequence[str], artifacts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of cells, the head first."""
    lengths = list(dict.fromkeys(n for a in artifacts for n in a["prefill"]))
    first = artifacts[0]["first_token_prompt"]
    rows = [["", *(c for n in names for c in ((n,) if n == names[0] else (n, f"× {names[0]}")))]]
    rows += [line(f"prefill({n})", artifacts, "tokens_per_second", "tok/s", "prefill", n) for n in lengths]
    rows.append(line("decode", artifacts, "tokens_per_second", "tok/s", "decode"))
    rows.append(line(f"first token({first})", artifacts, "p50_ms", "ms", "first_token"))
    rows.append(sizes("load", artifacts, "load_ms", "ms", "load"))
    rows.append(sizes("memory", artifacts, "rss_mib", "MiB", "rss"))
    return rows


def line(label: str, artifacts: Sequence[dict[str, Any]], key: str, unit: str, *at: str) -> list[str]:
    """A figure that was timed."""
    cells = [label]
    for i, a in enumerate(artifacts):
        found = _under(a, at)
        cells.append(f"{found[key]:,.{1 if unit == 'tok/s' else 2}f} {unit}" if found else NONE)
        cells += [ratio(_under(a["against_first"], at))] if i else []
    return cells


def sizes(label: str, artifacts: Sequence[dict[str, Any]], key: str, unit: str, other: str) -> list[str]:
    """A figure that is one number a round."""
    cells = [label]
    for i, a in enumerate(artifacts):
        cells.append(NONE if a[key] is None else f"{a[key]:,.1f} {unit}")
        cells += [ratio(a["against_first"][other])] if i else []
    return cells


def _under(body: dict[str, Any], at: Sequence[str]) -> Any:
    found: Any = body
    for key in at:
        found = found.get(key) if found else None
    return found


def ratio(found: dict[str, float] | None) -> str:
    """Median and spread over rounds, and of the shortest times."""
    if not found:
        return NONE
    best = f"; {found['best']:.2f}" if "best" in found else ""
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f}{best})"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in rows
    ]


def bandwidth_lines(body: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What the machine reads, and how much of it each decode reaches."""
    read = ", ".join(f"{rate:.1f} GB/s with {n}" for n, rate in body["bandwidth"]["gb_per_s"].items())
    lines = [f"the machine reads {read} of its {body['cores']} cores"]
    cache = body["bandwidth"]["last_level_cache_bytes"] or 0
    for name, a in zip(names, body["artifacts"], strict=True):
        s = a["step"]
        if "unknown" in s:
            lines.append(f"{name}: bytes of a step are not known, {s['unknown']}")
            continue
        share = s["of_bandwidth"]
        lines.append(
            f"{name}: a step reads {s['bytes'] / 1e6:,.2f} MB, {s['gb_per_s']:.2f} GB/s: {share['median']:.0%} of it "
            f"({share['low']:.0%}–{share['high']:.0%})"
            + (f", and fits the last-level cache of {cache / 1e6:,.0f} MB" if s["bytes"] < cache else "")
        )
    return lines


def notes(body: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What was not measured, and how threads were chosen."""
    lines = []
    for name, a in zip(names, body["artifacts"], strict=True):
        if a["prompt_skipped"]:
            skipped = ", ".join(map(str, a["prompt_skipped"]))
            limit = f" of {a['context']}" if a["context"] else ""
            lines.append(f"{name}: prompts of {skipped} tokens exceed the context{limit} and were not measured")
        if a["stand_in"]:
            lines.append(f"{name}: {a['engine']} stands in for the engine that the file is for")
        if choice := a.get("thread_choice"):
            took = ", ".join(f"{t:.1f} ms with {n}" for n, t in choice["call_ms"].items())
            call = f"{choice['prompt_tokens']} + {choice['decode_tokens']} tokens"
            lines.append(f"{name}: a call of {call} took {took}: chose {choice['chosen']}")
    lines.append(
        f"medians of {body['rounds']} rounds; ratios above 1: faster (memory: larger), (lowest–highest round; of the "
        "shortest times)"
    )
    return lines
