"""What must never move a canary forward, and what goes before what."""

import math
from dataclasses import replace

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
    PhaseCount,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    override,
)
from ab_testing.errors import InvalidCanary, InvalidOutcome

CONFIG = CanaryConfig(
    (
        GuardrailMetric("thumbs_down", margin=0.2, weight=0.5, role="primary"),
        GuardrailMetric("toxicity", margin=0.2, weight=0.5, counts_events=True),
    ),
    min_dwell_s=60.0,
    max_time_s=100_000.0,
    harm_budget=0.1,
)
LAUNCH, READY = 1000.0, 2000.0
FORWARD = {"advance", "promote"}


def crowd(step: int, n: int = 900) -> list[UserOutcome]:
    """Users whom the treatment does good."""
    rng, w = np.random.default_rng(step), treatment_probability(CONFIG.steps[step])
    sides = rng.random(n) < w
    return [
        UserOutcome(
            str(unit), bool(side), w, {"thumbs_down": float(rng.random() < 0.4 - 0.3 * side), "toxicity": 0.0}, step
        )
        for unit, side in enumerate(sides)
    ]


def at_step(step: int, config: CanaryConfig = CONFIG) -> CanaryState:
    state = launch(config, LAUNCH)
    for _ in range(step):
        state = apply(state, config, override(state, config, "advance", "test"), LAUNCH)
    return state


def proven(step: int, config: CanaryConfig = CONFIG) -> CanaryState:
    """A canary of which all is known that the next step asks for, learned of a moment before `READY`."""
    state = observe(at_step(step, config), config, crowd(step))
    waiting = Decision("continue", config.steps[step], "", "waiting")
    return apply(state, config, waiting, READY - 1)


PROVEN = [proven(step) for step in range(3)]
LEARNED = [observe(at_step(step), CONFIG, crowd(step)) for step in range(3)]
CROWDS = [crowd(step) for step in range(3)]
steps = st.integers(0, 2)


@given(steps)
def test_the_evidence_would_suffice(step: int) -> None:
    assert decide(PROVEN[step], CONFIG, READY, Health()).verdict in FORWARD


@given(steps, st.one_of(st.floats(max_value=READY - 1, exclude_max=True), st.just(math.nan)))
def test_a_clock_that_jumped_back_moves_nothing_forward(step: int, now: float) -> None:
    decision = decide(PROVEN[step], CONFIG, now, Health())
    assert decision.verdict not in FORWARD
    assert decision.weight == CONFIG.steps[step]


@given(steps, st.floats(min_value=READY + CONFIG.max_silence_s))
def test_stale_evidence_or_a_clock_far_ahead_moves_nothing_forward(step: int, now: float) -> None:
    assert decide(PROVEN[step], CONFIG, now, Health()).verdict not in FORWARD


@settings(max_examples=30)
@given(steps, st.floats(0, 59.0))
def test_a_silence_is_no_dwell_time(step: int, waited: float) -> None:
    """The tick after a jump learns of users: from then on the step has lasted as long as it had before the jump."""
    learned, jumped = LEARNED[step], LAUNCH + CONFIG.max_silence_s + 1
    assert decide(learned, CONFIG, jumped, Health()).verdict not in FORWARD
    after = apply(learned, CONFIG, decide(learned, CONFIG, jumped, Health()), jumped)
    assert decide(after, CONFIG, jumped + waited, Health()).verdict not in FORWARD
    assert decide(after, CONFIG, jumped + 61.0, Health()).verdict in FORWARD


@given(steps, st.floats(min_value=0.0, max_value=LAUNCH), st.floats(0, 59.0))
def test_a_clock_that_was_set_back_goes_on_from_there(step: int, now: float, waited: float) -> None:
    learned = LEARNED[step]
    after = apply(learned, CONFIG, decide(learned, CONFIG, now, Health()), now)
    assert decide(after, CONFIG, now + waited, Health()).verdict not in FORWARD
    assert decide(after, CONFIG, now + 61.0, Health()).verdict in FORWARD


@given(steps, st.floats(LAUNCH, READY))
def test_nothing_seen_moves_nothing_forward(step: int, now: float) -> None:
    assert decide(at_step(step), CONFIG, now, Health()).verdict not in FORWARD


@settings(max_examples=25)
@given(steps, st.booleans(), st.integers(1, 150))
def test_users_of_one_side_alone_move_nothing_forward(step: int, side: bool, n: int) -> None:
    users = [user for user in CROWDS[step] if user.is_treatment == side][:n]
    assert decide(observe(at_step(step), CONFIG, users), CONFIG, READY, Health()).verdict not in FORWARD


@pytest.mark.parametrize("side", [True, False])
def test_a_metric_measured_on_one_side_alone_promotes_nothing(side: bool) -> None:
    users = [
        user._replace(values={**user.values, "toxicity": 0.0 if user.is_treatment == side else None})
        for user in crowd(2, 3000)
    ]
    state = observe(at_step(2), CONFIG, users)
    decision = decide(state, CONFIG, READY, Health())
    assert decision.verdict not in FORWARD
    assert "toxicity" in decision.reason
    healed = observe(state, CONFIG, crowd(2))
    assert decide(healed, CONFIG, READY, Health()).verdict == "promote"


@settings(max_examples=25)
@given(steps, st.sampled_from([math.nan, math.inf, -0.1, 1.1]), st.integers(0, 899))
def test_an_impossible_value_is_refused_whole(step: int, f: float, place: int) -> None:
    users = list(CROWDS[step])
    users[place] = users[place]._replace(values={"thumbs_down": 0.0, "toxicity": f})
    with pytest.raises(InvalidOutcome):
        observe(at_step(step), CONFIG, users)


@given(steps)
def test_a_metric_that_is_missing_moves_nothing_forward(step: int) -> None:
    decision = decide(PROVEN[step], CONFIG, READY, Health(missing=("toxicity",)))
    assert (decision.verdict, decision.cause) == ("hold", "missing_data")


def test_users_of_a_small_first_step_certify_nothing() -> None:
    state = apply(PROVEN[0], CONFIG, override(PROVEN[0], CONFIG, "advance", "test"), READY)
    state = apply(state, CONFIG, override(state, CONFIG, "advance", "test"), READY)
    assert decide(state, CONFIG, READY + 100, Health()).verdict not in FORWARD


def test_what_protects_users_goes_first() -> None:
    """One trouble after another is added to a canary that could be promoted: each outranks all before it."""
    state, config, health = PROVEN[2], replace(CONFIG, max_time_s=900.0), Health()
    causes = [decide(at_step(2), config, READY, health).cause, decide(state, config, READY, health).cause]
    state = replace(state, status="hold", held_reason="operator")
    causes.append(decide(state, config, READY, health).cause)
    missing = Health(missing=("toxicity",))
    causes.append(decide(replace(state, held_reason=None), config, READY, missing).cause)
    state = replace(state, harm_peak=5.0, harm_metric="toxicity")
    causes.append(decide(state, config, READY, missing).cause)
    state = replace(state, phases=(PhaseCount(2, 0.5, 900, 10),))
    causes.append(decide(state, config, READY, missing).cause)
    state = replace(state, assigned=(PhaseCount(2, 0.5, 900, 10),))
    causes.append(decide(state, config, READY, missing).cause)
    broken = Health(canary_requests=100, canary_errors=90, missing=("toxicity",))
    causes.append(decide(state, config, READY, broken).cause)
    assert causes == [
        "inconclusive", "evidence", "operator", "missing_data", "harm", "srm_scored", "srm_assigned", "breaker",
    ]  # fmt: skip


def test_nothing_is_promoted_before_it_has_baked() -> None:
    config = replace(CONFIG, bake_s=READY - LAUNCH + 50)
    decision = decide(PROVEN[2], config, READY, Health())
    assert decision.verdict == "continue"
    assert "since the launch" in decision.reason
    assert decide(PROVEN[2], config, READY + 50, Health()).verdict == "promote"
    assert decide(PROVEN[1], config, READY, Health()).verdict == "advance"


def test_with_approval_the_last_step_waits_for_a_person() -> None:
    config = replace(CONFIG, needs_approval=True)
    assert decide(PROVEN[1], config, READY, Health()).verdict == "advance"
    decision = decide(PROVEN[2], config, READY, Health())
    assert (decision.verdict, decision.cause, decision.weight) == ("hold", "approval", 0.5)
    assert "a person's advance promotes" in decision.reason
    held = apply(PROVEN[2], config, decision, READY)
    assert held.held_reason == "approval"
    again = decide(held, config, READY + 10, Health())
    assert (again.verdict, again.cause, again.reason) == ("hold", "approval", decision.reason)
    promoted = apply(held, config, override(held, config, "advance", "looked at it"), READY + 20)
    assert promoted.status == "promoted"


def test_harm_that_comes_while_approval_is_waited_for_still_rolls_back() -> None:
    config = replace(CONFIG, needs_approval=True)
    held = apply(PROVEN[2], config, decide(PROVEN[2], config, READY, Health()), READY)
    users = [user._replace(values={"thumbs_down": float(user.is_treatment), "toxicity": 0.0}) for user in crowd(2)]
    assert decide(observe(held, config, users), config, READY, Health()).verdict == "roll_back"


@pytest.mark.parametrize(
    "change", [{"bake_s": -1.0}, {"bake_s": 1e9}, {"max_silence_s": 0.0}, {"max_silence_s": math.nan}]
)
def test_a_contradictory_configuration_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(InvalidCanary):
        replace(CONFIG, **change)  # type: ignore[arg-type]
