"""Intervals against what they promise: coverage by enumerating every outcome, likelihoods by a numerical optimiser,
bootstraps by SciPy's and by loops."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gori import statistics
from gori.errors import GoriError
from gori.statistics import (
    Paired,
    kept_interval,
    kept_likeliest,
    kept_score,
    mcnemar,
    mean_interval,
    pair,
    proportion_interval,
    quantile,
    quantile_interval,
    share_interval,
    token_fidelity,
    worst_interval,
)

counts = st.integers(0, 40)
tables = st.builds(Paired, counts, counts, counts, counts)


def comparable(p: Paired) -> bool:
    return bool(p.kept)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_a_shares_interval_holds_the_truth_at_least_as_often_as_it_says(n: int) -> None:
    intervals = [proportion_interval(k, n) for k in range(n + 1)]
    for truth in np.linspace(0.01, 0.99, 33):
        chances = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        held = sum(c for c, i in zip(chances, intervals, strict=True) if i and i[0] <= truth <= i[1])
        assert held >= 0.95


def test_a_share_of_nothing_has_no_interval() -> None:
    assert proportion_interval(0, 0) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_rows_are_counted_by_who_was_right(rows: list[tuple[bool, bool]]) -> None:
    p = pair([a for a, _ in rows], [b for _, b in rows])
    assert (p.both, p.lost, p.gained, p.neither) == tuple(
        rows.count(kind) for kind in [(True, True), (False, True), (True, False), (False, False)]
    )
    assert p.n == len(rows)


def test_rows_of_different_number_are_refused() -> None:
    with pytest.raises(GoriError, match="2 rows against 1"):
        pair([True, False], [True])


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemars_p_is_the_chance_of_so_uneven_flips_of_a_fair_coin(lost: int, gained: int) -> None:
    n = lost + gained
    uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - gained))
    assert mcnemar(lost, gained) == pytest.approx(uneven / 2**n)


@given(tables.filter(comparable), st.floats(0.3, 3))
def test_likeliest_shares_are_those_that_an_optimiser_finds(p: Paired, ratio: float) -> None:
    both, lost, gained = kept_likeliest(p, ratio)
    s = (p.n - p.neither) / p.n
    assert both + lost + gained == pytest.approx(s)
    assert both + gained == pytest.approx(ratio * (both + lost), abs=1e-9)

    def unlikely(share_gained: float) -> float:  # the other two follow from the sum and from the ratio
        shares = (ratio * s - (1 + ratio) * share_gained, (1 - ratio) * s + ratio * share_gained, share_gained)
        return -sum(n * math.log(max(x, 1e-300)) for n, x in zip((p.both, p.lost, p.gained), shares, strict=True) if n)

    low, high = max(0.0, (ratio - 1) * s / ratio), ratio * s / (1 + ratio)
    found = scipy.optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    assert unlikely(gained) <= found.fun + 1e-6


@given(tables.filter(comparable))
def test_a_kept_ratios_interval_ends_where_the_score_test_turns_significant(p: Paired) -> None:
    interval = kept_interval(p)
    assert interval is not None
    assert interval[0] < p.kept < interval[1]  # type: ignore[operator]
    for end, sign in zip(interval, (1, -1), strict=True):
        assert kept_score(p, end) == pytest.approx(sign * 1.959964, abs=1e-5)
    if p.lost + p.gained:
        assert kept_score(p, 1.0) ** 2 == pytest.approx((p.lost - p.gained) ** 2 / (p.lost + p.gained))


@given(tables.filter(lambda p: p.both + p.lost > 0 and p.both + p.gained > 0), st.integers(0, 500))
def test_a_kept_ratio_turned_round_is_its_inverse_and_rows_that_nobody_gets_say_nothing(p: Paired, more: int) -> None:
    low, high = kept_interval(p)  # type: ignore[misc]
    turned = kept_interval(Paired(p.both, p.gained, p.lost, p.neither))
    assert turned == pytest.approx((1 / high, 1 / low), rel=1e-6)
    assert kept_interval(Paired(p.both, p.lost, p.gained, more)) == pytest.approx((low, high), rel=1e-6)


def test_a_kept_ratio_of_nothing_has_no_interval_and_a_ratio_of_none_begins_at_zero() -> None:
    assert kept_interval(Paired(0, 0, 5, 5)) is None
    assert worst_interval([Paired(0, 0, 5, 5)]) is None
    low, high = kept_interval(Paired(0, 20, 0, 5))  # type: ignore[misc]
    assert low == 0
    assert 0 < high < 0.5
    low, high = kept_interval(Paired(300, 0, 0, 0))  # type: ignore[misc]
    assert low == pytest.approx(1 / high)  # no flip in 300 rows does not prove that there are none
    assert 0.98 < low < 0.99


def outcomes(n: int, both: float, lost: float, gained: float) -> list[tuple[Paired, float]]:
    """Every table of n rows that is not out of the question, with its chance."""
    rest = 1 - both - lost - gained
    ranges = [np.flatnonzero(scipy.stats.binom.pmf(np.arange(n + 1), n, p) > 1e-6) for p in (lost, gained, rest)]
    cells = np.array([(n - sum(t), *t) for t in itertools.product(*ranges) if sum(t) <= n])
    chances = scipy.stats.multinomial.pmf(cells, n, [both, lost, gained, rest])
    found = [(Paired(*map(int, c)), float(p)) for c, p in zip(cells, chances, strict=True) if p > 1e-8]
    assert sum(p for _, p in found) > 0.999
    return found


def missed(
    interval: Callable[[Paired], tuple[float, float] | None], n: int, both: float, lost: float, gained: float
) -> tuple[float, float]:
    """How often the truth lies below the interval, and how often above it."""
    truth = (both + gained) / (both + lost)
    found = [(interval(p), chance) for p, chance in outcomes(n, both, lost, gained)]
    return sum(c for i, c in found if i and truth < i[0]), sum(c for i, c in found if i and truth > i[1])


def bootstrap(p: Paired, rng: np.random.Generator) -> tuple[float, float]:
    """What drawing the rows again and taking percentiles gives."""
    drawn = rng.multinomial(p.n, np.array([p.both, p.lost, p.gained, p.neither]) / p.n, size=400)
    low, high = np.quantile((drawn[:, 0] + drawn[:, 2]) / (drawn[:, 0] + drawn[:, 1]), [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize(
    ("n", "both", "lost", "gained"),
    [(25, 0.7, 0.1, 0.1), (60, 0.9, 0.04, 0.02), (300, 0.96, 0.01, 0.005), (300, 0.97, 0.003, 0.003)],
)
def test_a_kept_ratios_interval_misses_the_truth_about_as_often_as_it_says(
    n: int, both: float, lost: float, gained: float
) -> None:
    below, above = missed(kept_interval, n, both, lost, gained)
    # a score interval is not exact: a side nominally of 2.5 % was never seen to exceed 3.7 %
    assert max(below, above) < 0.038
    assert below + above < 0.06


def test_a_bootstrap_of_few_flips_misses_the_truth_three_times_as_often_as_it_says() -> None:
    case = (300, 0.97, 0.01, 0.0)
    rng = np.random.default_rng(0)
    below, _ = missed(lambda p: bootstrap(p, rng), *case)
    assert below > 0.07  # it says 0.025
    assert max(missed(kept_interval, *case)) < 0.035
    assert bootstrap(Paired(300, 0, 0, 0), rng) == (1, 1)


@pytest.mark.parametrize("shares", [[(0.95, 0.02, 0.01)] * 2, [(0.95, 0.02, 0.01), (0.9, 0.05, 0.01)]])
def test_the_worst_languages_ratio_is_held_as_often_as_it_says(shares: list[tuple[float, float, float]]) -> None:
    rng = np.random.default_rng(0)
    truth = min((b + g) / (b + lost) for b, lost, g in shares)
    interval = functools.lru_cache(maxsize=None)(lambda pairs: worst_interval(pairs))
    held, trials = 0, 1500
    for _ in range(trials):
        pairs = tuple(Paired(*map(int, rng.multinomial(150, [*s, 1 - sum(s)]))) for s in shares)
        low, high = interval(pairs)  # type: ignore[misc]
        held += low <= truth <= high
    assert held / trials > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def skewed(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of rows whose tokens are alike, as divergences are: few rows hold most of it."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 20, rows)
    return counts * rng.lognormal(-6, 1.0, rows), counts


@pytest.mark.parametrize("rows", [8, 40, 300])
def test_a_token_means_interval_is_scipys_bca_of_rows(rows: int) -> None:
    sums, counts = skewed(rows, rows)
    found = mean_interval(sums, counts, resamples=20000)
    theirs = scipy.stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True, n_resamples=20000,
        batch=500, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # the ends of two bootstraps of 20,000 differ by about 3 % of the interval's width
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.06 * (theirs.high - theirs.low))


def test_a_token_means_interval_holds_the_truth_and_one_of_tokens_alone_would_not() -> None:
    truth, trials, held, naive = math.exp(-6 + 0.5), 300, 0, 0
    for seed in range(trials):
        sums, counts = skewed(300, seed)
        low, high = mean_interval(sums, counts, resamples=500)  # type: ignore[misc]
        held += low <= truth <= high
        tokens = np.repeat(sums / counts, counts)
        naive += abs(tokens.mean() - truth) <= 1.96 * tokens.std() / math.sqrt(len(tokens))
    assert held / trials > 0.90  # it says 0.95; so skewed data cost a bootstrap of 300 rows some of it
    assert naive / trials < 0.60


@given(st.integers(2, 30), st.integers(0, 99), st.floats(0.1, 10))
def test_a_token_means_interval_follows_scale_and_surrounds_the_mean(rows: int, seed: int, scale: float) -> None:
    sums, counts = skewed(rows, seed)
    low, high = mean_interval(sums, counts, resamples=200)  # type: ignore[misc]
    assert low <= high
    assert (sums / counts).min() <= low * (1 + 1e-12)
    assert high <= (sums / counts).max() * (1 + 1e-12)
    assert mean_interval(sums * scale, counts, resamples=200) == pytest.approx((low * scale, high * scale))
    assert mean_interval(sums, counts, resamples=200) == (low, high)


def test_what_does_not_vary_is_a_point_and_one_row_has_no_interval() -> None:
    assert mean_interval([0.0, 0.0], [3, 5]) == (0, 0)
    assert mean_interval([2.0], [3]) is None
    assert quantile_interval([1.0, 2.0], [0, 0], 0.5) is None


def test_a_share_without_a_miss_is_bounded_by_the_rows_without_one() -> None:
    low, high = share_interval([5, 7, 9] * 100, [5, 7, 9] * 100)  # type: ignore[misc]
    assert high == 1
    assert low**300 == pytest.approx(0.025)  # rows without a miss that would still be seen this often
    assert share_interval([4, 7], [5, 7]) == mean_interval([4, 7], [5, 7])


@given(st.lists(st.floats(-5, 5), min_size=1), st.floats(0.01, 0.99))
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], at: float) -> None:
    enough = [v for v in values if sum(w <= v for w in values) >= at * len(values) - 1e-9]
    assert quantile(values, at) == min(enough)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_a_quantiles_interval_is_that_of_rows_drawn_again_one_by_one(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "AT_ONCE", block)
    rng = np.random.default_rng(3)
    rows = [rng.lognormal(rng.normal(), 0.5, n) for n in rng.integers(1, 9, 60)]
    drawn = [
        quantile(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]), 0.9) for _ in range(2000)
    ]
    order = rng.permutation(sum(map(len, rows)))
    values, row = np.concatenate(rows)[order], np.repeat(np.arange(60), list(map(len, rows)))[order]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert quantile_interval(values, row, 0.9) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_fidelity_over_tokens_is_means_over_tokens_and_intervals_over_rows() -> None:
    rng = np.random.default_rng(0)
    row = np.repeat([7, 3, 9, 4], [3, 1, 5, 2])
    kl, nll, other = rng.exponential(size=(3, 11))
    same = rng.random(11) < 0.5
    found = token_fidelity(kl, nll, other, same, row)
    assert found["kl_mean"] == pytest.approx(sum(kl) / 11)
    assert (found["kl_max"], found["kl_p99"]) == (max(kl), max(kl))
    assert found["top1"] == sum(same) / 11
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / 11))
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["perplexity_reference"])
    assert (found["rows"], found["answer_tokens"]) == (4, 11)
    each = [row == r for r in sorted({*row})]
    sums, sizes = [float((nll - other)[e].sum()) for e in each], [int(e.sum()) for e in each]
    low, high = mean_interval(sums, sizes)  # type: ignore[misc]
    assert found["perplexity_ratio_ci"] == pytest.approx([math.exp(low), math.exp(high)])
    assert found["kl_mean_ci"][0] < found["kl_mean"] < found["kl_mean_ci"][1]
