"""Gates and budgets: a bound on a figure of the summary, and its verdict."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from gori.errors import GoriError, nearest

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = re.compile(r"\s*(>=|<=|>|<)\s*(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e-?[0-9]+)?)\s*")


def value_at(summary: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path, or the ratio of two joined by ` / `."""
    if " / " in path:
        top, bottom = path.split(" / ", 1)
        below = value_at(summary, bottom)
        return value_at(summary, top) / below if below else float("inf")
    at: Any = summary
    for i, part in enumerate(path.strip().split(".")):
        if not isinstance(at, Mapping) or part not in at:
            allowed = at if isinstance(at, Mapping) else ()
            where = ".".join(path.split(".")[:i]) or "the summary"
            raise GoriError(f"gate {path!r}: {where} has no {part!r}{nearest(part, allowed)}")
        at = at[part]
    if not isinstance(at, (int, float)):
        raise GoriError(f"gate {path!r} does not lead to a number")
    return float(at)


def verdicts(gates: Mapping[str, str], budget: Mapping[str, int], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"name", "value", "bound", "met"}` of every gate, and of the budget on each exported file."""
    found = [_verdict(name, bound, value_at(summary, name)) for name, bound in gates.items()]
    if "bytes" in budget:
        for model in summary.get("targets", ()):
            found.append(_verdict(f"bytes.{model}", f"<= {budget['bytes']}", summary["bytes"][model]))
    return found


def check(gates: Mapping[str, str]) -> None:
    """Refuse a bound that cannot be read, before anything is trained."""
    for name, bound in gates.items():
        _parse(name, bound)


def _parse(name: str, bound: str) -> tuple[str, float]:
    m = _BOUND.fullmatch(bound)
    if not m:
        raise GoriError(f"gate {name!r} has the bound {bound!r}: write a comparison, as in '>= 0.8'")
    return m[1], float(m[2])


def _verdict(name: str, bound: str, value: float) -> dict[str, Any]:
    sign, number = _parse(name, bound)
    return {"name": name, "value": value, "bound": f"{sign} {number:g}", "met": COMPARE[sign](value, number)}
