"""Forecasts against simulations of the very rules: within a factor of two, in the middle case."""

import statistics
from collections.abc import Mapping

import numpy as np
import pytest

from ab_testing.assignment import treatment_probability
from ab_testing.canary import (
    CanaryConfig,
    CanaryState,
    GuardrailMetric,
    Health,
    UserEvent,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    observe_events,
    override,
)
from ab_testing.errors import InvalidCanary
from ab_testing.experiment import CANARY_RESERVE
from ab_testing.forecast import Detection, HarmRates, forecast

METRICS = (
    GuardrailMetric("thumbs_down", margin=0.1, weight=0.4, role="primary"),
    GuardrailMetric("toxicity", margin=0.1, weight=0.35, counts_events=True),
    GuardrailMetric("over_refusal", margin=0.1, weight=0.25),
)
CONFIG = CanaryConfig(METRICS, min_dwell_s=0.0, harm_budget=0.05, bound_margins=(0.05, 0.1, 0.2, 0.5))
FACTOR = 2.0
SIMS = 11


def crowd(rng: np.random.Generator, n: int, step: int, rates: Mapping[str, HarmRates]) -> list[UserOutcome]:
    w = treatment_probability(CONFIG.steps[step])
    users = []
    for unit, (place, *luck) in enumerate(rng.random((n, 1 + len(rates))).tolist()):
        side = place < w
        values = {
            name: float(drawn < rate_of(pair, side)) for drawn, (name, pair) in zip(luck, rates.items(), strict=True)
        }
        users.append(UserOutcome(str(unit), side, w, values, step))
    return users


def rate_of(rates: HarmRates, side: bool) -> float:
    return rates.harmed if side and rates.harmed is not None else rates.base


def canary_users_until_rolled_back(rng: np.random.Generator, step: int, rates: Mapping[str, HarmRates]) -> int:
    state = launch(CONFIG, 0.0)
    for _ in range(step):
        state = apply(state, CONFIG, override(state, CONFIG, "advance", "test"), 0.0)
    seen = 0
    while decide(state, CONFIG, 1.0, Health()).verdict != "roll_back":
        for user in crowd(rng, 20, step, rates):
            seen += user.is_treatment
            state = observe(state, CONFIG, [user])
            if user.values.get("toxicity"):
                event = UserEvent("toxicity", user.unit, user.is_treatment, user.treatment_probability, step)
                state = observe_events(state, CONFIG, [event])
    return seen


@pytest.mark.parametrize(
    ("name", "rates", "step", "by_events"),
    [
        ("thumbs_down", HarmRates(0.1, 0.5), 1, False),
        ("thumbs_down", HarmRates(0.2, 0.6), 2, False),
        ("toxicity", HarmRates(0.02, 0.2), 1, True),
        ("toxicity", HarmRates(0.0, 0.1), 1, True),
        ("over_refusal", HarmRates(0.05, 0.4), 1, False),
    ],
)
def test_a_rollback_comes_after_about_as_many_users_as_foretold(
    name: str, rates: HarmRates, step: int, by_events: bool
) -> None:
    found = detection(name, rates, step)
    rng = np.random.default_rng([step, *name.encode()])
    seen = statistics.median(canary_users_until_rolled_back(rng, step, {name: rates}) for _ in range(SIMS))
    assert found.canary_users / FACTOR <= seen <= found.canary_users * FACTOR + 5
    assert found.by_events == by_events


def detection(name: str, rates: HarmRates, step: int) -> Detection:
    found = forecast(CONFIG, {name: rates}, 600.0).detections
    (match,) = [one for one in found if (one.metric, one.step) == (name, step)]
    return match


def test_a_harmless_canary_is_promoted_after_about_as_many_users_as_foretold() -> None:
    rates = {"thumbs_down": HarmRates(0.1), "toxicity": HarmRates(0.0), "over_refusal": HarmRates(0.02)}
    foretold = forecast(CONFIG, rates, 600.0)
    rng = np.random.default_rng(5)
    found = statistics.median(users_until_promoted(rng, rates) for _ in range(5))
    assert foretold.users_to_promote is not None
    assert foretold.users_to_promote / FACTOR <= found <= foretold.users_to_promote * FACTOR
    assert [step.weight for step in foretold.steps] == list(CONFIG.steps)


def users_until_promoted(rng: np.random.Generator, rates: Mapping[str, HarmRates]) -> float:
    state, users = launch(CONFIG, 0.0), 0.0
    while not state.is_final:
        state = observe(state, CONFIG, crowd(rng, 20, state.step, rates))
        users += 20 / (CONFIG.steps[state.step] + CANARY_RESERVE)
        state = forward(state)
    assert state.status in ("promoted", "rolled_back")
    return users


def forward(state: CanaryState) -> CanaryState:
    return apply(state, CONFIG, decide(state, CONFIG, 1.0, Health()), 1.0)


def test_more_traffic_takes_less_time_and_waiting_for_outcomes_more() -> None:
    rates = {"thumbs_down": HarmRates(0.1, 0.3), "toxicity": HarmRates(0.005, 0.05)}
    slow, fast = (forecast(CONFIG, rates, traffic).detections for traffic in (100.0, 1000.0))
    late = forecast(CONFIG, rates, 1000.0, maturity_s=3600.0).detections
    for one, ten, waiting in zip(slow, fast, late, strict=True):
        assert one.minutes == pytest.approx(10 * ten.minutes)
        assert one.canary_users == ten.canary_users == pytest.approx(one.users * one.weight)
        assert waiting.minutes == pytest.approx(ten.minutes + (0.0 if ten.by_events else 60.0))


def test_dwell_and_bake_time_bound_a_fast_rollout() -> None:
    config = CanaryConfig(METRICS, min_dwell_s=600.0, bake_s=86_400.0)
    found = forecast(config, {}, 1e9)
    assert [step.minutes for step in found.steps[:2]] == [10.0, 10.0]
    assert found.minutes_to_promote == pytest.approx(1440.0)


def test_a_harm_too_common_for_its_margin_is_told_as_out_of_reach() -> None:
    config = CanaryConfig((GuardrailMetric("thumbs_down", 0.0001, 1.0, "primary"),), harm_budget=0.4)
    found = forecast(config, {"thumbs_down": HarmRates(0.5, 0.5)}, 1000.0)
    assert found.detections == ()
    assert not found.is_promotable or (found.users_to_promote or 0) > 1e6
    assert found.is_promotable == (found.minutes_to_promote is not None)


@pytest.mark.parametrize(
    ("rates", "traffic"),
    [
        ({"x": HarmRates(0.1)}, 1.0),
        ({"toxicity": HarmRates(1.1)}, 1.0),
        ({"toxicity": HarmRates(0.1, -1)}, 1.0),
        ({}, 0.0),
    ],
)
def test_a_forecast_of_what_cannot_be_is_refused(rates: dict[str, HarmRates], traffic: float) -> None:
    with pytest.raises(InvalidCanary):
        forecast(CONFIG, rates, traffic)
