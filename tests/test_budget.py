"""A budget as it is written: units, bounds, verdicts and how far a figure misses; nonsense in one sentence."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gori.errors import GoriError
from gori.quantize.budget import LIMITS, human_bytes, parse

METRICS = {
    "size_bytes": 7_900_000, "rss_mib": 60.0, "decode_tps": 310.0, "prefill_tps": 2100.0, "calls": 0.98, "exact": 0.95,
    "exact_by_language": {"ko": 0.91, "en": 0.99}, "kl_mean": 0.008,
}  # fmt: skip
WHOLE = "size=8MB,rss=64MB,decode=300,prefill=2000,calls=0.97,exact=0.9,kl=0.01"


def test_a_whole_budget_is_met_bound_by_bound_and_every_bound_can_be_missed() -> None:
    budget = parse(WHOLE)
    assert [(v["name"], v["met"], v["miss"]) for v in budget.verdict(METRICS)] == [(n, True, 0.0) for n in LIMITS]
    for name, metric in ((n, limit.metric) for n, limit in LIMITS.items()):
        value = METRICS[metric] * (0.5 if LIMITS[name].at_least else 2)  # type: ignore[operator]
        worse = {"exact_by_language": {"ko": 0.89, "en": 0.99}} if name == "exact" else {metric: value}
        missed = [v["name"] for v in budget.verdict({**METRICS, **worse}) if not v["met"]]
        assert missed == [name]


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("8MB", 8_000_000), ("8 mb", 8_000_000), ("8MiB", 8 * 1024**2), ("900kB", 900_000), ("900KiB", 900 * 1024),
        ("1.5GB", 1_500_000_000), (".5GiB", 1024**3 // 2), ("123456", 123_456), ("123456B", 123_456),
        ("1e6", 1_000_000),
        ("2.e3kB", 2_000_000),
    ],
)  # fmt: skip
def test_bytes_are_read_in_powers_of_1000_and_1024(written: str, size_bytes: int) -> None:
    assert parse(f"size={written}").bounds[0].bound == size_bytes
    assert parse(f"rss={written}").bounds[0].bound == size_bytes / 1024**2


def test_shares_may_be_percent_and_rates_may_have_their_unit() -> None:
    assert parse("calls=99%").bounds[0].bound == 0.99
    assert parse("exact = 90 %").bounds[0].bound == 0.9
    assert parse("decode=300tok/s").bounds[0].bound == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sise=8MB", "'sise' cannot be bounded: did you mean 'size'"),
        ("size", "'size' is no bound: write NAME=VALUE"), ("size=", "'size=' is no bound"), ("", "holds no bound"),
        (",,", "holds no bound"), ("size=8XB", "unknown unit: choose one of B, kB, MB"),
        ("size=8", "fewer bytes than any model has"), ("size=-8MB", "is no number"), ("size=nan", "is no number"),
        ("decode=0", "not a finite number above zero"), ("decode=1e999", "not a finite number above zero"),
        ("decode=3s", "a unit that it does not take"), ("calls=97", "more than all"), ("calls=970%", "more than all"),
        ("kl=1%", "a unit that it does not take"), ("size=1MB,size=2MB", "bounded twice (1MB and 2MB)"),
        ("calls=0,97", "not a finite number above zero"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(GoriError) as e:
        parse(text)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_what_was_not_measured_does_not_meet_its_bound() -> None:
    budget = parse("size=1MB,kl=0.1")
    for absent in ({}, {"kl_mean": None}, {"kl_mean": math.nan}, {"kl_mean": math.inf}):
        (size, kl) = budget.verdict({"size_bytes": 10, **absent})
        assert (size["met"], kl["met"], kl["value"], kl["miss"]) == (True, False, None, None)
        assert budget.largest_miss({"size_bytes": 10, **absent}) == math.inf


@given(st.sampled_from(sorted(LIMITS)), st.integers(1, 999), st.integers(1, 9999))
def test_a_miss_is_the_share_of_the_bound_that_is_lacking_or_too_much(name: str, bound: int, value: int) -> None:
    written = {"bytes": f"{bound}MB", "share": f"{bound / 1000}"}.get(LIMITS[name].kind, str(bound))
    (b,) = parse(f"{name}={written}").bounds
    got = value * b.bound / bound  # the same unit
    exact = Fraction(bound - value, bound) if b.limit.at_least else Fraction(value - bound, bound)
    (v,) = parse(f"{name}={written}").verdict({b.limit.metric: got})
    assert v["miss"] == pytest.approx(float(max(Fraction(0), exact)), abs=1e-9)
    assert v["met"] == (v["miss"] == 0)


def test_a_budget_is_written_as_it_was_read() -> None:
    assert parse(WHOLE).text == WHOLE
    assert [b.bound for b in parse(parse(" calls = 99 % , size = 1 MB").text).bounds] == [0.99, 1e6]
    assert [b.text for b in parse("size=8MB,decode=300,kl=0.1,calls=0.9").bounds] == [
        "<= 8MB", ">= 300 tokens/s", "<= 0.1 nats", ">= 0.9",
    ]  # fmt: skip


@given(st.integers(0, 10**12))
def test_bytes_are_shown_with_three_digits(size_bytes: int) -> None:
    number, unit = human_bytes(size_bytes).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(number) * factor == pytest.approx(size_bytes, rel=0.0051)
    assert len(number.replace(".", "")) <= 3 or unit == "GB"
