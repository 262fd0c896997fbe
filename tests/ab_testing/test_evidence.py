"""Events as evidence, beside users: the definition written out, batches, old state, and what the mistakes cost."""

import json
import math
from collections.abc import Sequence
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
    GuardrailMetric,
    Health,
    PhaseCount,
    UserEvent,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    observe_assigned,
    observe_events,
    override,
)
from ab_testing.errors import InvalidOutcome
from ab_testing.evidence import EVENT_WEIGHT

METRICS = (
    GuardrailMetric("thumbs_down", margin=0.05, weight=0.4, role="primary"),
    GuardrailMetric("toxicity", margin=0.05, weight=0.25, counts_events=True),
    GuardrailMetric("harmful_compliance", margin=0.5, weight=0.25, role="signal", counts_events=True),
    GuardrailMetric("over_refusal", margin=0.05, weight=0.1),
)
"""As a rollout has them when nobody configures anything."""
CONFIG = CanaryConfig(METRICS, min_dwell_s=0.0)
TOXICITY = "toxicity"
STAKES = np.array((0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.6, 0.9))
LOG_RATIOS = 0.25 * np.arange(1, 17)
NEEDED = math.log(20)

Story = list[UserOutcome | UserEvent]


def at_step(step: int, config: CanaryConfig = CONFIG) -> CanaryState:
    state = launch(config, 0.0)
    for _ in range(step):
        state = apply(state, config, override(state, config, "advance", "test"), 0.0)
    return state


def told(state: CanaryState, story: Story, config: CanaryConfig = CONFIG) -> CanaryState:
    for item in story:
        match item:
            case UserEvent():
                state = observe_events(state, config, [item])
            case UserOutcome():
                state = observe(state, config, [item])
    return state


def story_of(
    rng: np.random.Generator, n: int, rates: tuple[float, float], *, step: int = 1, lag: int = 0, thumbs: float = 0.1
) -> Story:
    """Analysed users of one step: whoever was harmed is an event at once, and an outcome `lag` users later."""
    w = treatment_probability(CONFIG.steps[step])
    waiting: list[UserOutcome] = []
    story: Story = []
    for unit in range(n):
        is_treatment = bool(rng.random() < w)
        is_toxic = bool(rng.random() < rates[is_treatment])
        if is_toxic:
            story.append(UserEvent(TOXICITY, str(unit), is_treatment, w, step))
        values = {"thumbs_down": float(rng.random() < thumbs), TOXICITY: float(is_toxic), "over_refusal": 0.0}
        waiting.append(UserOutcome(str(unit), is_treatment, w, values, step))
        if len(waiting) > lag:
            story.append(waiting.pop(0))
    return story + list(waiting)


def users_bet(outcomes: Sequence[UserOutcome], name: str) -> float:
    wealth, total, count = np.ones(len(STAKES)), 0.5, 1.0
    for _, z, w, values, _ in outcomes:
        f = values.get(name)
        if f is None:
            continue
        m = total / count
        wealth *= 1 + STAKES * 0.999 / max((1 - w) * m, w * (1 - m)) * (z - w) * (f - m)
        total, count = (total, count) if z else (total + f, count + 1)
    return float(wealth.mean())


def events_bet(events: Sequence[UserEvent]) -> float:
    ratios, prior = np.exp(LOG_RATIOS), np.exp(-0.5 * (LOG_RATIOS / 1.5) ** 2)
    wealth = prior / prior.sum()
    for event in events:
        w = event.treatment_probability
        share = ratios * w / (ratios * w + 1 - w)
        wealth = wealth * (share / w if event.is_treatment else (1 - share) / (1 - w))
    return float(wealth.sum())


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(0.0, 0.3), st.integers(0, 2))
def test_the_evidence_of_harm_is_its_definition(seed: int, rate: float, step: int) -> None:
    story = story_of(np.random.default_rng(seed), 50, (rate / 2, rate), step=step)
    never = replace(CONFIG, alpha_rollback=1e-9)
    outcomes = [item for item in story if isinstance(item, UserOutcome)]
    events = [item for item in story if isinstance(item, UserEvent)]
    weights = {metric.name: metric.weight * (1 - EVENT_WEIGHT * metric.counts_events) for metric in METRICS}
    users = sum(weight * users_bet(outcomes, name) for name, weight in weights.items())
    # What events have reached once counts on, also below what rolls back.
    reached = max(events_bet(events[:n]) for n in range(len(events) + 1))
    expected = max(users, 0.25 * EVENT_WEIGHT * reached)
    evidence = decide(told(at_step(step), story, never), never, 1.0, Health()).evidence
    assert evidence["harm"] == pytest.approx(max(1.0, expected), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 50))
def test_batches_of_users_and_events_change_nothing(cuts: list[int], seed: int) -> None:
    """To the byte, however users and events are batched: only the order within each kind matters."""
    story = story_of(np.random.default_rng(seed), 150, (0.05, 0.4))
    one_by_one = told(at_step(1), story)
    state, edges = at_step(1), [0, *sorted(cuts), len(story)]
    for start, stop in pairwise(edges):
        part = story[start:stop]
        state = observe_events(state, CONFIG, [item for item in part if isinstance(item, UserEvent)])
        state = observe(state, CONFIG, [item for item in part if isinstance(item, UserOutcome)])
        state = CanaryState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert without_blame(state) == without_blame(one_by_one)


def without_blame(state: CanaryState) -> str:
    # Two kinds of bets share one peak: which of them reached it first is the caller's order to tell.
    return json.dumps(replace(state, harm_metric=None).to_json())


@pytest.mark.parametrize(("step", "most"), [(0, 3), (1, 4)])
def test_a_harm_that_the_control_never_shows_is_caught_within_five_events(step: int, most: int) -> None:
    """With the weights that a rollout has by default; users without the harm change nothing about events."""
    state, w, events = at_step(step), treatment_probability(CONFIG.steps[step]), 0
    while decide(state, CONFIG, 1.0, Health()).verdict != "roll_back":
        state, events = observe_events(state, CONFIG, [UserEvent(TOXICITY, str(events), True, w, step)]), events + 1
    assert events == most


def test_without_effect_events_before_their_users_do_not_raise_false_alarms() -> None:
    """What a mean of the two bets could not promise: an event tells the side of a user long before the user matures."""
    rng, sims, alarms = np.random.default_rng(11), 80, 0
    for _ in range(sims):
        state = told(at_step(2), story_of(rng, 100, (0.3, 0.3), step=2, lag=40, thumbs=0.3))
        alarms += state.harm_peak >= NEEDED
    assert alarms / sims <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sims)


def test_the_metric_that_events_convict_is_named_and_proven() -> None:
    w = treatment_probability(0.1)
    state = observe_events(at_step(1), CONFIG, [UserEvent(TOXICITY, str(unit), True, w, 1) for unit in range(6)])
    decision = decide(state, CONFIG, 1.0, Health())
    assert (decision.verdict, decision.cause, decision.metric) == ("roll_back", "harm", TOXICITY)
    assert f"Proven on its own: {TOXICITY}." in decision.reason


def test_two_half_harms_are_blamed_on_the_larger_but_proven_of_neither() -> None:
    shares = (
        GuardrailMetric("a", 0.05, 0.3, "primary"),
        GuardrailMetric("b", 0.05, 0.3),
        GuardrailMetric("c", 0.05, 0.4),
    )
    config = CanaryConfig(shares, min_dwell_s=0.0)
    state, w = at_step(2, config), 0.5
    for unit in range(200):
        is_treatment = unit % 2 == 0
        harm = float(is_treatment and unit % 4 == 0)
        values = {"a": harm, "b": 0.97 * harm, "c": 0.0}
        state = observe(state, config, [UserOutcome(str(unit), is_treatment, w, values, 2)])
        if state.harm_peak >= NEEDED:
            break
    decision = decide(state, config, 1.0, Health())
    assert (decision.verdict, decision.metric) == ("roll_back", "a")
    assert "No metric is proven harmful on its own" in decision.reason


def test_events_of_metrics_that_do_not_count_them_change_nothing() -> None:
    state = at_step(1)
    assert observe_events(state, CONFIG, [UserEvent("thumbs_down", "u", True, 1 / 6, 1)]) == state
    with pytest.raises(InvalidOutcome, match="unheard"):
        observe_events(state, CONFIG, [UserEvent("unheard", "u", True, 1 / 6, 1)])
    with pytest.raises(InvalidOutcome, match="probability"):
        observe_events(state, CONFIG, [UserEvent(TOXICITY, "u", True, math.nan, 1)])


def test_state_of_the_first_method_loads_and_goes_on() -> None:
    old_config = {key: value for key, value in CONFIG.to_json().items() if key not in {"bake_s", "needs_approval"}}
    old_config["metrics"] = [
        {"name": m.name, "margin": m.margin, "weight": m.weight, "role": m.role} for m in METRICS
    ]  # fmt: skip
    config = CanaryConfig.from_json(old_config)
    seen = observe(at_step(1, config), config, [u for u in crowd() if isinstance(u, UserOutcome)])
    stored = seen.to_json()
    for key in ("assigned", "baked_from", "seen_at", "seen"):
        del stored[key]
    for evidence in stored["metrics"].values():  # type: ignore[attr-defined]
        del evidence["events"], evidence["certify"]["treatment_count"]
        for bet in evidence["bound"]:
            del bet["treatment_count"]
    loaded = CanaryState.from_json(json.loads(json.dumps(stored)))
    assert loaded.metrics["thumbs_down"].harm == seen.metrics["thumbs_down"].harm
    more = observe(loaded, config, [u for u in crowd(seed=2) if isinstance(u, UserOutcome)])
    after = apply(more, config, decide(more, config, 50.0, Health()), 50.0)
    assert after.seen_at == 50.0
    assert CanaryState.from_json(json.loads(json.dumps(after.to_json()))) == after


def crowd(*, seed: int = 1) -> Story:
    return story_of(np.random.default_rng(seed), 60, (0.1, 0.1))


def test_assigned_users_whose_split_is_wrong_hold_before_any_outcome_is_known() -> None:
    state = observe_assigned(at_step(1), CONFIG, [PhaseCount(1, 1 / 6, 500, 20), PhaseCount(0, 1 / 51, 100, 2)])
    state = observe_assigned(state, CONFIG, [PhaseCount(1, 1 / 6, 300, 10)])
    assert state.assigned == (PhaseCount(0, 1 / 51, 100, 2), PhaseCount(1, 1 / 6, 800, 30))
    decision = decide(state, CONFIG, 1.0, Health())
    assert (decision.verdict, decision.cause) == ("hold", "srm_assigned")
    assert "split of assigned users" in decision.reason
    held = apply(state, CONFIG, decision, 1.0)
    assert held.held_reason == "srm_assigned"
    assert observe_events(held, CONFIG, [UserEvent(TOXICITY, "u", True, 1 / 6, 1)]) == held
    assert observe_assigned(held, CONFIG, [PhaseCount(1, 1 / 6, 1, 1)]) == held


@pytest.mark.parametrize(
    "count", [PhaseCount(7, 1 / 6, 1, 1), PhaseCount(1, 1 / 6, -1, 1), PhaseCount(1, math.nan, 1, 1)]
)
def test_impossible_counts_of_assigned_users_are_refused(count: PhaseCount) -> None:
    with pytest.raises(InvalidOutcome):
        observe_assigned(at_step(1), CONFIG, [count])
