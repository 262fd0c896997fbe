"""Length bias: what is measured, and what re-balancing promises."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feedback.filters.evidence import Evidence
from feedback.filters.filtering import filter_pairs
from feedback.filters.length_bias import MIN_PAIRS, log_ratio, measure, rebalance
from feedback.filters.reasons import Reason
from feedback.pairs import PreferencePair
from pawl.settings import FilterSettings
from tests.feedback.filters.pairs import make_pair

lengths = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=50)
many_lengths = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=MIN_PAIRS, max_size=50)
limits, shares = st.floats(0, 1), st.floats(0, 1)


def of_lengths(sizes: list[tuple[int, int]]) -> list[PreferencePair]:
    return [make_pair(number, "a" * longer, "b" * shorter) for number, (longer, shorter) in enumerate(sizes)]


def ratios_of(pairs: list[PreferencePair]) -> dict[str, float]:
    return {pair.id: log_ratio(pair) for pair in pairs}


@given(lengths)
def test_the_interval_is_students(sizes: list[tuple[int, int]]) -> None:
    pairs = of_lengths(sizes)
    bias = measure(map(log_ratio, pairs))
    ratios = [log_ratio(pair) for pair in pairs]
    assert bias.n_pairs == len(pairs)
    assert (bias.mean is None) == (not pairs)
    assert (bias.ci_lower is None) == (len(pairs) < 2)
    if len(set(ratios)) > 1:
        low, high = stats.ttest_1samp(ratios, 0.0).confidence_interval(0.95)
        assert bias.ci_lower == pytest.approx(low, abs=1e-9)
        assert bias.ci_upper == pytest.approx(high, abs=1e-9)


def test_twice_as_long_is_the_logarithm_of_two() -> None:
    bias = measure(log_ratio(make_pair(n, "a" * 199, "b" * 99)) for n in range(5))
    assert bias.mean == pytest.approx(math.log(2))
    assert bias.share_longer == 1.0


@given(lengths, limits, shares)
def test_what_is_left_is_balanced_or_the_shortfall_says_by_how_much_not(
    sizes: list[tuple[int, int]], limit: float, share: float
) -> None:
    pairs = of_lengths(sizes)
    found = rebalance(ratios_of(pairs), limit, share)
    kept = [pair for pair in pairs if pair.id not in found.dropped]
    assert len(found.dropped) <= share * len(pairs)
    if len(pairs) < MIN_PAIRS:
        assert not found.dropped
        return
    before, after = abs(measure(map(log_ratio, pairs)).mean or 0.0), abs(measure(map(log_ratio, kept)).mean or 0.0)
    assert found.shortfall == pytest.approx(max(after - limit, 0.0), abs=1e-9)
    assert after <= before + 1e-9
    assert before > limit - 1e-9 or not found.dropped


@given(many_lengths, limits)
def test_no_fewer_pairs_would_do(sizes: list[tuple[int, int]], limit: float) -> None:
    pairs = of_lengths(sizes)
    found = rebalance(ratios_of(pairs), limit, 1.0)
    if found.dropped and not found.shortfall:
        one_fewer = rebalance(ratios_of(pairs), limit, (len(found.dropped) - 0.5) / len(pairs))
        assert one_fewer.shortfall > 0
        assert one_fewer.dropped < found.dropped


@given(lengths, limits, st.randoms(use_true_random=False))
def test_neither_order_nor_direction_matters(sizes: list[tuple[int, int]], limit: float, rng: random.Random) -> None:
    pairs = of_lengths(sizes)
    found = rebalance(ratios_of(pairs), limit, 0.5)
    assert rebalance(ratios_of(rng.sample(pairs, len(pairs))), limit, 0.5) == found
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    if abs(measure(map(log_ratio, pairs)).mean or 0.0) > 1e-9:
        assert rebalance(ratios_of(turned), limit, 0.5).dropped == found.dropped


def test_the_set_is_rebalanced_after_all_other_filters() -> None:
    even = [make_pair(n, f"answer {n:03d}", f"refuse {n:03d}") for n in range(90)]
    long = [make_pair(100 + n, f"answer {n:03d}" * 30, f"refuse {n:03d}") for n in range(30)]
    settings = FilterSettings(max_length_bias=0.5, max_length_dropped=0.5)
    filtered = filter_pairs([*even, *long], Evidence(), settings)
    assert filtered.dropped.keys() == {Reason.LENGTH_BIAS}
    assert 0 < filtered.dropped[Reason.LENGTH_BIAS] < 30
    assert filtered.length_bias.mean == pytest.approx(0.5, abs=0.05)
    assert filtered.length_shortfall == 0.0
    strict = filter_pairs([*even, *long], Evidence(), FilterSettings(max_length_bias=0.0, max_length_dropped=0.1))
    assert strict.dropped == {Reason.LENGTH_BIAS: 12}
    assert strict.length_shortfall == pytest.approx(strict.length_bias.mean)
