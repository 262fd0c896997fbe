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
from ab_testing.canary_state import CanaryState, UserOutcome
from ab_testing.rollout_store import CONTROLLER, DecisionRecord, Rollout

NOBODY = ""
"""In place of a user's name, which no decision depends on."""


class Inputs(NamedTuple):
    """What the controller saw besides the state, its rules and the clock."""

    health: Health
    outcomes: tuple[UserOutcome, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "health": asdict(self.health),
            "outcomes": [
                [outcome.is_treatment, outcome.treatment_probability, outcome.phase, dict(outcome.values)]
                for outcome in self.outcomes
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inputs:
        health = Health(**{**data["health"], "missing": tuple(data["health"]["missing"])})
        outcomes = (UserOutcome(NOBODY, side, share, values, phase) for side, share, phase, values in data["outcomes"])
        return cls(health, tuple(outcomes))


class Replayed(NamedTuple):
    """A recorded decision beside the one that the rules make of its inputs now."""

    record: DecisionRecord
    again: Decision
    state: CanaryState
    """After it."""
    differences: tuple[str, ...]
    """Fields in which they are not the same, to the byte."""


def replay(rollout: Rollout, records: Iterable[tuple[DecisionRecord, Inputs | None]]) -> Iterator[Replayed]:
    """Make a rollout's decisions again, the oldest first; people's orders are taken as given.

    Args:
        records: all of the rollout's, the controller's with their inputs.
    """
    state = launch(rollout.config, rollout.created_at)
    for record, inputs in records:
        if record.actor == CONTROLLER and inputs is not None:
            state = observe(state, rollout.config, inputs.outcomes)
            again = decide(state, rollout.config, record.at, inputs.health)
        else:
            again = override(state, rollout.config, _action(record.verdict), record.reason)
        state = apply(state, rollout.config, again, record.at)
        yield Replayed(record, again, state, tuple(_differences(record, again, state)))


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
