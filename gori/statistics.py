"""Intervals that tell a difference from noise: of a share, of two models on the same rows, of means over tokens.

Knows nothing of models or files. Rows are the independent units everywhere: tokens of one answer are not. Intervals are
two-sided, equal-tailed and of `level`; None where the data holds none. Shapes: R rows, N tokens, S resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gori.errors import GoriError

LEVEL = 0.95
RESAMPLES = 2000
AT_ONCE = 1 << 22
"""Numbers of a block of resamples that exist at once: 32 MiB."""

Interval = tuple[float, float]


def proportion_interval(hits: int, n: int, level: float = LEVEL) -> Interval | None:
    """Exact interval of a share (Clopper and Pearson 1934): it holds the truth at least as often as `level` says."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    found = binomtest(hits, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Paired:
    """Rows on which two models were right or wrong, counted."""

    both: int
    lost: int
    """Only the reference was right."""
    gained: int
    """Only the model was right."""
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def kept(self) -> float | None:
        """Share right of the model over share right of the reference; None where the reference is never right."""
        reference = self.both + self.lost
        return (self.both + self.gained) / reference if reference else None


def pair(model: Sequence[bool], reference: Sequence[bool]) -> Paired:
    """Count the rows of two models; GoriError where they answered different numbers of rows."""
    if len(model) != len(reference):
        raise GoriError(f"{len(model)} rows against {len(reference)}: compare answers to the same rows")
    a, b = np.asarray(model, dtype=bool), np.asarray(reference, dtype=bool)
    return Paired(int((a & b).sum()), int((~a & b).sum()), int((a & ~b).sum()), int((~a & ~b).sum()))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of lost and gained rows being equally likely, exact: binomial on the rows that flipped (McNemar)."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def kept_interval(p: Paired, level: float = LEVEL) -> Interval | None:
    """Score interval of the ratio `p.kept`: all ratios whose score test is not significant (Nam and Blackwelder 2002,
    Statistics in Medicine 21:689). Not a bootstrap, which with few flips misses the truth three times as often as it
    says and with none shrinks to a point; tests/test_statistics.py measures both."""
    from scipy.optimize import root_scalar
    from scipy.special import ndtri

    if p.kept is None:
        return None
    limit = float(ndtri((1 + level) / 2))
    middle = np.log(max(p.kept, 1e-9))

    def edge(sign: int) -> float:
        far = middle - sign
        while sign * kept_score(p, float(np.exp(far))) < limit:
            far -= sign
        found = root_scalar(lambda x: sign * kept_score(p, float(np.exp(x))) - limit, bracket=(middle, far), xtol=1e-12)
        return float(np.exp(found.root))

    return (edge(1) if p.kept else 0.0), edge(-1)


def kept_score(p: Paired, ratio: float) -> float:
    """Standard normal score of a supposed ratio; at 1 its square is McNemar's (lost - gained)² / (lost + gained)."""
    both, lost, gained = kept_likeliest(p, ratio)
    variance = p.n * (gained + ratio**2 * lost + (1 - ratio) ** 2 * both)
    off = (p.both + p.gained) - ratio * (p.both + p.lost)
    return off / float(np.sqrt(variance)) if variance else 0.0


def kept_likeliest(p: Paired, ratio: float) -> tuple[float, float, float]:
    """Likeliest shares of rows (both, lost, gained) with P(model right) = ratio · P(reference right).

    The share of `neither` is free of the ratio, so the others sum to s = 1 - neither / n; the likelihood's derivative
    along the constraint is then zero at a root of a quadratic in the share lost.
    """
    s = (p.n - p.neither) / p.n
    least = (1 - ratio) * s
    a, b = p.n * (1 + ratio), p.n * (1 + ratio) * least + p.lost + ratio**2 * p.gained
    lost = (b + float(np.sqrt(max(b * b - 4 * a * p.lost * least, 0.0)))) / (2 * a)
    gained = max((lost - least) / ratio, 0.0)
    return max(ratio * s - (1 + ratio) * gained, 0.0), lost, gained


def worst_interval(pairs: Sequence[Paired], level: float = LEVEL) -> Interval | None:
    """Interval of the smallest of several groups' ratios `kept`; groups without one are passed over.

    Below, the smallest lower end serves as it is: the group that is truly worst misses it with the usual chance. Above,
    any group may be it, so their chances are shared out (Bonferroni).
    """
    some = [p for p in pairs if p.kept is not None]
    low = [i[0] for p in some if (i := kept_interval(p, level))]
    high = [i[1] for p in some if (i := kept_interval(p, 1 - (1 - level) / len(some)))]
    return (min(low), min(high)) if some else None


def mean_interval(
    sums_R: ArrayLike, counts_R: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Interval of a mean over tokens, Σ sums / Σ counts, from rows drawn with replacement (a cluster bootstrap).

    Corrected for bias and skewness (BCa: Efron 1987, JASA 82:171): divergences are skewed. None for one row.
    """
    from scipy.special import ndtr, ndtri

    sums, counts = np.asarray(sums_R, dtype=np.float64), np.asarray(counts_R, dtype=np.float64)
    if len(sums) < 2:
        return None
    mean = sums.sum() / counts.sum()
    drawn_S = np.concatenate([w @ sums / (w @ counts) for w in _weights(len(sums), resamples, seed)])
    if drawn_S.min() == drawn_S.max():
        return float(mean), float(mean)
    # the same rows, drawn in another order, give a mean that differs in its last bits
    off_S = np.where(np.isclose(drawn_S, mean, rtol=1e-12, atol=0), 0, drawn_S - mean)
    below = ((off_S < 0).mean() + (off_S <= 0).mean()) / 2
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    without_R = (sums.sum() - sums) / (counts.sum() - counts)
    d_R = without_R.mean() - without_R
    skew = (d_R**3).sum() / (6 * (d_R**2).sum() ** 1.5)
    z = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(drawn_S, ndtr(bias + z / (1 - skew * z)))
    return float(low), float(high)


def share_interval(
    hits_R: ArrayLike, counts_R: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Interval of a share of tokens. Where every token is a hit, rows drawn again say nothing of misses: then the lower
    end is the exact one for rows without any miss."""
    hits, counts = np.asarray(hits_R), np.asarray(counts_R)
    if (hits == counts).all():
        return proportion_interval(len(hits), len(hits), level)
    return mean_interval(hits, counts, level, resamples, seed)


def quantile(values_N: ArrayLike, at: float) -> float:
    """The smallest value that at least a share `at` of all values do not exceed."""
    return float(np.quantile(np.asarray(values_N), at, method="inverted_cdf"))


def quantile_interval(
    values_N: ArrayLike,
    row_N: ArrayLike,
    at: float,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Percentile interval of a quantile over tokens, from rows drawn with replacement; `row_N` says whose each is."""
    values, row = np.asarray(values_N, dtype=np.float64), np.asarray(row_N)
    rows = int(row.max()) + 1
    if rows < 2:
        return None
    order = np.argsort(values, kind="stable")
    ordered, row = values[order], row[order]

    def found(w_SR: NDArray[np.int64]) -> NDArray[np.float64]:
        upto_SN = w_SR[:, row].cumsum(1)
        return ordered[(upto_SN < at * upto_SN[:, -1:]).sum(1)]

    drawn_S = np.concatenate([found(w) for w in _weights(rows, resamples, seed, len(values))])
    low, high = np.quantile(drawn_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weights(rows: int, resamples: int, seed: int, widest: int = 0) -> Iterator[NDArray[np.int64]]:
    """How often each row was drawn, `[S, R]`, in blocks that keep S · max(R, widest) bounded."""
    rng = np.random.default_rng([seed, 8191])
    step = max(1, AT_ONCE // max(rows, widest))
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        drawn = rng.integers(0, rows, (block, rows)) + rows * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * rows).reshape(block, rows)


def token_fidelity(
    kl_N: ArrayLike, nll_N: ArrayLike, nll_reference_N: ArrayLike, same_N: ArrayLike, row_N: ArrayLike, seed: int = 0
) -> dict[str, Any]:
    """How far a model is from a reference over answer tokens, with intervals over rows.

    Of each token: KL(reference || model) and -log p(wanted token) of both in nats, whether both find the same token
    likeliest, and its row. Perplexities and their ratio are exp of means over tokens. The maximum has no interval.
    """
    kl, nll, reference = (np.asarray(x, dtype=np.float64) for x in (kl_N, nll_N, nll_reference_N))
    row = np.unique(np.asarray(row_N), return_inverse=True)[1]
    counts = np.bincount(row)
    same, change = np.asarray(same_N, dtype=np.float64), nll - reference
    kl_ci, change_ci = (mean_interval(np.bincount(row, x), counts, seed=seed) for x in (kl, change))
    return {
        "kl_mean": float(kl.mean()),
        "kl_mean_ci": as_list(kl_ci),
        "kl_p99": quantile(kl, 0.99),
        "kl_p99_ci": as_list(quantile_interval(kl, row, 0.99, seed=seed)),
        "kl_max": float(kl.max()),
        "top1": float(same.mean()),
        "top1_ci": as_list(share_interval(np.bincount(row, same), counts, seed=seed)),
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_reference": float(np.exp(reference.mean())),
        "perplexity_ratio": float(np.exp(change.mean())),
        "perplexity_ratio_ci": as_list(change_ci and (float(np.exp(change_ci[0])), float(np.exp(change_ci[1])))),
        "rows": len(counts),
        "answer_tokens": len(kl),
    }


def as_list(interval: Interval | None) -> list[float] | None:
    """An interval as JSON holds it."""
    return None if interval is None else list(interval)
