"""Rollouts replayed: what every decision was made from, through the same rules again.

A decision depends on nothing but the state before it, the rules frozen at the launch, the time, the health of the last
minute and the users that had matured. All of that is kept with the decision, users without their names, so that
whoever doubts one can make it again, also elsewhere and later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, cast

from ab_testing.canary import Decision, Health, apply, decide, launch, observe, override
from ab_testing.canary_state import (
    CanaryConfig,
    CanaryState,
    PhaseCount,
    UserEvent,
    UserOutcome,
    observe_assigned,
    observe_events,
)
from ab_testing.rollout_store import CONTROLLER, DecisionRecord, Rollout
from ab_testing.watch import (
    Watch,
    Window,
    after_watch,
    close_if_due,
    judge,
    observe_windows,
    open_watch,
    take_back,
    windows_from_json,
    windows_to_json,
)

NOBODY = ""
"""In place of a user's name, which no decision depends on."""


class Inputs(NamedTuple):
    """What the controller saw besides the state, its rules and the clock."""

    health: Health
    outcomes: tuple[UserOutcome, ...] = ()
    events: tuple[UserEvent, ...] = ()
    assigned: tuple[PhaseCount, ...] = ()
    """Users first seen since the last look, whether or not their outcome is known."""
    windows: tuple[Window, ...] = ()
    """Of the watch after a promotion."""

    def to_json(self) -> dict[str, Any]:
        return {
            "health": asdict(self.health),
            "outcomes": [
                [outcome.is_treatment, outcome.treatment_probability, outcome.phase, dict(outcome.values)]
                for outcome in self.outcomes
            ],
            "events": [
                [event.metric, event.is_treatment, event.treatment_probability, event.phase] for event in self.events
            ],
            "assigned": [list(count) for count in self.assigned],
            "windows": windows_to_json(self.windows),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inputs:
        health = Health(**{**data["health"], "missing": tuple(data["health"]["missing"])})
        outcomes = (UserOutcome(NOBODY, side, share, values, phase) for side, share, phase, values in data["outcomes"])
        # Records of versions that knew neither events nor assignments have none.
        events = (UserEvent(metric, NOBODY, *event) for metric, *event in data.get("events", ()))
        assigned = (PhaseCount(*count) for count in data.get("assigned", ()))
        windows = windows_from_json(data.get("windows", ()))
        return cls(health, tuple(outcomes), tuple(events), tuple(assigned), windows)


def learn(state: CanaryState, config: CanaryConfig, inputs: Inputs) -> CanaryState:
    """The state after everything that a tick saw, in the one order that `replay` repeats."""
    assigned = observe_assigned(state, config, inputs.assigned)
    with_events = observe_events(assigned, config, inputs.events)
    return observe(with_events, config, inputs.outcomes)


class Replayed(NamedTuple):
    """A recorded decision beside the one that the rules make of its inputs now."""

    record: DecisionRecord
    again: Decision
    state: CanaryState
    """After it."""
    differences: tuple[str, ...]
    """Fields in which they are not the same, to the byte."""
    watch: Watch | None
    """After it."""


def replay(rollout: Rollout, records: Iterable[tuple[DecisionRecord, Inputs | None]]) -> Iterator[Replayed]:
    """Make a rollout's decisions again, the oldest first; people's orders are taken as given.

    Args:
        records: all of the rollout's, the controller's with their inputs.
    """
    state, watch = launch(rollout.config, rollout.created_at), None
    for record, inputs in records:
        seen = inputs if record.actor == CONTROLLER else None
        if state.status == "promoted":
            again, watch = _watched(rollout.config, watch, record, seen)
            state = after_watch(state, again)
        else:
            again, state = _decided(rollout.config, state, record, seen)
            watch = open_watch(state, rollout.config, record.at, rollout.maturity_s)
        yield Replayed(record, again, state, tuple(_differences(record, again, state)), watch)


def _decided(
    config: CanaryConfig, state: CanaryState, record: DecisionRecord, seen: Inputs | None
) -> tuple[Decision, CanaryState]:
    if seen is None:
        again = override(state, config, _action(record.verdict), record.reason)
    else:
        state = learn(state, config, seen)
        again = decide(state, config, record.at, seen.health)
    return again, apply(state, config, again, record.at)


def _watched(
    config: CanaryConfig, watch: Watch | None, record: DecisionRecord, seen: Inputs | None
) -> tuple[Decision, Watch | None]:
    if seen is None or watch is None:
        return take_back(watch, config, record.reason), watch
    watch = learn_after(watch, seen, record.at)
    return judge(watch, config, seen.health), watch


def learn_after(watch: Watch, inputs: Inputs, now: float) -> Watch:
    """The watch after everything that a tick saw."""
    return close_if_due(observe_windows(watch, inputs.windows), now)


def _action(verdict: str) -> Literal["advance", "hold", "resume", "roll_back", "abort"]:
    """What was ordered: past the last step an advance is a promotion."""
    return cast(
        Literal["advance", "hold", "resume", "roll_back", "abort"], "advance" if verdict == "promote" else verdict
    )


def _differences(record: DecisionRecord, again: Decision, state: CanaryState) -> Iterator[str]:
    recorded = (record.verdict, record.reason, record.metric, record.weight, record.step, _text(record.evidence))
    evidence = _text(again.to_json()["evidence"])
    remade = (again.verdict, again.reason, again.metric, again.weight, state.step, evidence)
    names = ("verdict", "reason", "metric", "weight", "step", "evidence")
    yield from (name for name, old, new in zip(names, recorded, remade, strict=True) if old != new)


def _text(value: object) -> str:
    return json.dumps(value)
