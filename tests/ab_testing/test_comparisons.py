import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.comparisons import RatioMoments, rate_difference
from ab_testing.errors import InsufficientData

Users = list[tuple[float, float]]
users = st.lists(st.tuples(st.integers(0, 5), st.integers(5, 9)), min_size=2, max_size=30)


def sample(rng: np.random.Generator, n: int, rate: float) -> Users:
    counts = rng.integers(1, 12, n)
    own = rng.beta(10 * rate, 10 * (1 - rate), n)
    return [(float(rng.binomial(count, p)), float(count)) for count, p in zip(counts, own, strict=True)]


def coins(events: int, n: int) -> RatioMoments:
    return RatioMoments.from_users([(1, 1)] * events + [(0, 1)] * (n - events))


def test_one_interaction_per_user_is_welchs_t_interval() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(50), rng.random(80) + 0.1
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    result = rate_difference(
        RatioMoments.from_users([(x, 1.0) for x in first]), RatioMoments.from_users([(x, 1.0) for x in second]), 0.05
    )
    assert (result.ci_lower, result.ci_upper) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert result.estimate == pytest.approx(second.mean() - first.mean())
    assert result.method == "delta"


def test_clustered_users_match_the_linearised_residuals() -> None:
    rng = np.random.default_rng(1)
    arms = [sample(rng, 200, 0.2), sample(rng, 300, 0.3)]
    means, variances = [], []
    for arm in arms:
        x, n = np.array(arm).T
        rate = x.sum() / n.sum()
        residuals = (x - rate * n) / n.mean()
        means.append(rate)
        variances.append(residuals.var(ddof=1) / len(x))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 199 + variances[1] ** 2 / 299)
    reach = stats.t.ppf(0.95, freedom) * np.sqrt(sum(variances))
    result = rate_difference(RatioMoments.from_users(arms[0]), RatioMoments.from_users(arms[1]), 0.1)
    assert result.estimate == pytest.approx(means[1] - means[0])
    assert result.ci_upper - result.estimate == pytest.approx(reach, rel=1e-9)


def test_newcombes_own_example_of_no_events() -> None:
    """Newcombe (1998), table II, method 10: 10/10 against 0/20, and 5/56 against 0/29."""
    sure = rate_difference(coins(0, 20), coins(10, 10), 0.05)
    assert (sure.ci_lower, sure.ci_upper) == pytest.approx((0.6791, 1.0), abs=5e-5)
    rare = rate_difference(coins(0, 29), coins(5, 56), 0.05)
    assert (rare.ci_lower, rare.ci_upper) == pytest.approx((-0.0381, 0.1926), abs=5e-5)
    assert sure.method == rare.method == "newcombe"


def test_a_new_harm_is_seen_although_the_control_has_none() -> None:
    result = rate_difference(coins(0, 1000), coins(12, 1000), 0.05)
    assert result.ci_lower > 0


def test_no_events_anywhere_is_not_certainty() -> None:
    result = rate_difference(coins(0, 1000), coins(0, 1000), 0.05)
    assert result.estimate == 0
    assert (result.ci_lower, result.ci_upper) == pytest.approx((-0.0038, 0.0038), abs=1e-4)


@given(users, users)
def test_an_interval_has_width_and_holds_its_estimate(control: Users, treatment: Users) -> None:
    result = rate_difference(RatioMoments.from_users(control), RatioMoments.from_users(treatment), 0.05)
    assert result.ci_lower < result.ci_upper
    assert result.ci_lower - 1e-12 <= result.estimate <= result.ci_upper + 1e-12


@given(users, users)
def test_merging_is_the_same_as_taking_all_users(left: Users, right: Users) -> None:
    merged = RatioMoments.from_users(left).merge(RatioMoments.from_users(right))
    assert merged == RatioMoments.from_users(left + right)


@pytest.mark.parametrize("few", [[], [(1.0, 2.0)], [(0.0, 0.0), (0.0, 0.0)]])
def test_too_few_users_are_no_answer(few: Users) -> None:
    with pytest.raises(InsufficientData, match="control"):
        rate_difference(RatioMoments.from_users(few), coins(3, 10), 0.05)


def test_equal_values_that_are_not_shares_are_no_answer() -> None:
    with pytest.raises(InsufficientData, match="shares"):
        rate_difference(RatioMoments.from_users([(300.0, 1.0)] * 5), coins(3, 10), 0.05)


def test_nominal_coverage_on_clustered_users() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        first, second = (RatioMoments.from_users(sample(rng, 150, 0.2)) for _ in range(2))
        result = rate_difference(first, second, 0.05)
        covered += result.ci_lower <= 0 <= result.ci_upper
    assert 0.90 <= covered / 300 <= 0.985
