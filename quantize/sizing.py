"""Which shapes of a student fit a device: depth × width candidates, what each would cost, which are worth training.

The cost of a shape is predicted from a few exports that were measured: its bytes are counted, the rest is fitted. Knows
nothing of how a student is trained, exported or measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gori.errors import GoriError
from gori.quantize.budget import Budget
from gori.quantize.schemes import embedding_scheme, matching_embedding, scheme
from gori.quantized import TensorScheme, packed_bytes

STEP = 32
"""Widths are multiples of it: the groups of the schemes, and the blocks of kernels."""
MLP_RATIOS = (0.5, 1.0, 1.5)
"""MLP width over model width, as multiples of the recipe's."""
MOST_LAYERS, MOST_WIDTH = 3, 4
"""Deepest and widest shapes that are looked at, as multiples of the recipe's."""
FEWEST_MEASURED = 5
"""Measured exports without which nothing is fitted: three coefficients, and what shows whether they are right."""


@dataclass(frozen=True, order=True)
class Shape:
    """A student's depth and widths."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int

    @property
    def name(self) -> str:
        return f"l{self.layers}-d{self.hidden_size}-m{self.intermediate_size}"

    def linears(self) -> list[tuple[int, int]]:
        """`[out, in]` of every linear of one layer."""
        d, q, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(q, d), (kv, d), (kv, d), (d, q), *[(self.intermediate_size, d)] * 2, (d, self.intermediate_size)]

    @property
    def multiplications(self) -> int:
        """Of the layers' linears for one token."""
        return self.layers * sum(out * width for out, width in self.linears())


@dataclass(frozen=True)
class Ceiling:
    """What a student may have at most: that of which a teacher has as much to give."""

    layers: int
    hidden_size: int
    kv_heads: int
    heads_per_kv_head: int
    intermediate_size: int

    def holds(self, s: Shape) -> bool:
        mine = (s.layers, s.hidden_size, s.kv_heads, s.heads // s.kv_heads, s.intermediate_size)
        most = (self.layers, self.hidden_size, self.kv_heads, self.heads_per_kv_head, self.intermediate_size)
        return all(a <= b for a, b in zip(mine, most, strict=True))


def shapes(base: Shape, step: int = STEP) -> list[Shape]:
    """Every depth × width around a recipe's student; they keep its head size and its shares of query and key/value
    heads."""
    return sorted(dict.fromkeys(_shapes(base, step)))


def _shapes(base: Shape, step: int) -> Iterator[Shape]:
    per, in_heads = base.heads // base.kv_heads, base.heads * base.head_dim / base.hidden_size
    ratio = base.intermediate_size / base.hidden_size
    for layers in range(1, MOST_LAYERS * base.layers + 1):
        for width in range(step, MOST_WIDTH * base.hidden_size + 1, step):
            heads = width * in_heads / base.head_dim
            if heads != int(heads) or int(heads) % per or heads * base.head_dim % step:
                continue
            for r in MLP_RATIOS:
                mlp = max(step, round(width * ratio * r / step) * step)
                yield Shape(layers, width, int(heads), int(heads) // per, base.head_dim, mlp)


@dataclass(frozen=True)
class Storage:
    """What is the same for all shapes of a sizing: vocabulary, schemes, and how a target stores them."""

    vocab_size: int
    linear: TensorScheme
    table: TensorScheme | None
    """None: the table stays float."""
    tied: bool
    copied_head: bool
    """Whether the file holds a shared table once more as the head."""
    float_bytes: int
    """Bytes of a value that stays float."""
    cached: int
    """Tokens of the KV cache."""
    qk_norm: bool
    biases: bool


def storage(
    scheme_name: str, embedding: str | None, *, vocab_size: int, tied: bool, copied_head: bool, float_bits: int,
    cached: int, kind: str,
) -> Storage:  # fmt: skip
    """From the names that a recipe has."""
    table = embedding_scheme(embedding or matching_embedding(scheme_name))
    return Storage(
        vocab_size,
        scheme(scheme_name),
        table,
        tied,
        copied_head,
        float_bits // 8,
        cached,
        kind == "qwen3",
        kind == "qwen2",
    )


@dataclass(frozen=True)
class Load:
    """What a shape brings that costs something."""

    stored_bytes: int
    """Integers, scales and float values of the file."""
    read_bytes: int
    """Integers and scales that each token reads: all but the table."""
    cache_bytes: int
    """Of the KV cache in float32."""
    multiplications: int
    """Of one token with weights, without the head, which a prompt needs once."""
    attended: int
    """Multiplications of one token with the cache, all of which is attended to, its free places masked."""
    layers: int


def load_of(s: Shape, st: Storage) -> Load:
    """Count what a shape stores and reads."""
    layer = sum(packed_bytes(size, st.linear) for size in s.linears())
    size = (st.vocab_size, s.hidden_size)
    table = packed_bytes(size, st.table) if st.table else 4 * st.vocab_size * s.hidden_size
    head = packed_bytes(size, st.linear)
    same = st.tied and st.table and (st.table.bits, st.table.group_size) == (st.linear.bits, st.linear.group_size)
    read = s.layers * layer + head
    stored = s.layers * layer + table + (0 if same and not st.copied_head else head)
    vectors = 2 * s.hidden_size + (2 * s.head_dim if st.qk_norm else 0)
    vectors += (s.heads + 2 * s.kv_heads) * s.head_dim if st.biases else 0
    floats = st.float_bytes * (s.layers * vectors + s.hidden_size)
    cache = 2 * 4 * s.layers * s.kv_heads * s.head_dim * st.cached
    attended = 2 * s.layers * s.heads * s.head_dim * st.cached
    return Load(stored + floats, read, cache, s.multiplications, attended, s.layers)


@dataclass(frozen=True)
class Law:
    """How a cost depends on a load: what is counted, plus a sum of fitted terms."""

    terms: Callable[[Load], tuple[float, ...]]
    """What the coefficients are of."""
    counted: Callable[[Load], float] = lambda load: 0.0


LAWS: dict[str, Law] = {
    "size_bytes": Law(lambda load: (1.0, load.layers), lambda load: load.stored_bytes),
    "rss_mib": Law(lambda load: (1.0, load.stored_bytes, load.cache_bytes)),
    "decode_ms": Law(lambda load: (1.0, load.read_bytes, load.layers)),
    "prefill_ms": Law(lambda load: (1.0, load.multiplications, load.attended)),
}
"""Cost → law; decode and prefill are milliseconds a token. A file is its counted bytes and a description of the graph,
which grows with the layers; one token costs the bytes that it reads and a fixed part for every layer's calls, a token
of a prompt its multiplications: those in attention are a kernel's of their own."""


@dataclass(frozen=True)
class Fit:
    """A law with its coefficients."""

    law: Law
    coefficients: tuple[float, ...]
    error: float
    """Mean relative error of leave-one-out predictions."""
    worst: float
    """The largest of them."""

    def predict(self, load: Load) -> float:
        return self.law.counted(load) + float(np.dot(self.law.terms(load), self.coefficients))


def fit(law: Law, loads: Sequence[Load], costs: Sequence[float]) -> Fit:
    """Non-negative least squares of relative errors (Lawson and Hanson 1974): no cost falls when a load grows.

    GoriError where fewer than FEWEST_MEASURED costs are given.
    """
    if len(costs) < FEWEST_MEASURED:
        raise GoriError(
            f"{len(costs)} measured exports are too few for a cost model: measure {FEWEST_MEASURED} or more"
        )
    errors = []
    for i in range(len(costs)):
        rest = [j for j in range(len(costs)) if j != i]
        found = Fit(law, _solve(law, [loads[j] for j in rest], [costs[j] for j in rest]), 0, 0)
        errors.append(abs(found.predict(loads[i]) - costs[i]) / costs[i])
    return Fit(law, _solve(law, loads, costs), float(np.mean(errors)), max(errors))


def _solve(law: Law, loads: Sequence[Load], costs: Sequence[float]) -> tuple[float, ...]:
    from scipy.optimize import nnls

    y = np.array(costs, dtype=np.float64)
    a = np.array([law.terms(load) for load in loads], dtype=np.float64) / y[:, None]
    wanted = (y - np.array([law.counted(load) for load in loads])) / y
    scale = np.linalg.norm(a, axis=0)  # columns of one size: bytes beside ones would be lost in rounding
    found, _ = nnls(a / scale, wanted)
    return tuple((found / scale).tolist())


@dataclass(frozen=True)
class CostModel:
    """A fit for each cost that was measured."""

    fits: Mapping[str, Fit]

    def metrics(self, load: Load) -> dict[str, float]:
        """What a sweep's row would say: `size_bytes, rss_mib, decode_tps, prefill_tps`."""
        found = {name: f.predict(load) for name, f in self.fits.items()}
        return {_metric(name): 1e3 / v if name.endswith("_ms") else v for name, v in found.items()}

    def cautious(self, load: Load) -> dict[str, float]:
        """The same, each worse by its fit's mean relative error: what may be expected to hold."""
        found = {name: f.predict(load) * (1 + f.error) for name, f in self.fits.items()}
        return {_metric(name): 1e3 / v if name.endswith("_ms") else v for name, v in found.items()}


def _metric(cost: str) -> str:
    return cost.replace("_ms", "_tps")


def fit_all(loads: Sequence[Load], measured: Sequence[Mapping[str, float | None]]) -> CostModel:
    """Fit every law over measured exports' metrics; a cost that an engine does not tell is left out."""
    fits = {}
    for name, law in LAWS.items():
        values = [m.get(_metric(name)) for m in measured]
        known = [(load, v) for load, v in zip(loads, values, strict=True) if v]
        if len(known) == len(loads):
            fits[name] = fit(law, loads, [1e3 / v if name.endswith("_ms") else v for _, v in known])
    return CostModel(fits)


def to_measure(found: Sequence[Shape], base: Shape, count: int) -> list[Shape]:
    """`count` shapes that lie far apart in depth and widths, the one nearest to `base` first: each next one is the
    farthest from those that were taken (Gonzalez 1985)."""

    def apart(a: Shape, b: Shape) -> float:
        pairs = ((a.layers, b.layers), (a.hidden_size, b.hidden_size), (a.intermediate_size, b.intermediate_size))
        return math.dist(*zip(*((math.log(x), math.log(y)) for x, y in pairs), strict=True))

    taken = [min(found, key=lambda s: (apart(s, base), s))]
    while len(taken) < min(count, len(found)):
        taken.append(max(found, key=lambda s: (min(apart(s, t) for t in taken), s)))
    return taken


def affordable(found: Sequence[Shape], st: Storage, model: CostModel, budget: Budget) -> list[Shape]:
    """The shapes that are expected to meet the budget's bounds on cost, with the model's error kept in reserve."""
    known = {_metric(name) for name in model.fits}
    costs = replace(budget, bounds=tuple(b for b in budget.bounds if b.limit.metric in known))
    return [s for s in found if costs.fits(model.cautious(load_of(s, st)))]


def pick(fitting: Sequence[Shape], count: int) -> list[Shape]:
    """`count` shapes to train: of each depth the largest, depths evenly spread by their ratios; where there are fewer
    depths, the next largest of each."""
    by_depth: dict[int, list[Shape]] = {}
    for s in sorted(fitting, key=lambda s: (-s.multiplications, s)):
        by_depth.setdefault(s.layers, []).append(s)
    depths = sorted(by_depth)
    if len(depths) > count:
        ends = (math.log(depths[0]), math.log(depths[-1]))
        marks = [ends[0] + (ends[1] - ends[0]) * i / max(1, count - 1) for i in range(count)]
        chosen: list[int] = []
        for mark in marks:
            chosen.append(min((d for d in depths if d not in chosen), key=lambda d: (abs(math.log(d) - mark), d)))
        depths = sorted(chosen)
    turns = [by_depth[d][i] for i in range(len(fitting)) for d in depths if i < len(by_depth[d])]
    return sorted(turns[:count])


def rungs(count: int, finalists: int, share: float) -> list[tuple[float, int]]:
    """Successive halving (Jamieson and Talwalkar 2016): share of the recipe's steps → students that train so long. Half
    of them go on each time until the finalists are left, which train in full; shares grow by equal factors."""
    counts = [count]
    while counts[-1] > finalists:
        counts.append(max(finalists, math.ceil(counts[-1] / 2)))
    if len(counts) == 1:
        return [(1.0, count)]
    return [(share ** (1 - i / (len(counts) - 1)), n) for i, n in enumerate(counts)]
