from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.analysis.intervals import confidence_sequence, sequence_p_value, t_interval, t_p_value
from ab_testing.errors import InsufficientData

estimates, variances = st.floats(-5, 5), st.floats(1e-6, 1.0)
freedoms = st.floats(100, 1e7)
scales = st.floats(0.5, 10)
"""Standard deviation of the prior over the standard error."""


@given(estimates, variances, st.floats(1.5, 1e9), st.floats(1e-6, 0.5))
def test_student_is_scipys(estimate: float, variance: float, freedom: float, alpha: float) -> None:
    reach = stats.t.isf(alpha / 2, freedom) * math.sqrt(variance)
    assert t_interval(estimate, variance, freedom, alpha) == pytest.approx(
        (estimate - reach, estimate + reach), rel=1e-9
    )
    expected = 2 * stats.t.sf(abs(estimate) / math.sqrt(variance), freedom)
    assert t_p_value(estimate, variance, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(estimates, variances, freedoms, scales, st.floats(0.001, 0.2))
def test_the_sequence_ends_where_the_evidence_reaches_one_over_alpha(
    estimate: float, variance: float, freedom: float, scale: float, alpha: float
) -> None:
    interval = confidence_sequence(estimate, variance, freedom, alpha, scale * math.sqrt(variance))
    for limit in interval:
        assert sequence_p_value(estimate - limit, variance, freedom, scale * math.sqrt(variance)) == pytest.approx(
            alpha, rel=1e-5
        )


@given(estimates, variances, freedoms, scales)
def test_the_sequence_is_wider_than_the_interval(
    estimate: float, variance: float, freedom: float, scale: float
) -> None:
    sequence = confidence_sequence(estimate, variance, freedom, 0.05, scale * math.sqrt(variance))
    interval = t_interval(estimate, variance, freedom, 0.05)
    assert sequence.lower < interval.lower
    assert sequence.upper > interval.upper


def test_too_little_information_excludes_nothing() -> None:
    with pytest.raises(InsufficientData):
        confidence_sequence(0.0, 1.0, 3.0, 1e-6, 0.5)


def test_looking_all_the_time_stays_honest() -> None:
    """Two equal variants, looked at 50 times: any look excludes zero in at most 5 % and noise; Student in far more."""
    rng = np.random.default_rng(11)
    sums = rng.normal(size=(400, 50, 2), scale=math.sqrt(100)).cumsum(axis=1)
    counts = 100.0 * np.arange(1, 51)
    estimate = (sums[:, :, 1] - sums[:, :, 0]) / counts
    variance = 2 / counts
    sequence = [
        any(sequence_p_value(e, v, 2 * n - 2, 0.1) <= 0.05 for e, v, n in zip(run, variance, counts, strict=True))
        for run in estimate
    ]
    student = np.abs(estimate) > 1.96 * np.sqrt(variance)
    assert np.mean(sequence) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert student.any(axis=1).mean() > 0.2
