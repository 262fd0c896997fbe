"""What a round's beginning learns from candidates that were turned down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ab_testing.controller import Controller, start_rollout
from ab_testing.experiment import Route
from pawl import registry
from pawl.database import Database
from pawl.registry import Model, ModelState
from pawl.settings import RolloutSettings
from retrain.beginning import refused_drifts
from retrain.drift import Drift, Plan, Start, record_of

PARENT = Model("base--r0001", "assistant", "base", None, None, None, None, None, ModelState.CHAMPION, {}, 1.0, 1.0)
FAR = Drift(0.4, 0.2)
CANDIDATE = replace(
    PARENT,
    name="base--r0002",
    parent=PARENT.name,
    state=ModelState.CANDIDATE,
    manifest={"incremental": record_of(Plan(Start.CONTINUE, 2, ""), "parent", FAR)},
)


@pytest.mark.parametrize("end", ["rejected", "rolled back", "promoted", "other parent"])
def test_how_far_a_candidate_went_that_the_gate_or_users_turned_down(database: Database, end: str) -> None:
    registry.register_model(database, PARENT)
    registry.register_model(database, replace(CANDIDATE, parent="base" if end == "other parent" else PARENT.name))
    if end in ("rejected", "other parent"):
        registry.set_state(database, CANDIDATE.name, ModelState.REJECTED, now=2.0)
    else:
        route = Route("assistant", 0, PARENT.name)
        start_rollout(database, RolloutSettings(), route, CANDIDATE.name, now=2.0, epoch=0)
        actions = ["roll_back"] if end == "rolled back" else ["advance"] * 3
        for action in actions:
            Controller(database, clock=lambda: 3.0).act("assistant", action, "so", actor="operator:ann", epoch=0)  # type: ignore[arg-type]
    assert refused_drifts(database, PARENT) == ([FAR] if end in ("rejected", "rolled back") else [])
