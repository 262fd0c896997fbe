"""The split of users is checked against scipy, against the definition, and at every look."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from ab_testing.analysis import AnalysisError, check_split
from ab_testing.analysis.split_checks import CONCENTRATION, MISMATCH_ALPHA, together
from ab_testing.eprocess import log_split_mismatch

EVEN = {"control": 1.0, "treatment": 1.0}
counts = st.fixed_dictionaries({"control": st.integers(0, 10**6), "treatment": st.integers(0, 10**6)})


def test_the_p_value_is_scipys() -> None:
    found = check_split({"a": 480, "b": 330, "c": 190}, {"a": 5, "b": 3, "c": 2})
    expected = stats.chisquare([480, 330, 190], [500, 300, 200])
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.expected == pytest.approx({"a": 500, "b": 300, "c": 200})


def test_a_variant_without_weight_is_no_degree_of_freedom() -> None:
    """Counted as one, these users would have p = 0.135 in place of 0.0455."""
    found = check_split({"a": 5100, "b": 4900, "off": 0}, {"a": 1, "b": 1, "off": 0})
    assert found.p_value == pytest.approx(stats.chi2.sf(4.0, 1), rel=1e-12)
    assert found.p_value == pytest.approx(0.0455, abs=5e-5)
    assert set(found.counts) == {"a", "b"}


@given(counts, st.floats(0.01, 0.99))
def test_of_two_variants_it_is_the_canarys_own_evidence(seen: dict[str, int], share: float) -> None:
    found = check_split(seen, {"control": 1 - share, "treatment": share})
    expected = log_split_mismatch(seen["control"], seen["treatment"], share)
    assert found.log_bayes_factor == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_the_bayes_factor_is_a_ratio_of_two_probabilities_of_the_counts() -> None:
    shares, seen = np.array([0.5, 0.3, 0.2]), [48, 33, 19]
    found = check_split(dict(zip("abc", seen, strict=True)), dict(zip("abc", shares, strict=True)))
    mixture = stats.dirichlet_multinomial(CONCENTRATION * shares, 100).logpmf(seen)
    assert found.log_bayes_factor == pytest.approx(mixture - stats.multinomial(100, shares).logpmf(seen), abs=1e-9)
    assert special.gammaln(1.0) == 0.0


def test_at_no_look_are_equal_splits_called_a_mismatch_more_often_than_promised() -> None:
    rng = np.random.default_rng(5)
    n_wrong = 0
    for _ in range(100):
        arrived = rng.binomial(100, 0.1, 40).cumsum()
        looks = [check_split({"a": 100 * n - hits, "b": hits}, {"a": 9, "b": 1}) for n, hits in enumerate(arrived, 1)]
        n_wrong += any(look.is_mismatch for look in looks)
    assert n_wrong <= 100 * MISMATCH_ALPHA + 2


def test_phases_of_different_weights_are_judged_together() -> None:
    """Pooled, a ramp's users are in no shares that were ever intended."""
    early = check_split({"control": 9900, "treatment": 100}, {"control": 99, "treatment": 1})
    late = check_split({"control": 1000, "treatment": 1000}, EVEN)
    both = together([early, late])
    assert both.counts == {"control": 10_900, "treatment": 1100}
    assert both.p_value == pytest.approx(1.0)
    assert both.log_bayes_factor == early.log_bayes_factor + late.log_bayes_factor
    lost = together([early, check_split({"control": 1000, "treatment": 750}, EVEN)])
    assert lost.is_mismatch


def test_few_users_have_evidence_but_no_p_value() -> None:
    few = check_split({"control": 3, "treatment": 1}, EVEN)
    assert few.p_value is None
    assert math.isfinite(few.log_bayes_factor)
    assert together([]).p_value is None
    assert not together([]).is_mismatch


@pytest.mark.parametrize(
    ("seen", "weights"), [({"a": 1}, {}), ({"a": 1}, {"b": 1.0}), ({"a": 1}, {"a": 0.0}), ({"a": 1}, {"a": math.inf})]
)
def test_users_whom_no_weight_explains_are_refused(seen: dict[str, int], weights: dict[str, float]) -> None:
    with pytest.raises(AnalysisError):
        check_split(seen, weights)
