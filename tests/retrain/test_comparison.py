"""The statistics of the gate: against scipy, against what is known, and promises for all values."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from retrain.comparison import bootstrap_bounds, mcnemar, mean_bounds, ratio_bounds, win_rate

DIFFERENCES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=60)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test_of_the_discordant_prompts(n_worse: int, n_better: int, n_same: int) -> None:
    found = mcnemar([-1.0] * n_worse + [1.0] * n_better + [0.0] * n_same)
    n = n_worse + n_better
    assert found == pytest.approx(binomtest(n_worse, n, alternative="greater").pvalue if n else 1.0)


def test_mcnemar_on_the_published_example() -> None:
    """Agresti (2013, Categorical Data Analysis, section 11.1): 150 and 86 discordant; one-sided, z = 4.17."""
    assert mcnemar([-1.0] * 150 + [1.0] * 86) == pytest.approx(1.8e-5, rel=0.2)
    assert mcnemar([]) == 1.0


@given(DIFFERENCES, st.floats(0.001, 0.4))
def test_the_bootstrap_has_a_width_and_holds_the_estimate(values: list[float], alpha: float) -> None:
    bounds = bootstrap_bounds(values, alpha)
    assert -1 <= bounds.lower <= bounds.upper <= 1
    assert bounds == bootstrap_bounds(list(reversed(values)), alpha)
    strict = bootstrap_bounds(values, alpha / 2)
    assert strict.lower <= bounds.lower
    assert strict.upper >= bounds.upper


@pytest.mark.parametrize("values", [[1.0] * 10, [0.0] * 10, [-1.0] * 30])
def test_prompts_that_all_agree_are_not_certain(values: list[float]) -> None:
    bounds = bootstrap_bounds(values, 0.05)
    assert bounds.upper - bounds.lower > 0.02


def test_the_bootstrap_is_that_of_scipy_but_for_the_two_prompts_it_adds() -> None:
    rng = random.Random(1)
    values = [rng.choice([-1.0, 0.0, 0.0, 0.0, 1.0]) for _ in range(300)]
    theirs = bootstrap(
        ([*values, 1.0, -1.0],), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_bounds(values, 0.05) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_the_bootstrap_s_lower_bound_is_hardly_ever_above_the_truth() -> None:
    rng = random.Random(3)
    n_wrong = 0
    for _ in range(400):
        pairs = [(rng.random() < 0.6, rng.random() < 0.7) for _ in range(80)]
        n_wrong += bootstrap_bounds([float(new) - float(old) for old, new in pairs], 0.05).lower > 0.1
    assert n_wrong <= 0.08 * 400


def test_a_ratio_of_paired_means() -> None:
    below = [10.0, 12.0, 8.0, 11.0, 9.0]
    bounds = ratio_bounds(below, [2 * value for value in below], 0.05)
    assert bounds == pytest.approx((2.0, 2.0))
    wide = ratio_bounds(below, [21.0, 23.0, 18.0, 20.0, 18.0], 0.05)
    assert wide.lower < 2.0 < wide.upper


@given(st.integers(0, 50), st.integers(0, 50))
def test_at_equal_length_the_win_rate_is_what_was_counted_and_one_of_each(n_won: int, n_lost: int) -> None:
    scores = [1.0] * n_won + [0.0] * n_lost
    if not scores:
        return
    found = win_rate(scores, [0.0] * len(scores), 0.05)
    assert found.share == pytest.approx((n_won + 1) / (n_won + n_lost + 2), abs=1e-6)
    assert 0 < found.bounds.lower < found.share < found.bounds.upper < 1


def test_wins_that_come_with_length_do_not_count() -> None:
    """A judge that prefers whatever is longer, and a model that is longer in seven cases of ten."""
    rng = random.Random(5)
    longer = [rng.gauss(30, 10) if rng.random() < 0.7 else rng.gauss(-30, 10) for _ in range(200)]
    found = win_rate([float(value > 0) for value in longer], longer, 0.05)
    assert found.raw > 0.6
    assert found.share == pytest.approx(0.5, abs=0.08)


def test_wins_whatever_the_length_do() -> None:
    rng = random.Random(6)
    longer = [rng.gauss(20, 20) for _ in range(300)]
    found = win_rate([float(rng.random() < 0.8) for _ in longer], longer, 0.05)
    assert found.bounds.lower > 0.7


def test_the_interval_of_a_win_rate_covers() -> None:
    rng = random.Random(7)
    n_wrong = 0
    for _ in range(300):
        scores = [rng.choice([0.0, 0.5, 1.0]) for _ in range(60)]
        n_wrong += win_rate(scores, [rng.gauss(0, 10) for _ in scores], 0.05).bounds.lower > 0.5
    assert n_wrong <= 0.09 * 300


@given(DIFFERENCES)
def test_turning_the_sides_round_turns_the_win_rate_round(values: list[float]) -> None:
    scores = [(value + 1) / 2 for value in values]
    lengths = [10 * value for value in reversed(values)]
    one = win_rate(scores, lengths, 0.05)
    other = win_rate([1 - score for score in scores], [-length for length in lengths], 0.05)
    assert other.share == pytest.approx(1 - one.share, abs=1e-6)


@given(DIFFERENCES, st.floats(0.01, 0.4))
def test_both_kinds_of_interval_agree_roughly(values: list[float], alpha: float) -> None:
    if len(values) < 30:
        return
    one, other = mean_bounds(values, alpha), bootstrap_bounds(values, alpha)
    assert one == pytest.approx(other, abs=0.08)
