from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.analysis.intervals import confidence_sequence
from ab_testing.analysis.power import (
    Design,
    detectable_effect,
    power,
    required_users,
    required_users_at_any_look,
)
from ab_testing.errors import InsufficientData

designs = st.builds(Design, st.floats(0.1, 10), st.floats(0.001, 0.1), st.floats(0.01, 0.5))


@given(designs, st.floats(0.05, 2), st.floats(0.2, 0.99))
def test_the_users_asked_for_have_the_power_asked_for(design: Design, effect: float, wanted: float) -> None:
    users = required_users(design, effect, wanted)
    assert power(design, effect, users) == pytest.approx(wanted, abs=1e-6)
    assert detectable_effect(design, users, wanted) == pytest.approx(effect, rel=1e-5)


@given(st.floats(0.2, 2), st.floats(0.3, 0.95), st.floats(0.02, 0.2))
def test_at_any_look_the_sequence_excludes_zero_as_often_as_asked(
    effect: float, wanted: float, prior_sd: float
) -> None:
    """By the sequence itself: with many users it leaves zero out just if the estimate is beyond its half width."""
    design = Design(1.0, alpha=0.05, treatment_share=0.3)
    users = required_users_at_any_look(design, effect, prior_sd, wanted)
    variance = 1.0 / (users * 0.3 * 0.7)
    upper = confidence_sequence(0.0, variance, 1e12, 0.05, prior_sd).upper
    shown = stats.norm.sf((upper - effect) / math.sqrt(variance)) + stats.norm.cdf(
        (-upper - effect) / math.sqrt(variance)
    )
    assert shown == pytest.approx(wanted, abs=1e-3)
    assert users > required_users(design, effect, wanted)


def test_nothing_shows_no_effect() -> None:
    with pytest.raises(InsufficientData):
        required_users(Design(1.0), 0.0)
    with pytest.raises(InsufficientData):
        required_users_at_any_look(Design(1.0), 0.0, 0.1)
