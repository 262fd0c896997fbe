"""Runs and models in a real database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pawl import registry
from pawl.audit import AuditEvent, latest_events
from pawl.database import Database
from pawl.errors import NegativeVerdict, RunConflict, UnknownModel
from pawl.registry import Model, ModelState, RunStatus

MODEL = Model(
    name="base--r0001-aaaaaaaa",
    alias="assistant",
    base="base",
    parent="base",
    run_id="r0001",
    path="/adapters/one",
    sha256="aa",
    dataset_sha="dd",
    state=ModelState.CANDIDATE,
    manifest={"files": {}},
    created_at=1.0,
    updated_at=1.0,
)


def test_a_cycle_has_one_run_per_alias(database: Database) -> None:
    first = registry.create_run(database, "assistant", "2025-W47", epoch=1, now=10.0)
    second = registry.create_run(database, "other", "2025-W47", epoch=1, now=11.0)
    assert (first.id, first.number, second.id) == ("r0001", 1, "r0002")
    with pytest.raises(RunConflict, match="already has a run for cycle 2025-W47"):
        registry.create_run(database, "assistant", "2025-W47", epoch=1, now=12.0)
    assert registry.find_run(database, "assistant", "2025-W47") == first
    assert registry.find_run(database, "assistant", "2025-W48") is None
    assert registry.list_runs(database) == [second, first]
    assert registry.list_runs(database, "assistant") == [first]


def test_progress_is_laid_over_what_is_there(database: Database) -> None:
    run = registry.create_run(database, "assistant", "c", epoch=1, now=10.0)
    run = registry.update_run(database, run, now=11.0, step="mine", status=RunStatus.RUNNING, detail={"a": 1})
    run = registry.update_run(database, run, now=12.0, step="build", status=RunStatus.ERROR, detail={"b": 2})
    assert registry.get_run(database, run.id) == run
    assert (run.step, run.status, run.detail, run.updated_at) == ("build", RunStatus.ERROR, {"a": 1, "b": 2}, 12.0)


def test_a_process_that_lost_its_lease_can_write_no_more(database: Database) -> None:
    old = registry.create_run(database, "assistant", "c", epoch=1, now=10.0)
    new = registry.adopt_run(database, old, epoch=2, now=20.0)
    with pytest.raises(RunConflict):
        registry.update_run(database, old, now=21.0, step="train", status=RunStatus.PASSED, detail={})
    with pytest.raises(RunConflict):
        registry.adopt_run(database, old, epoch=1, now=22.0)
    assert registry.get_run(database, old.id) == new


def test_there_is_one_champion_per_alias(database: Database) -> None:
    for number, alias in enumerate(["assistant", "assistant", "other"]):
        registry.register_model(database, replace(MODEL, name=f"m{number}", alias=alias))
        registry.set_state(database, f"m{number}", ModelState.CHAMPION, now=5.0)
    assert registry.get_model(database, "m0").state == ModelState.RETIRED
    promoted = registry.promoted(database, "assistant")
    assert promoted is not None
    assert promoted.name == "m1"
    assert [model.name for model in registry.list_models(database, "other", ModelState.CHAMPION)] == ["m2"]


def test_what_is_retired_is_written_down(database: Database) -> None:
    registry.register_model(database, MODEL)
    assert registry.retire_model(database, MODEL.name, now=7.0, actor="operator:ann").state == ModelState.RETIRED
    told = AuditEvent(7.0, "operator:ann", "model.retire", MODEL.name, {"state_before": "candidate"})
    assert latest_events(database) == [told]


@pytest.mark.parametrize("state", [ModelState.CHAMPION, ModelState.CHALLENGER])
def test_what_serves_is_not_retired(database: Database, state: ModelState) -> None:
    registry.register_model(database, replace(MODEL, state=state))
    with pytest.raises(NegativeVerdict, match="in service"):
        registry.retire_model(database, MODEL.name, now=7.0, actor="operator:ann")
    assert registry.get_model(database, MODEL.name).state == state
    assert latest_events(database) == []


def test_only_champions_become_parents(database: Database) -> None:
    for state in ModelState:
        registry.register_model(database, replace(MODEL, name=state, state=state))
    registry.set_state(database, "champion", ModelState.RETIRED, now=2.0)
    assert registry.promoted(database, "assistant") is None


def test_registering_again_keeps_the_state(database: Database) -> None:
    registry.register_model(database, MODEL)
    registry.set_state(database, MODEL.name, ModelState.REJECTED, now=2.0)
    registry.register_model(database, MODEL)
    assert registry.get_model(database, MODEL.name).state == ModelState.REJECTED


def test_lineage_goes_back_to_the_first_registered_model(database: Database) -> None:
    for name, parent in [("m1", "base"), ("m2", "m1"), ("m3", "m2"), ("side", "m1")]:
        registry.register_model(database, replace(MODEL, name=name, parent=parent))
    assert [model.name for model in registry.lineage(database, "m3")] == ["m3", "m2", "m1"]


def test_unknown_names_are_errors(database: Database) -> None:
    for look_up in (registry.get_model, registry.get_run, registry.lineage):
        with pytest.raises(UnknownModel):
            look_up(database, "nothing")
    with pytest.raises(UnknownModel):
        registry.set_state(database, "nothing", ModelState.CHAMPION, now=1.0)
    with pytest.raises(UnknownModel):
        registry.retire_model(database, "nothing", now=1.0, actor="x")
