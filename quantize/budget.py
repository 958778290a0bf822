"""A device's budget as it is written on a command line, and how far a measured candidate is from it.

Knows names, units and bounds; nothing of how a figure was measured or of which candidate is best.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gori.errors import GoriError, nearest

BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = {unit.lower(): factor for unit, factor in BYTES.items()}
SMALLEST_BYTES = 1000
"""A bound below it is a number whose unit was forgotten."""
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?\s*(.*)")


@dataclass(frozen=True)
class Limit:
    """One thing that a budget may bound."""

    metric: str
    """The figure of a candidate that is bounded."""
    at_least: bool
    """Whether the bound is a lower one."""
    kind: str
    """`bytes`, `rate` (tokens/s), `share` (0..1) or `nats`."""
    scale: float
    """What a written number is multiplied by to be in the metric's unit."""
    means: str


LIMITS: dict[str, Limit] = {
    "size": Limit("size_bytes", False, "bytes", 1.0, "bytes of the exported file"),
    "rss": Limit("rss_mib", False, "bytes", 2.0**-20, "resident memory of the engine's process above its own start"),
    "decode": Limit("decode_tps", True, "rate", 1.0, "tokens/s, one after the other"),
    "prefill": Limit("prefill_tps", True, "rate", 1.0, "tokens/s of a prompt"),
    "calls": Limit("calls", True, "share", 1.0, "share of the float student's exact calls kept, worse language"),
    "exact": Limit("exact", True, "share", 1.0, "share of rows answered exactly, worse language"),
    "kl": Limit("kl_mean", False, "nats", 1.0, "mean KL divergence from the float student"),
}


def human_bytes(size_bytes: float) -> str:
    """Bytes with three digits: `812 kB`, `1.03 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor * 0.9995:
            value = size_bytes / factor
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{size_bytes:.0f} B"


def measured(metrics: Mapping[str, Any], metric: str) -> float | None:
    """A finite figure, None where there is none; `exact` is that of the worse language, where told by language."""
    by_language = metrics.get("exact_by_language") if metric == "exact" else None
    found = min(by_language.values()) if by_language else metrics.get(metric)
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


@dataclass(frozen=True)
class Bound:
    """One bound of a budget."""

    name: str
    """A key of LIMITS."""
    bound: float
    """In the metric's unit."""
    written: str
    """As the user wrote it."""

    @property
    def limit(self) -> Limit:
        return LIMITS[self.name]

    @property
    def text(self) -> str:
        """`<= 8MB`, `>= 300 tokens/s`."""
        unit = {"rate": " tokens/s", "nats": " nats"}.get(self.limit.kind, "")
        return f"{'>=' if self.limit.at_least else '<='} {self.written}{unit}"

    def show(self, value: float | None) -> str:
        """A figure in the bound's own kind of unit."""
        if value is None:
            return "–"
        if self.limit.kind == "bytes":
            return human_bytes(value / self.limit.scale)
        return f"{value:,.0f}" if self.limit.kind == "rate" else f"{value:.4g}"

    def miss(self, value: float) -> float:
        """How far a value is beyond the bound, as a share of the bound; 0 where it is met."""
        beyond = self.bound - value if self.limit.at_least else value - self.bound
        return max(0.0, beyond / self.bound)

    def verdict(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """`{"name", "value", "bound", "met", "miss", "text"}`; `value` and `miss` None where nothing was measured."""
        value = measured(metrics, self.limit.metric)
        miss = None if value is None else self.miss(value)
        met = miss == 0
        return {"name": self.name, "value": value, "bound": self.bound, "met": met, "miss": miss, "text": self.text}


@dataclass(frozen=True)
class Budget:
    """Bounds that all have to be met; none: everything fits."""

    bounds: tuple[Bound, ...] = ()

    @property
    def text(self) -> str:
        """As it was written; `parse` reads it back."""
        return ",".join(f"{b.name}={b.written}" for b in self.bounds)

    def bound(self, metric: str) -> Bound | None:
        """The bound on a metric, if there is one."""
        return next((b for b in self.bounds if b.limit.metric == metric), None)

    def verdict(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The verdict of every bound, in the order they were written."""
        return [b.verdict(metrics) for b in self.bounds]

    def fits(self, metrics: Mapping[str, Any]) -> bool:
        """Whether every bound is met."""
        return all(v["met"] for v in self.verdict(metrics))

    def largest_miss(self, metrics: Mapping[str, Any]) -> float:
        """The largest relative miss: 0 where all fits, inf where a bounded figure was not measured."""
        found = self.verdict(metrics)
        return max((math.inf if v["miss"] is None else v["miss"] for v in found), default=0.0)


def parse(text: str) -> Budget:
    """A budget from `size=8MB,rss=64MB,decode=300,prefill=2000,calls=0.97,exact=0.9,kl=0.01`.

    size and rss are upper bounds in bytes (kB, MB, GB: powers of 1000; KiB, MiB, GiB: of 1024), decode and prefill
    lower ones in tokens/s, calls and exact lower ones in 0..1 (or in %), kl an upper one in nats. All else: GoriError.
    """
    bounds: dict[str, Bound] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, written = (x.strip() for x in part.partition("="))
        if not equals or not written:
            raise GoriError(f"--budget: {part!r} is no bound: write NAME=VALUE, as in size=8MB,calls=0.97")
        if name not in LIMITS:
            raise GoriError(f"--budget: {name!r} cannot be bounded{nearest(name, LIMITS)}")
        if name in bounds:
            raise GoriError(f"--budget: {name} is bounded twice ({bounds[name].written} and {written}): keep one")
        bounds[name] = Bound(name, _value(name, written), written)
    if not bounds:
        raise GoriError(f"--budget {text!r} holds no bound: write NAME=VALUE, as in size=8MB,calls=0.97")
    return Budget(tuple(bounds.values()))


def _value(name: str, written: str) -> float:
    """A written bound in its metric's unit."""
    limit, m = LIMITS[name], _NUMBER.fullmatch(written)
    if not m:
        raise GoriError(f"--budget: {name}={written} is no number: {_allowed(name)}")
    number, unit = float(m[1] + (m[2] or "")), m[3].lower()
    if not math.isfinite(number) or number <= 0:
        raise GoriError(f"--budget: {name}={written} is not a finite number above zero: {_allowed(name)}")
    if limit.kind == "bytes":
        return _bytes(name, written, number, unit) * limit.scale
    if limit.kind == "share" and unit == "%":
        number, unit = number / 100, ""
    if unit and not (limit.kind == "rate" and unit in ("tok/s", "tokens/s")):
        raise GoriError(f"--budget: {name}={written} has a unit that it does not take: {_allowed(name)}")
    if limit.kind == "share" and number > 1:
        raise GoriError(f"--budget: {name}={written} is more than all: {_allowed(name)}")
    return number * limit.scale


def _bytes(name: str, written: str, number: float, unit: str) -> float:
    if unit not in _BYTES:
        raise GoriError(
            f"--budget: {name}={written} has an unknown unit: choose one of {', '.join(filter(None, BYTES))}"
        )
    if number * _BYTES[unit] < SMALLEST_BYTES:
        raise GoriError(f"--budget: {name}={written} is fewer bytes than any model has: {_allowed(name)}")
    return number * _BYTES[unit]


EXAMPLES = {"bytes": "8MB", "rate": "300", "share": "0.97", "nats": "0.01"}


def _allowed(name: str) -> str:
    limit = LIMITS[name]
    return f"write {limit.means}, as in {name}={EXAMPLES[limit.kind]}"
