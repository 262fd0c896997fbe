"""How the four canaries end, and after how many users, if their adapters answer exactly as they were meant to.

Users of the practice world ask one question each; what they are answered is drawn from the champion's mix of habits or
the candidate's. The canary's own decisions are made on that, as the controller makes them, without any server.

    python -m bench.canaries_forecast [--seeds 5]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from itertools import count
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from ab_testing.assignment import treatment_probability
from ab_testing.canary import (
    CanaryConfig,
    CanaryState,
    Health,
    UserEvent,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    observe_events,
    weight_of,
)
from ab_testing.experiment import CANARY_RESERVE
from ab_testing.outcomes import HARMFUL_COMPLIANCE, OVER_REFUSAL, THUMBS_DOWN, TOXICITY
from ab_testing.rollout_rules import canary_config
from bench.canaries_world import CANDIDATES, CHAMPION_MIX, RULES, Candidate, Mix
from pawl.settings import RolloutSettings
from practice.corpus import QUESTION_SHARES, Habit
from practice.topics import TaskKind
from practice.users import FEEDBACK_SHARE, LIKED_SHARE

Choice = TypeVar("Choice")

USERS_A_LOOK, LOOK_S = 50, 2.5
"""Users between two looks of the controller, and how long that takes."""
MOST_USERS = 40_000


class Forecast(NamedTuple):
    """How one canary ended."""

    name: str
    status: str
    metric: str | None
    users: int
    exposed: int
    is_right: bool


def forecast(candidate: Candidate, config: CanaryConfig, seed: int) -> Forecast:
    """Play one canary with users drawn by this seed."""
    rng = random.Random(f"forecast-{candidate.name}-{seed}")
    state, exposed = launch(config, 0.0), 0
    metric: str | None = None
    for look in count(1):
        outcomes = analysed_users(rng, candidate.mix, state, config, look)
        exposed += sum(outcome.is_treatment for outcome in outcomes)
        state = observe_events(state, config, [event for outcome in outcomes for event in events_of(outcome)])
        state = observe(state, config, outcomes)
        decision = decide(state, config, look * LOOK_S, Health())
        state, metric = apply(state, config, decision, look * LOOK_S), decision.metric
        users = look * USERS_A_LOOK
        if state.is_final or users >= MOST_USERS:
            break
    is_right = (state.status, metric if state.status == "rolled_back" else None) == (
        candidate.verdict,
        candidate.metric,
    )
    return Forecast(candidate.name, state.status, metric, users, exposed, is_right)


def analysed_users(
    rng: random.Random, mix: Mix, state: CanaryState, config: CanaryConfig, look: int
) -> list[UserOutcome]:
    """Of those who come between two looks, the ones in the treatment's zone and in the reserved control's."""
    weight = weight_of(state, config)
    places = [rng.random() for _ in range(USERS_A_LOOK)]
    return [
        UserOutcome(
            unit=f"user-{look}-{number}",
            is_treatment=place < weight,
            treatment_probability=treatment_probability(weight),
            values=harm_seen(rng, mix if place < weight else CHAMPION_MIX),
            phase=state.step,
        )
        for number, place in enumerate(places)
        if place < weight or place >= 1 - CANARY_RESERVE
    ]


def harm_seen(rng: random.Random, mix: Mix) -> dict[str, float | None]:
    """What one question by a user of the practice world leads to."""
    kind = drawn(rng, QUESTION_SHARES)
    habit = drawn(rng, mix[kind])
    is_down = rng.random() < FEEDBACK_SHARE and rng.random() >= LIKED_SHARE[kind][habit]
    is_harmful = kind is TaskKind.HARMFUL
    return {
        THUMBS_DOWN: float(is_down),
        TOXICITY: float(habit is Habit.RUDE),
        HARMFUL_COMPLIANCE: float(habit is Habit.COMPLIANCE) if is_harmful else None,
        OVER_REFUSAL: None if is_harmful else float(habit is Habit.REFUSAL),
    }


def drawn(rng: random.Random, shares: Mapping[Choice, float]) -> Choice:
    """One by its share."""
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def events_of(outcome: UserOutcome) -> list[UserEvent]:
    """The harms of one user, each as an event; those of metrics that count no events change nothing."""
    return [
        UserEvent(name, outcome.unit, outcome.is_treatment, outcome.treatment_probability, outcome.phase)
        for name, value in outcome.values.items()
        if value
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """A table of all four, once for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    config = canary_config(RolloutSettings.model_validate(RULES))
    table = Table("canary", "seed", "verdict", "by", "users", "of them exposed", "as it should be", box=None)
    for candidate in CANDIDATES:
        for seed in range(options.seeds):
            one = forecast(candidate, config, seed)
            numbers = (str(one.users), str(one.exposed), "yes" if one.is_right else "NO")
            table.add_row(one.name, str(seed), one.status, one.metric or "", *numbers)
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
