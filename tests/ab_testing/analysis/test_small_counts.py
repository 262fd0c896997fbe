from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.analysis.small_counts import Share, newcombe, newcombe_p_value, share_p_value

counts = st.tuples(st.integers(0, 60), st.integers(1, 60)).map(lambda pair: Share(min(pair), max(pair)))


@given(counts, counts)
def test_the_interval_is_never_certain_and_holds_the_estimate(control: Share, treatment: Share) -> None:
    interval = newcombe(control, treatment, 0.05)
    assert interval.upper - interval.lower > 1e-3
    assert interval.lower <= treatment.value - control.value <= interval.upper


@given(counts, counts)
def test_swapping_the_variants_swaps_the_interval(control: Share, treatment: Share) -> None:
    ours, theirs = newcombe(control, treatment, 0.05), newcombe(treatment, control, 0.05)
    assert ours == pytest.approx((-theirs.upper, -theirs.lower), abs=1e-12)
    assert newcombe_p_value(control, treatment) == pytest.approx(newcombe_p_value(treatment, control), rel=1e-9)


@given(counts, counts)
def test_the_p_value_is_where_the_interval_touches_zero(control: Share, treatment: Share) -> None:
    p_value = newcombe_p_value(control, treatment)
    if 1e-200 < p_value < 0.999:
        limits = newcombe(control, treatment, p_value)
        assert min(abs(limit) for limit in limits) < 1e-6


def test_a_harm_that_the_control_never_had_is_seen() -> None:
    """0 of 1000 against 12 of 1000, for which gbstats says p = 1 and [0, 0]."""
    none, some = Share(0, 1000), Share(12, 1000)
    assert share_p_value(none, some) == pytest.approx(0.00047, abs=5e-6)
    assert share_p_value(none, some) == pytest.approx(stats.fisher_exact([[12, 988], [0, 1000]]).pvalue, rel=1e-12)
    assert newcombe(none, some, 0.05).lower > 0


def test_no_events_at_all_say_how_many_there_could_be() -> None:
    interval = newcombe(Share(0, 1000), Share(0, 1000), 0.05)
    assert interval == pytest.approx((-0.0038, 0.0038), abs=5e-5)
    assert share_p_value(Share(0, 1000), Share(0, 1000)) == 1.0
    assert newcombe_p_value(Share(0, 1000), Share(0, 1000)) == 1.0


def test_many_events_use_the_score_test() -> None:
    expected = stats.chi2_contingency([[240, 760], [200, 800]], correction=False).pvalue
    assert share_p_value(Share(200, 1000), Share(240, 1000)) == pytest.approx(expected, rel=1e-12)
