import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ab_testing.eprocess import (
    EventShareBet,
    HarmBet,
    NonInferiorityBet,
    finite_exp,
    log_split_mismatch,
    log_weighted_mean,
    upper_harm_bound,
)
from ab_testing.errors import InvalidOutcome

GRID = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.6, 0.9)
User = tuple[float, bool, float]

users = st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.floats(0.001, 0.999)), max_size=60)


def draw(rng: np.random.Generator, n: int, w: float, control: float, treatment: float) -> list[User]:
    """Users with harm 0 or 1."""
    arms = rng.random(n) < w
    harms = rng.random(n) < np.where(arms, treatment, control)
    return [(float(harm), bool(arm), w) for harm, arm in zip(harms, arms, strict=True)]


def harm_bet(stream: Iterable[User]) -> HarmBet:
    bet = HarmBet()
    for user in stream:
        bet = bet.update(*user)
    return bet


def margin_bet(margin: float, stream: Iterable[User]) -> NonInferiorityBet:
    bet = NonInferiorityBet(margin)
    for user in stream:
        bet = bet.update(*user)
    return bet


def test_the_harm_bet_is_the_published_formula() -> None:
    stream = draw(np.random.default_rng(5), 40, 0.3, 0.2, 0.6)
    wealth = np.ones(len(GRID))
    total, count = 0.5, 1.0
    for f, z, w in stream:
        m = total / count
        stake = 0.999 / max((1 - w) * m, w * (1 - m))
        wealth *= 1 + np.array(GRID) * stake * (z - w) * (f - m)
        total, count = (total, count) if z else (total + f, count + 1)
    assert harm_bet(stream).e_value == pytest.approx(wealth.mean(), rel=1e-12)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 0.999), users)
def test_one_more_user_without_effect_is_expected_to_change_nothing(
    low: float, high: float, w: float, before: list[User]
) -> None:
    """A martingale under no effect: exact over the coin that assigns, whatever was seen before."""
    bet = harm_bet(before)
    now = math.exp(bet.log_e_value)
    expected = sum(
        0.5 * (w * bet.update(f, True, w).e_value + (1 - w) * bet.update(f, False, w).e_value) for f in (low, high)
    )
    assert expected == pytest.approx(now, rel=1e-9)


@given(st.floats(0, 1), st.floats(0.01, 0.9), st.floats(0.001, 0.999), users)
def test_at_the_margin_the_promotion_evidence_is_not_expected_to_grow(
    f: float, margin: float, w: float, before: list[User]
) -> None:
    bet = margin_bet(margin, before)
    worse = min(1.0, f + margin)
    expected = w * bet.update(worse, True, w).e_value + (1 - w) * bet.update(worse - margin, False, w).e_value
    assert expected <= bet.e_value * (1 + 1e-9)


@given(users, st.floats(0.01, 0.5), st.floats(0.01, 0.49))
def test_evidence_never_falls_as_the_margin_grows(stream: list[User], margin: float, more: float) -> None:
    narrow, wide = margin_bet(margin, stream), margin_bet(margin + more, stream)
    assert all(a <= b + 1e-9 for a, b in zip(narrow.log_wealth, wide.log_wealth, strict=True))
    assert narrow.peak <= wide.peak + 1e-9


@given(users)
def test_evidence_survives_json_and_stays_finite(stream: list[User]) -> None:
    harm, margin = harm_bet(stream), margin_bet(0.05, stream)
    assert HarmBet.from_json(json.loads(json.dumps(harm.to_json(), allow_nan=False))) == harm
    assert NonInferiorityBet.from_json(json.loads(json.dumps(margin.to_json(), allow_nan=False))) == margin
    assert all(map(math.isfinite, (*harm.log_wealth, *margin.log_wealth, margin.peak)))
    assert margin.peak >= max(0.0, margin.log_e_value)


def test_evidence_too_large_for_a_float_is_cut_off() -> None:
    bet = harm_bet([(0.0, False, 0.5), (1.0, True, 0.5)] * 2000)
    assert bet.log_e_value > 710
    assert math.isfinite(bet.e_value)
    assert finite_exp(1e6) == math.exp(700)


@settings(max_examples=30)
@given(users, users)
def test_disjoint_groups_merge_like_products(left: list[User], right: list[User]) -> None:
    merged = harm_bet(left).merge(harm_bet(right))
    assert merged == harm_bet(right).merge(harm_bet(left))
    assert merged.control_count == sum(not z for _, z, _ in left + right)
    assert merged.merge(HarmBet()) == merged


@pytest.mark.parametrize("f", [-0.01, 1.01, float("nan")])
def test_harm_outside_its_range_is_refused(f: float) -> None:
    with pytest.raises(InvalidOutcome, match="harm"):
        HarmBet().update(f, True, 0.1)


@pytest.mark.parametrize("w", [0.0, 1.0, float("nan")])
def test_a_certain_assignment_is_no_randomisation(w: float) -> None:
    with pytest.raises(InvalidOutcome, match="probability"):
        NonInferiorityBet(0.05).update(0.5, True, w)


def test_stored_evidence_of_another_grid_is_refused() -> None:
    with pytest.raises(InvalidOutcome, match="grid"):
        HarmBet.from_json(HarmBet().to_json() | {"log_wealth": [0.0]})


@pytest.mark.parametrize("margin", [0.0, 1.0, float("nan")])
def test_a_margin_that_is_none_is_refused(margin: float) -> None:
    with pytest.raises(InvalidOutcome, match="margin"):
        NonInferiorityBet(margin).update(0.5, True, 0.1)
    with pytest.raises(InvalidOutcome, match="margin"):
        NonInferiorityBet.from_json(NonInferiorityBet(0.05).to_json() | {"margin": margin})


def test_a_harm_that_the_control_never_shows_is_found_within_five_events() -> None:
    bet, events = HarmBet(), 0
    for f, z, w in draw(np.random.default_rng(2), 30_000, 0.1, 0.0, 0.012):
        bet = bet.update(f, z, w)
        events += bool(f)
        if bet.e_value >= 20:
            break
    assert bet.e_value >= 20
    assert events <= 5


def test_the_upper_bound_is_the_smallest_margin_ruled_out() -> None:
    rng = np.random.default_rng(3)
    margins = (0.02, 0.05, 0.1, 0.2, 0.5)
    stream = draw(rng, 1500, 0.5, 0.2, 0.2)
    bets = [margin_bet(margin, stream) for margin in margins]
    bound = upper_harm_bound(bets, 0.05)
    assert bound in margins[1:]
    assert [bet.margin for bet in bets if bet.has_crossed(0.05)] == [m for m in margins if m >= bound]
    assert upper_harm_bound([NonInferiorityBet(0.1)], 0.05) is None


def test_a_crossing_counts_even_if_the_evidence_falls_again() -> None:
    good = margin_bet(0.05, draw(np.random.default_rng(4), 200, 0.5, 0.6, 0.1))
    assert good.has_crossed(0.05)
    after = good
    for user in draw(np.random.default_rng(5), 400, 0.5, 0.1, 0.9):
        after = after.update(*user)
    assert after.e_value < 1
    assert after.has_crossed(0.05)


def test_event_shares_follow_the_formula_and_notice_a_fourfold_rate() -> None:
    bet = EventShareBet()
    for _ in range(7):
        bet = bet.update(True, 0.01)
    ratios = np.exp(0.25 * np.arange(1, 17))
    prior = np.exp(-0.5 * (np.log(ratios) / 1.5) ** 2)
    shares = ratios * 0.01 / (ratios * 0.01 + 0.99)
    assert bet.e_value == pytest.approx(float((prior / prior.sum() * (shares / 0.01) ** 7).sum()), rel=1e-9)
    assert bet.e_value > 20
    assert EventShareBet.from_json(json.loads(json.dumps(bet.to_json()))) == bet
    assert bet.merge(EventShareBet().update(False, 0.01)).log_wealth == bet.update(False, 0.01).log_wealth


@given(st.floats(0.001, 0.999), st.integers(0, 20))
def test_an_event_without_effect_is_expected_to_change_nothing(w: float, events: int) -> None:
    bet = EventShareBet()
    for number in range(events):
        bet = bet.update(number % 3 == 0, w)
    expected = w * bet.update(True, w).e_value + (1 - w) * bet.update(False, w).e_value
    assert expected == pytest.approx(bet.e_value, rel=1e-9)


def test_without_effect_false_alarms_stay_below_alpha_at_every_look() -> None:
    """A/A at a 10 % canary, base rate falling from 24 % to 12 %, looked at after every user."""
    rng = np.random.default_rng(7)
    sims, alarms, certified = 200, 0, 0
    for _ in range(sims):
        harm, margin, peak = HarmBet(), NonInferiorityBet(0.1), 0.0
        for number in range(400):
            (user,) = draw(rng, 1, 1 / 6, base := 0.24 - 0.0003 * number, base)
            harm, peak = harm.update(*user), max(peak, harm.log_e_value)
            worse = (float(rng.random() < base + 0.1 * user[1]), *user[1:])
            margin = margin.update(*worse)
        alarms += peak >= math.log(20)
        certified += margin.has_crossed(0.05)
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / sims)
    assert alarms / sims <= allowed
    assert certified / sims <= allowed


def test_split_mismatch_grows_only_for_a_wrong_split() -> None:
    assert log_split_mismatch(0, 0, 0.2) == pytest.approx(0, abs=1e-9)
    assert log_split_mismatch(8000, 2000, 0.2) < 0
    assert log_split_mismatch(8300, 1700, 0.2) > math.log(1000)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.01, 0.99))
def test_one_more_unit_of_a_right_split_is_expected_to_change_nothing(control: int, treatment: int, w: float) -> None:
    now = log_split_mismatch(control, treatment, w)
    gains = (log_split_mismatch(control + 1, treatment, w) - now, log_split_mismatch(control, treatment + 1, w) - now)
    assert (1 - w) * math.exp(gains[0]) + w * math.exp(gains[1]) == pytest.approx(1, rel=1e-6)


def test_a_weighted_mean_of_evidence_does_not_overflow() -> None:
    assert log_weighted_mean([2000.0, 0.0], [0.5, 0.5]) == pytest.approx(2000 + math.log(0.5))
    assert log_weighted_mean([0.0, 5.0], [1.0, 0.0]) == 0.0
