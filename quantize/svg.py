"""Scatter plots as numbers for an inline SVG: axes and ticks, marks told apart by shape and colour, the line of a
front, the region of a budget. Knows nothing of sweeps; gori/sweep.html.jinja draws what is computed here.

Drawn 360 units wide, so that text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 290, 64, 18, 18, 40
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#56b4e9", "#e69f00", "#cc79a7", "#f0e442", "currentColor")
"""Okabe and Ito's palette; its black is the text's colour, which a dark page turns."""
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # circle
    "M-4 -4h8v8h-8z",  # square
    "M0 -5.2L5 4H-5z",  # triangle
    "M0 -5.6L5.6 0L0 5.6L-5.6 0z",  # diamond
    "M0 5.2L5 -4H-5z",  # triangle, downwards
    "M-1.7 -5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z",  # plus
    "M-2.6 -5.2L0 -2.6L2.6 -5.2L5.2 -2.6L2.6 0L5.2 2.6L2.6 5.2L0 2.6L-2.6 5.2L-5.2 2.6L-2.6 0L-5.2 -2.6z",  # cross
    "M-5.2 -2.2L0 -5.6L5.2 -2.2L3.3 4.4H-3.3z",  # pentagon
)
KINDS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (lambda v: v, lambda t: t),
    "log": (math.log10, lambda t: 10.0**t),
    "kept": (lambda v: math.copysign(math.sqrt(abs(v - 1)), v - 1), lambda t: 1 + math.copysign(t * t, t)),
}
"""Kind of axis → where a value stands on it, and back. `kept`: the square root of the distance to 1, so that 99 % and
97 % are apart though some candidate keeps only a half."""
KEPT_TICKS = (0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1, 1.005, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2)

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in SVG units."""


@dataclass(frozen=True)
class Scale:
    """One axis: values in [low, high] → 0..1."""

    low: float
    high: float
    kind: str = "linear"

    @property
    def decimals(self) -> int:
        """After the point, so that neighbouring ticks of a `linear` axis are told apart."""
        return max(0, math.ceil(-math.log10((self.high - self.low) / 5)))

    def share(self, value: float) -> float:
        """Where a value stands, 0 at `low` and 1 at `high`; one beyond an end stands at that end."""
        to = KINDS[self.kind][0]
        value = min(max(value, self.low), self.high)
        return (to(value) - to(self.low)) / (to(self.high) - to(self.low))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the axis, at most `most`, that stand apart."""
        if self.kind == "linear":
            return _linear_ticks(self.low, self.high, most)
        if self.kind == "kept":
            found = [float(t) for t in KEPT_TICKS]
        else:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for m in (1, 5, 2) for d in decades]
        inside = [t for t in found if self.holds(t)]
        if len(inside) < 2:
            return _linear_ticks(self.low, self.high, most)
        return self._apart(inside, most)

    def _apart(self, ticks: list[float], most: int) -> list[float]:
        """Those of the ticks that leave room for each other. The first to stay are powers of ten on a `log` axis; 1,
        then those from the top down, on a `kept` one."""
        order = ticks if self.kind == "log" else [*([1.0] if 1.0 in ticks else []), *reversed(ticks)]
        kept: list[float] = []
        for t in order:
            if all(abs(self.share(t) - self.share(k)) >= 0.9 / most for k in kept):
                kept.append(t)
        return sorted(kept)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scale_of(values: Sequence[float], kind: str = "linear", bound: float | None = None, least: float = 0.0) -> Scale:
    """An axis with a margin around its values, and out to a bound that is not far beyond them. It spans `least` (of
    decades, on a `log` axis) where values differ by less, so that noise is not drawn as a difference."""
    to, back = KINDS[kind]
    low, high = min(map(to, values)), max(map(to, values))
    short = max(0.0, least - (high - low)) / 2 if kind != "kept" else 0.0
    low, high = low - short, high + short
    if bound is not None and abs(to(bound) - min(max(to(bound), low), high)) <= 0.6 * (high - low):
        low, high = min(low, to(bound)), max(high, to(bound))
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 0.05
    return Scale(back(low - margin), back(high + margin), kind)


@dataclass(frozen=True)
class Point:
    """One candidate on two axes."""

    x: float
    y: float
    name: str
    """What a pointer that rests on it reads."""
    number: int
    """Of its row in the table."""
    group: int
    """Which shape and colour."""
    on_front: bool = False
    best: bool = False
    y_interval: tuple[float, float] | None = None


@dataclass
class Mark:
    """A point where it is drawn; SVG units."""

    x: float
    y: float
    point: Point
    shape: str
    colour: str
    bar: tuple[float, float] | None
    """Ends of the interval."""
    label: tuple[float, float, str] | None = None
    """Where its number stands, and the anchor of the text."""


@dataclass
class Axis:
    """One axis to draw."""

    name: str
    scale: Scale
    text: Callable[[float], str]
    """A value as its tick is written."""
    at_least: bool
    """Whether more is better; a bound on it is then a lower one."""
    bound: float | None = None
    bound_text: str = ""

    def region(self) -> tuple[float, float] | None:
        """Shares of the axis that meet the bound, low end first; None where no part of it does."""
        if self.bound is None:
            return (0.0, 1.0)
        if not self.scale.holds(self.bound):
            beyond = self.bound > self.scale.high
            return (0.0, 1.0) if beyond != self.at_least else None
        at = self.scale.share(self.bound)
        return (at, 1.0) if self.at_least else (0.0, at)


@dataclass
class Scatter:
    """A whole plot, ready to be drawn."""

    id: str
    title: str
    description: str
    x: Axis
    y: Axis
    marks: list[Mark] = field(default_factory=list)
    line: str = ""
    """The front, as the points of a polyline."""
    region: tuple[float, float, float, float] | None = None
    """x, y, width and height of where every bound on these axes is met; None without bounds, or where nothing is."""

    def place(self, x_share: float, y_share: float) -> tuple[float, float]:
        """Shares of the two axes → SVG units."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * x_share
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * y_share, 1)

    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.place(self.x.scale.share(t), 0)[0], self.x.text(t)) for t in self.x.scale.ticks(5)]

    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.place(0, self.y.scale.share(t))[1], self.y.text(t)) for t in self.y.scale.ticks(6)]

    def bounds(self) -> list[tuple[bool, float, str]]:
        """Bounds inside the plot: whether it is one of x, where its line stands, what is written at it."""
        found = []
        for is_x, axis in ((True, self.x), (False, self.y)):
            if axis.bound is not None and axis.scale.holds(axis.bound):
                share = axis.scale.share(axis.bound)
                at = self.place(share, 0)[0] if is_x else self.place(0, share)[1]
                found.append((is_x, at, axis.bound_text))
        return found


def scatter(id: str, title: str, description: str, x: Axis, y: Axis, points: Sequence[Point]) -> Scatter:
    """Place points, their numbers, the front's line and the budget's region."""
    plot = Scatter(id, title, description, x, y)
    for p in sorted(points, key=lambda p: (p.best, p.on_front, -p.number)):  # what matters is drawn last, on top
        at = plot.place(x.scale.share(p.x), y.scale.share(p.y))
        bar = None
        if p.y_interval:
            bar = (plot.place(0, y.scale.share(p.y_interval[0]))[1], plot.place(0, y.scale.share(p.y_interval[1]))[1])
        plot.marks.append(Mark(*at, p, SHAPES[p.group % len(SHAPES)], COLOURS[p.group % len(COLOURS)], bar))
    _label(plot.marks, _written_bounds(plot))
    plot.line = _staircase([m for m in plot.marks if m.point.on_front], x.at_least)
    plot.region = _region(plot)
    return plot


def _region(plot: Scatter) -> tuple[float, float, float, float] | None:
    across, up = plot.x.region(), plot.y.region()
    if (plot.x.bound is None and plot.y.bound is None) or across is None or up is None:
        return None
    (left, bottom), (right, top) = plot.place(across[0], up[0]), plot.place(across[1], up[1])
    return left, top, round(right - left, 1), round(bottom - top, 1)


def _staircase(marks: Sequence[Mark], x_at_least: bool) -> str:
    """Points of a line through a front's marks from left to right. Between two marks it stands at what is reached
    there: by the left one where less of x is better, by the right one where more is."""
    corners: list[tuple[float, float]] = []
    for m in sorted(marks, key=lambda m: (m.x, m.y)):
        if corners:
            corners.append((corners[-1][0], m.y) if x_at_least else (m.x, corners[-1][1]))
        corners.append((m.x, m.y))
    return " ".join(f"{x},{y}" for x, y in corners)


def _written_bounds(plot: Scatter) -> list[Box]:
    """Where the texts of bounds on y stand; those of bounds on x stand above the plot."""
    return [(LEFT, at - 14, LEFT + 4 + 6.4 * len(text), at) for is_x, at, text in plot.bounds() if not is_x]


def _label(marks: Sequence[Mark], taken: list[Box]) -> None:
    """Give marks their numbers, the most important first, each where it covers neither a mark nor another number; one
    that finds no place goes without."""
    taken = taken + [(m.x - 5.5, m.y - 5.5, m.x + 5.5, m.y + 5.5) for m in marks]
    for m in reversed(marks):
        width = 6.4 * len(str(m.point.number)) + 2
        reach = 10.0 if m.point.best else 7.0
        for dx, dy, anchor in (
            (reach, 4, "start"),
            (-reach, 4, "end"),
            (0, -reach - 1, "middle"),
            (0, reach + 9, "middle"),
        ):
            x, y = m.x + dx, m.y + dy
            left = x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, y - 9, left + width, y + 1)
            inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(_cover(box, other) for other in taken):
                m.label = (round(x, 1), round(y, 1), anchor)
                taken.append(box)
                break


def _cover(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
