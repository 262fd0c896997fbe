import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ab_testing.assignment import treatment_probability
from ab_testing.canary import (
    CanaryConfig,
    CanaryState,
    Decision,
    GuardrailMetric,
    Health,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    override,
    weight_of,
)
from ab_testing.errors import InvalidCanary, InvalidOutcome, InvalidTransition

METRICS = (
    GuardrailMetric("thumbs_down", margin=0.05, weight=0.5, role="primary"),
    GuardrailMetric("toxic", margin=0.05, weight=0.5),
)
CONFIG = CanaryConfig(METRICS, min_dwell_s=60.0, max_time_s=10_000.0)
HEALTHY = Health()
GOOD = {"thumbs_down": (0.6, 0.12), "toxic": (0.0, 0.0)}
BAD = {"thumbs_down": (0.12, 0.85), "toxic": (0.0, 0.0)}
TOXIC = {"thumbs_down": (0.12, 0.12), "toxic": (0.0, 0.6)}


def crowd(
    rates: Mapping[str, tuple[float, float]], n: int, *, step: int, seed: int = 0, config: CanaryConfig = CONFIG
) -> list[UserOutcome]:
    """`n` analysed users of one step; rates are (control, treatment)."""
    rng = np.random.default_rng([seed, step])
    likely = treatment_probability(config.steps[step])
    outcomes = []
    for unit in range(n):
        arm = bool(rng.random() < likely)
        values = {name: float(rng.random() < rate[arm]) for name, rate in rates.items()}
        outcomes.append(UserOutcome(f"{step}-{unit}", arm, likely, values, step))
    return outcomes


def at_step(step: int) -> CanaryState:
    return apply_all(launch(CONFIG, 0.0), ["advance"] * step)


def apply_all(state: CanaryState, actions: Sequence[str], now: float = 0.0) -> CanaryState:
    for action in actions:
        state = apply(state, CONFIG, override(state, CONFIG, action, "test"), now)  # type: ignore[arg-type]
    return state


def live(rates: Mapping[str, tuple[float, float]], *, per_step: int) -> list[Decision]:
    """Look after every 20 users, until the canary ends or `per_step` users change nothing."""
    state, now, decisions = launch(CONFIG, 0.0), 0.0, list[Decision]()
    while not state.is_final:
        users = crowd(rates, per_step, step=state.step)
        for start in range(0, per_step, 20):
            now += 60.0
            state = observe(state, CONFIG, users[start : start + 20])
            decisions.append(decide(state, CONFIG, now, HEALTHY))
            state = apply(state, CONFIG, decisions[-1], now)
            if decisions[-1].verdict != "continue":
                break
        else:
            break
    return decisions


def test_a_good_canary_is_promoted_through_all_steps() -> None:
    decisions = live(GOOD, per_step=1500)
    taken = [(decision.verdict, decision.weight) for decision in decisions if decision.verdict != "continue"]
    assert taken == [("advance", 0.1), ("advance", 0.5), ("promote", 1.0)]


@pytest.mark.parametrize(("rates", "metric"), [(BAD, "thumbs_down"), (TOXIC, "toxic")])
def test_a_bad_canary_is_rolled_back_at_the_first_step_and_the_metric_is_named(
    rates: Mapping[str, tuple[float, float]], metric: str
) -> None:
    decision = live(rates, per_step=3000)[-1]
    assert (decision.verdict, decision.weight, decision.metric, decision.cause) == ("roll_back", 0.0, metric, "harm")
    assert 2 <= decision.evidence["canary_users"] <= 12  # type: ignore[operator]
    assert metric in decision.reason


def test_replaying_the_same_inputs_gives_the_same_bytes() -> None:
    def run() -> bytes:
        return json.dumps([decision.to_json() for decision in live(GOOD, per_step=1500)], allow_nan=False).encode()

    assert run() == run()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=5), st.integers(0, 100))
def test_batches_and_json_round_trips_change_nothing(cuts: list[int], seed: int) -> None:
    users = crowd(BAD, 120, step=1, seed=seed)
    whole = observe(at_step(1), CONFIG, users)
    state, edges = at_step(1), [0, *sorted(cuts), 120]
    for start, stop in pairwise(edges):
        state = observe(state, CONFIG, users[start:stop])
        state = CanaryState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert json.dumps(state.to_json()) == json.dumps(whole.to_json())


def test_no_evidence_never_advances_or_promotes() -> None:
    for step in range(3):
        decision = decide(at_step(step), CONFIG, 9_999.0, HEALTHY)
        assert (decision.verdict, decision.weight) == ("continue", CONFIG.steps[step])
        assert "canary users are in" in decision.reason


def test_a_metric_that_nobody_could_show_blocks_promotion_until_the_time_cap() -> None:
    users = [
        outcome._replace(values={**outcome.values, "toxic": None}) for outcome in crowd(GOOD, 2000, step=2, seed=3)
    ]
    state = observe(at_step(2), CONFIG, users)
    waiting = decide(state, CONFIG, 9_000.0, HEALTHY)
    assert waiting.verdict == "continue"
    assert "toxic" in waiting.reason
    assert "thumbs_down" not in waiting.reason
    capped = decide(state, CONFIG, 10_000.0, HEALTHY)
    assert (capped.verdict, capped.cause, capped.weight) == ("hold", "inconclusive", 0.5)


def test_an_inconclusive_hold_lasts_until_a_person_resumes() -> None:
    held = apply(at_step(2), CONFIG, decide(at_step(2), CONFIG, 10_000.0, HEALTHY), 10_000.0)
    assert (held.status, held.held_reason) == ("hold", "inconclusive")
    proven = observe(held, CONFIG, crowd(GOOD, 800, step=2))
    assert decide(proven, CONFIG, 10_001.0, HEALTHY).verdict == "hold"
    resumed = apply(proven, CONFIG, override(proven, CONFIG, "resume", "seen"), 10_002.0)
    assert decide(resumed, CONFIG, 10_003.0, HEALTHY).verdict == "promote"


def test_users_of_the_first_step_bound_the_harm_but_do_not_certify() -> None:
    state = observe(launch(CONFIG, 0.0), CONFIG, crowd(GOOD, 1500, step=0))
    evidence = state.metrics["thumbs_down"]
    assert evidence.certify.control_count == 0
    assert evidence.certify.e_value == 1.0
    assert any(bet.has_crossed(0.05) for bet in evidence.bound)
    later = observe(state, CONFIG, crowd(GOOD, 10, step=1))
    assert later.metrics["thumbs_down"].certify.e_value != 1.0


def test_a_step_waits_for_its_dwell_time_and_for_its_users() -> None:
    state = observe(launch(CONFIG, 0.0), CONFIG, crowd(GOOD, 1500, step=0))
    assert "s have passed" in decide(state, CONFIG, 59.0, HEALTHY).reason
    assert decide(state, CONFIG, 60.0, HEALTHY).verdict == "advance"
    few = replace(CONFIG, min_users=(500, 500, 500))
    assert "of 500 canary users" in decide(state, few, 60.0, HEALTHY).reason


def test_a_neutral_canary_waits_for_the_harm_budget_and_says_how_long() -> None:
    state = observe(at_step(1), CONFIG, crowd({"thumbs_down": (0.2, 0.2), "toxic": (0.0, 0.0)}, 800, step=1, seed=2))
    decision = decide(state, CONFIG, 5_000.0, HEALTHY)
    assert decision.verdict == "continue"
    assert "allows 4%" in decision.reason
    assert "more users of all traffic" in decision.reason


def test_hard_errors_break_the_canary_at_once() -> None:
    assert decide(launch(CONFIG, 0.0), CONFIG, 1.0, Health(canary_requests=19, canary_errors=19)).verdict == "continue"
    decision = decide(launch(CONFIG, 0.0), CONFIG, 1.0, Health(canary_requests=20, canary_errors=4))
    assert (decision.verdict, decision.cause, decision.weight) == ("roll_back", "breaker", 0.0)


@pytest.mark.parametrize(
    ("control_requests", "control_errors", "verdict"),
    [(0, 0, "roll_back"), (20, 0, "roll_back"), (20, 7, "roll_back"), (20, 9, "continue"), (20, 20, "continue")],
)
def test_the_breaker_leaves_a_canary_alone_whose_control_fails_as_often(
    control_requests: int, control_errors: int, verdict: str
) -> None:
    health = Health(20, 12, control_requests=control_requests, control_errors=control_errors)
    decision = decide(launch(CONFIG, 0.0), CONFIG, 1.0, health)
    assert decision.verdict == verdict


def test_a_wrong_split_holds_and_freezes_the_evidence() -> None:
    users = [
        user
        for user in crowd(BAD, 1500, step=1)
        if not (user.is_treatment and user.unit.endswith(("1", "3", "5", "7")))
    ]
    quiet = [user._replace(values={"thumbs_down": 0.0, "toxic": 0.0}) for user in users * 2]
    state = observe(at_step(1), CONFIG, quiet)
    decision = decide(state, CONFIG, 100.0, HEALTHY)
    assert (decision.verdict, decision.cause, decision.weight) == ("hold", "srm_scored", 0.1)
    held = apply(state, CONFIG, decision, 100.0)
    assert observe(held, CONFIG, crowd(BAD, 100, step=1)) == held


def test_a_missing_scorer_holds_until_it_is_back() -> None:
    state = observe(at_step(2), CONFIG, crowd(GOOD, 800, step=2))
    decision = decide(state, CONFIG, 100.0, Health(missing=("toxic",)))
    assert (decision.verdict, decision.cause, decision.metric) == ("hold", "missing_data", "toxic")
    held = apply(state, CONFIG, decision, 100.0)
    assert (held.status, held.held_reason) == ("hold", "missing_data")
    assert decide(held, CONFIG, 160.0, HEALTHY).verdict == "promote"
    idle = replace(launch(CONFIG, 0.0), status="hold", held_reason="missing_data")
    resumed = apply(idle, CONFIG, decide(idle, CONFIG, 1.0, HEALTHY), 1.0)
    assert (resumed.status, resumed.held_reason) == ("ramp", None)


def test_a_missing_scorer_does_not_undo_what_a_person_held() -> None:
    held = apply_all(launch(CONFIG, 0.0), ["hold"])
    decision = decide(held, CONFIG, 1.0, Health(missing=("toxic",)))
    assert apply(held, CONFIG, decision, 1.0).held_reason == "operator"


def test_a_held_canary_is_still_rolled_back() -> None:
    held = apply_all(at_step(1), ["hold"])
    assert decide(observe(held, CONFIG, crowd(BAD, 200, step=1)), CONFIG, 1.0, HEALTHY).verdict == "roll_back"


def test_evidence_of_harm_is_not_forgotten_between_two_looks() -> None:
    harmed = observe(at_step(1), CONFIG, crowd(BAD, 100, step=1))
    calm = observe(harmed, CONFIG, crowd({"thumbs_down": (0.9, 0.0), "toxic": (0.0, 0.0)}, 400, step=1, seed=9))
    assert calm.metrics["thumbs_down"].harm.e_value < 20
    assert decide(calm, CONFIG, 1.0, HEALTHY).verdict == "roll_back"


@pytest.mark.parametrize(
    ("action", "status", "weight"),
    [("advance", "ramp", 0.1), ("hold", "hold", 0.01), ("roll_back", "rolled_back", 0.0), ("abort", "aborted", 0.0)],
)
def test_a_person_can_decide(action: str, status: str, weight: float) -> None:
    state = apply_all(launch(CONFIG, 0.0), [action])
    assert (state.status, weight_of(state, CONFIG)) == (status, weight)


def test_what_is_over_stays_over() -> None:
    over = apply_all(launch(CONFIG, 0.0), ["advance", "advance", "advance"])
    assert (over.status, weight_of(over, CONFIG)) == ("promoted", 1.0)
    decision = decide(over, CONFIG, 1.0, Health(canary_requests=100, canary_errors=100))
    assert (decision.verdict, decision.cause, decision.weight) == ("continue", "over", 1.0)
    assert apply(over, CONFIG, decision, 1.0) == over
    assert observe(over, CONFIG, crowd(BAD, 50, step=2)) == over
    with pytest.raises(InvalidTransition):
        override(over, CONFIG, "abort", "late")


def test_a_phase_has_one_probability() -> None:
    first, second = crowd(GOOD, 2, step=1)
    with pytest.raises(InvalidOutcome, match="two probabilities"):
        observe(at_step(1), CONFIG, [first, second._replace(treatment_probability=0.5)])


def test_the_configuration_survives_json_and_its_hash_tells_any_change() -> None:
    again = CanaryConfig.from_json(json.loads(json.dumps(CONFIG.to_json())))
    assert again == CONFIG
    assert again.config_hash == CONFIG.config_hash
    assert replace(CONFIG, harm_budget=0.03).config_hash != CONFIG.config_hash
    with pytest.raises(InvalidCanary, match="surprise"):
        CanaryConfig.from_json(CONFIG.to_json() | {"surprise": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"steps": (0.1, 0.01, 0.5)},
        {"steps": (0.01, 0.1, 0.6)},
        {"steps": (0.01,), "min_users": (5,)},
        {"min_users": (5, 5)},
        {"alpha_rollback": 0.0},
        {"metrics": ()},
        {"metrics": (replace(METRICS[0], weight=0.9), METRICS[1])},
        {"metrics": (replace(METRICS[0], role="guardrail"), METRICS[1])},
        {"metrics": (replace(METRICS[0], margin=1.5), METRICS[1])},
        {"bound_margins": (0.1, 0.2)},
        {"min_dwell_s": 20_000.0},
        {"breaker_min_requests": 0},
    ],
)
def test_a_contradictory_configuration_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidCanary):
        replace(CONFIG, **change)  # type: ignore[arg-type]
