"""How a round begins, from what the registry knows of its parent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ab_testing.rollout_store import list_rollouts
from pawl import registry
from pawl.database import Database
from pawl.registry import Model, ModelState
from pawl.settings import RebaseSettings
from retrain.drift import Drift, Plan, Start, parent_of, plan_round, read_record


def begin(database: Database, parent: Model | None, settings: RebaseSettings) -> dict[str, Any]:
    """The plan of a round, to be frozen with its pairs."""
    if parent is None:
        return asdict(plan_round(None, settings))
    tried = refused_drifts(database, parent)
    return asdict(plan_round(parent_of(parent.name, parent.manifest), settings, tried=tried))


def read_plan(frozen: dict[str, Any] | None, *, has_parent: bool) -> Plan:
    """A plan that `begin` froze; rounds of before there were plans continued what they could."""
    if frozen is None:
        return Plan(Start.CONTINUE if has_parent else Start.FIRST, 2 if has_parent else 1, "")
    return Plan(Start(frozen["start"]), int(frozen["rounds"]), str(frozen["reason"]))


def refused_drifts(database: Database, parent: Model) -> list[Drift]:
    """How far candidates went that continued this parent and were rejected by the gate, or rolled back."""
    rolled_back = {one.candidate for one in list_rollouts(database, parent.alias) if one.state.status == "rolled_back"}
    models = registry.list_models(database, parent.alias)
    refused = [one for one in models if one.state == ModelState.REJECTED or one.name in rolled_back]
    records = [read_record(model.manifest) for model in refused if model.parent == parent.name]
    return [record.drift for record in records if record and record.start == Start.CONTINUE and record.drift]
