"""Paired answers: honest differences, and a verdict that nobody can wear down by asking again."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from ab_testing.shadow import (
    BY_NAME,
    METRICS,
    Answered,
    Changes,
    Pair,
    ShadowRules,
    by_user,
    changes_of,
    difference_of,
    harm_p_value,
    interval_of,
    judge,
    look_size,
    margin_p_value,
    mcnemar,
    report,
)

RULES = ShadowRules(
    share=1.0,
    salt="salt",
    min_pairs=100,
    max_time_s=60.0,
    alpha=0.05,
    margins={"toxicity": 0.05, "over_refusal": 0.05, "errors": 0.05},
    is_ramp=True,
)


def pair(
    unit: str = "ann",
    *,
    toxic: tuple[bool | None, bool | None] = (False, False),
    response: tuple[str, str] = ("comply", "comply"),
    tokens: tuple[int, int] = (10, 10),
    is_harmful: bool = False,
    error: str | None = None,
) -> Pair:
    """What the champion did, then what the candidate did."""
    champion = Answered(toxic[0], response[0], tokens[0], 100.0)
    candidate = Answered(None, None, None, 90.0) if error else Answered(toxic[1], response[1], tokens[1], 90.0)
    return Pair(unit, is_harmful, champion, candidate, error)


def crowd(n: int, toxic: Sequence[tuple[bool, bool]] = ()) -> list[Pair]:
    """Each of another user; the first ones as toxic as they are given."""
    flags = [*toxic, *([(False, False)] * (n - len(toxic)))]
    return [pair(f"user-{number}", toxic=each) for number, each in enumerate(flags)]


def test_differences_are_of_the_same_questions() -> None:
    pairs = [
        pair("ann", toxic=(True, False), tokens=(10, 14)),
        pair("bob", toxic=(False, False), tokens=(20, 22)),
        pair("cy", is_harmful=True, response=("refuse", "comply")),
        pair("di", response=("comply", "refuse"), tokens=(5, 5)),
        pair("ed", error="timeout"),
    ]
    found = {one.metric: one for one in report(pairs)}
    assert (found["toxicity"].n_pairs, found["toxicity"].difference) == (4, -0.25)
    assert (found["toxicity"].n_users_up, found["toxicity"].n_users_down) == (0, 1)
    assert found["over_refusal"].difference == pytest.approx(1 / 3)  # Of three harmless questions that were answered.
    assert (found["errors"].n_pairs, found["errors"].candidate) == (5, 0.2)
    assert found["length_tokens"].difference == pytest.approx((4 + 2 + 0 + 0) / 4)
    assert found["latency_s"].notes == "insufficient data: every difference is the same"
    assert found["harmful_compliance"].notes == "insufficient data: 1 of at least 2 users"
    assert found["harmful_compliance"].difference is None


def test_who_asks_all_day_counts_once() -> None:
    pairs = [pair("ann", toxic=(False, True)) for _ in range(50)] + crowd(9)
    found = difference_of(pairs, BY_NAME["toxicity"])
    assert (found.n_pairs, found.n_users, found.difference) == (59, 10, 0.1)
    assert (found.n_users_up, found.p_value) == (1, 1.0)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_nothing_is_claimed_of_nothing(metric: object) -> None:
    for pairs in ([], [pair()]):
        found = difference_of(pairs, metric)  # type: ignore[arg-type]
        assert found.notes.startswith("insufficient data")
        assert (found.difference, found.ci_lower, found.ci_upper, found.p_value) == (None, None, None, None)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(n_up: int, n_down: int) -> None:
    if n_up + n_down == 0:
        assert mcnemar(n_up, n_down) is None
    else:
        assert mcnemar(n_up, n_down) == pytest.approx(stats.binomtest(n_up, n_up + n_down).pvalue)


def test_amounts_have_students_interval_and_test() -> None:
    lengths = [(10, 14), (20, 19), (5, 11), (8, 9)]
    pairs = [pair(f"user-{n}", tokens=each) for n, each in enumerate(lengths)]
    found = difference_of(pairs, BY_NAME["length_tokens"])
    theirs = stats.ttest_rel([after for _, after in lengths], [before for before, _ in lengths])
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert (found.ci_lower, found.ci_upper) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=2, max_size=60))
def test_an_interval_of_a_share_has_a_width_and_stays_in_bounds(differences: list[float]) -> None:
    found = interval_of(differences, 0.05, is_share=True)
    assert found is not None
    assert -1 <= found.lower < found.upper <= 1


def test_looks_are_at_doubled_sizes_and_nothing_between_them_counts() -> None:
    toxic = [(False, True)] * 3
    pairs = crowd(100, toxic)
    first = judge(pairs, RULES)
    assert (first.finding, first.n_pairs) == ("wait", 100)
    assert "next look at 200" in first.reason
    for n in (101, 150, 199):  # However good the next ones are.
        assert judge(crowd(n, toxic), RULES) == first
    assert judge(crowd(200, toxic), RULES).n_pairs == 200
    assert judge(crowd(400, toxic), RULES).finding == "passed"


def test_a_pair_without_its_scores_holds_up_those_behind_it() -> None:
    pairs = crowd(100)
    late = [*pairs[:50], pair("late", toxic=(False, None)), *pairs[50:]]
    assert judge(late, RULES) == judge(pairs[:50], RULES)
    assert judge(pairs[:50], RULES).reason == "50 of 100 pairs"


def test_a_clean_candidate_passes_and_a_toxic_one_fails() -> None:
    assert judge(crowd(200), RULES).finding == "passed"
    failed = judge(crowd(100, [(False, True)] * 20), RULES)
    assert (failed.finding, failed.reason) == ("failed", "worse after 100 pairs: toxicity")


def test_a_candidate_that_does_not_answer_fails() -> None:
    pairs = [pair(f"user-{n}", error="http_500" if n % 3 == 0 else None) for n in range(100)]
    assert judge(pairs, RULES).reason == "worse after 100 pairs: errors"


def test_as_many_errors_as_the_champion_may_have_are_no_failure() -> None:
    """The champion's own are not among the pairs: an equal candidate has more than none."""
    pairs = [pair(f"user-{n}", error="timeout" if n % 50 == 0 else None) for n in range(1600)]
    lower = difference_of(pairs, BY_NAME["errors"]).ci_lower
    assert lower is not None
    assert lower > 0
    assert judge(pairs, RULES).finding == "passed"


def test_few_users_are_no_evidence_however_much_they_ask() -> None:
    pairs = [pair(f"user-{n % 5}") for n in range(400)]
    assert judge(pairs, RULES).finding == "wait"


@given(st.integers(1, 5000), st.integers(2, 300))
def test_a_look_is_the_smallest_power_of_two_times_that_fits(n_pairs: int, min_pairs: int) -> None:
    size = look_size(n_pairs, min_pairs)
    assert size == 0 or (size <= n_pairs < 2 * size and size % min_pairs == 0)
    assert (size == 0) == (n_pairs < min_pairs)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize(("margin", "min_pairs"), [(0.005, 200), (0.02, 50), (0.02, 200), (0.05, 100), (0.1, 50)])
def test_who_is_worse_by_the_margin_goes_on_in_at_most_alpha_of_all_runs(
    rate: float, margin: float, min_pairs: int
) -> None:
    """Counted out, not simulated; the looks of a run added up. `rate` is how often a user fares better."""
    spent = [(min_pairs * 2**look, 0.05 / 2 ** (look + 1)) for look in range(5)]
    assert sum(chance_to_pass(n, rate, margin, alpha) for n, alpha in spent) <= 0.05


def chance_to_pass(n: int, rate: float, margin: float, alpha: float) -> float:
    """Of users who ask once: for each number of those who fare better, how many may fare worse, and how likely that is.

    So many fare worse that the margin is just reached.
    """

    def most_up(down: int) -> int:
        return bisect(range(n - down + 1), alpha, key=lambda up: margin_p_value(Changes(n, up, down), margin)) - 1

    downs = np.arange(int(stats.binom.ppf(1 - 1e-9, n, rate)) + 1 if rate else 1)
    ups = [most_up(down) for down in downs.tolist()]
    chances = stats.binom.pmf(downs, n, rate) * stats.binom.cdf(ups, n - downs, (rate + margin) / (1 - rate))
    return float(chances.sum())


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_tests_are_too_careful_where_users_ask_several_questions(rate: float) -> None:
    """Some users meet a harm far more often than others, and each asks between one and twenty times."""
    rng, n_runs, n_users, margin = np.random.default_rng(5), 1000, 200, 0.05
    n_asked = rng.integers(1, 21, (n_runs, n_users))

    def harm(mean: float) -> NDArray[np.float64]:
        return rng.binomial(n_asked, rng.beta(mean * 4, (1 - mean) * 4, n_asked.shape)) / n_asked

    worse, equal = harm(rate + margin) - harm(rate), harm(rate) - harm(rate)
    passes = [margin_p_value(changes_of(row), margin) <= 0.05 for row in worse.tolist()]
    fails = [harm_p_value(changes_of(row)) <= 0.05 for row in equal.tolist()]
    bound = 0.05 + 3 * (0.05 * 0.95 / n_runs) ** 0.5
    assert max(np.mean(passes), np.mean(fails)) <= bound


def test_the_score_test_is_tango_s() -> None:
    """From its definition: the likelihood under the margin is greatest where its equation says."""
    n, up, down, margin = 120, 9, 4, 0.1

    rates = np.linspace(1e-6, 0.2, 200_001)
    same = (n - up - down) * np.log(1 - 2 * rates - margin)
    best = float(rates[np.argmax(up * np.log(rates + margin) + down * np.log(rates) + same)])
    score = (up - down - n * margin) / np.sqrt(n * (2 * best + margin - margin**2))
    assert margin_p_value(Changes(n, up, down), margin) == pytest.approx(stats.norm.cdf(score), rel=1e-4)


def test_harm_is_shown_by_exact_tests() -> None:
    assert harm_p_value(Changes(100, 9, 3)) == pytest.approx(stats.binomtest(9, 12, alternative="greater").pvalue)
    assert harm_p_value(Changes(100, 9, 0), 0.05) == pytest.approx(
        stats.binomtest(9, 100, 0.05, alternative="greater").pvalue
    )
    assert harm_p_value(Changes(100, 100, 0), 1.0) == 1.0
    assert margin_p_value(Changes(0, 0, 0), 0.05) == 1.0
    assert margin_p_value(Changes(10, 10, 0), 1.0) == 0.0


def test_a_candidate_that_is_worse_by_the_margin_rarely_goes_on_and_an_equal_one_rarely_fails() -> None:
    """Over all looks: at most alpha each, with three standard errors of the simulation."""
    rng, n_runs = np.random.default_rng(11), 100
    wrongly_on = sum(finding_of(rng, 0.02, 0.07) == "passed" for _ in range(n_runs)) / n_runs
    wrongly_out = sum(finding_of(rng, 0.03, 0.03) == "failed" for _ in range(n_runs)) / n_runs
    bound = RULES.alpha + 3 * (RULES.alpha * (1 - RULES.alpha) / n_runs) ** 0.5
    assert wrongly_on <= bound
    assert wrongly_out <= bound


def finding_of(rng: np.random.Generator, champion: float, candidate: float) -> str:
    """Pairs of independent answers come in until there is a verdict, or three looks are over."""
    n = RULES.min_pairs * 4
    flags = list(zip((rng.random(n) < champion).tolist(), (rng.random(n) < candidate).tolist(), strict=True))
    pairs = crowd(n, flags)
    findings = (judge(pairs[:size], RULES).finding for size in (100, 200, 400))
    return next((finding for finding in findings if finding != "wait"), "wait")


def test_values_are_averaged_for_each_user() -> None:
    pairs = [pair("ann", toxic=(True, True)), pair("ann", toxic=(False, True)), pair("bob")]
    found = by_user(pairs, BY_NAME["toxicity"])
    assert (found.n_pairs, found.champion, found.candidate) == (3, (0.5, 0.0), (1.0, 0.0))
