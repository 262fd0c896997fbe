"""Runs and models in a real database."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from pawl import leases, registry
from pawl.audit import AuditEvent, latest_events
from pawl.database import Database
from pawl.errors import NegativeVerdict, RunConflict, StaleWrite, UnknownModel
from pawl.registry import Model, ModelState, Run, RunStatus
from pawl.schema import models, runs

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


def test_runs_of_two_aliases_that_begin_at_once_have_numbers_of_their_own(database: Database) -> None:
    first = Run("r0001", "other", "2025-W47", RunStatus.RUNNING, "", {}, 1, 10.0, 10.0)
    found: list[Run] = []

    def begin() -> None:
        found.append(registry.create_run(database, "assistant", "2025-W47", epoch=1, now=10.0))

    thread = threading.Thread(target=begin)
    with database.write() as connection:
        database.insert_new(connection, runs, [registry._row(first, "detail")])
        thread.start()
        thread.join(0.5)
    thread.join(30)
    assert [run.id for run in found] == ["r0002"]


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


def trail(database: Database) -> list[tuple[str, str, object]]:
    """Oldest first."""
    return [(one.action, one.subject, one.detail.get("state_before")) for one in latest_events(database)[::-1]]


def test_every_change_of_a_model_is_written_down(database: Database) -> None:
    for name in ("m1", "m2"):
        registry.register_model(database, replace(MODEL, name=name))
        registry.register_model(database, replace(MODEL, name=name))
        assert registry.set_state(database, name, ModelState.CHALLENGER, now=5.0)
        assert registry.set_state(database, name, ModelState.CHAMPION, now=6.0, actor="controller")
        assert not registry.set_state(database, name, ModelState.CHAMPION, now=7.0)
    assert trail(database) == [
        ("model.register", "m1", None), ("model.challenge", "m1", "candidate"), ("model.promote", "m1", "challenger"),
        ("model.register", "m2", None), ("model.challenge", "m2", "candidate"), ("model.retire", "m1", "champion"),
        ("model.promote", "m2", "challenger"),
    ]  # fmt: skip
    assert [event.actor for event in latest_events(database, limit=3)] == ["controller", "controller", "pawl"]


def test_there_is_one_challenger_per_alias(database: Database) -> None:
    for number, alias in enumerate(["assistant", "assistant", "other"]):
        registry.register_model(database, replace(MODEL, name=f"m{number}", alias=alias))
        registry.set_state(database, f"m{number}", ModelState.CHALLENGER, now=5.0)
    states = [registry.get_model(database, f"m{number}").state for number in range(3)]
    assert states == [ModelState.RETIRED, ModelState.CHALLENGER, ModelState.CHALLENGER]


@pytest.mark.parametrize("state", registry.SOLE)
def test_the_database_itself_keeps_a_second_one_out(database: Database, state: ModelState) -> None:
    registry.register_model(database, replace(MODEL, name="m1", state=state))
    registry.register_model(database, replace(MODEL, name="m2"))
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(sa.update(models).where(models.c.name == "m2").values(state=str(state)))


def test_of_several_that_come_at_once_one_is_the_champion(database: Database) -> None:
    names = [f"m{number}" for number in range(6)]
    for name in names:
        registry.register_model(database, replace(MODEL, name=name))
    start = threading.Barrier(len(names))

    def promote(name: str) -> None:
        start.wait(30)
        with contextlib.suppress(StaleWrite):
            registry.set_state(database, name, ModelState.CHAMPION, now=5.0)

    threads = [threading.Thread(target=promote, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(registry.list_models(database, "assistant", ModelState.CHAMPION)) == 1


def test_a_model_that_has_moved_on_is_left_alone(database: Database) -> None:
    registry.register_model(database, replace(MODEL, state=ModelState.RETIRED))
    late = {"now": 9.0, "expected": (ModelState.CHALLENGER,)}
    assert not registry.set_state(database, MODEL.name, ModelState.CHAMPION, **late)  # type: ignore[arg-type]
    assert registry.get_model(database, MODEL.name).state == ModelState.RETIRED


def test_who_lost_the_lease_changes_no_model(database: Database) -> None:
    registry.register_model(database, MODEL)
    epoch = leases.acquire(database, "retrain/assistant", "one", ttl_s=1.0, now=0.0)
    assert epoch is not None
    fenced = leases.FencedDatabase(database, "retrain/assistant", epoch)
    assert registry.set_state(fenced, MODEL.name, ModelState.CHALLENGER, now=1.0)
    assert leases.acquire(database, "retrain/assistant", "two", ttl_s=1.0, now=10.0) == epoch + 1
    before = trail(database)
    for change in (
        lambda: registry.set_state(fenced, MODEL.name, ModelState.CHAMPION, now=11.0),
        lambda: registry.retire_model(fenced, MODEL.name, now=11.0, actor="one"),
        lambda: registry.register_model(fenced, replace(MODEL, name="late")),
        lambda: registry.take_up(fenced, MODEL.name, now=11.0),
        lambda: registry.mark_files_deleted(fenced, MODEL.name, rested_since=9.0, now=11.0, actor="one"),
    ):
        with pytest.raises(StaleWrite):
            change()
    assert (trail(database), registry.get_model(database, MODEL.name).state) == (before, ModelState.CHALLENGER)


def test_what_is_retired_is_written_down(database: Database) -> None:
    registry.register_model(database, MODEL)
    assert registry.retire_model(database, MODEL.name, now=7.0, actor="operator:ann").state == ModelState.RETIRED
    told = AuditEvent(7.0, "operator:ann", "model.retire", MODEL.name, {"state_before": "candidate"})
    assert latest_events(database)[0] == told


def delete_files(database: Database, name: str, since: float) -> bool:
    return registry.mark_files_deleted(database, name, rested_since=since, now=5.0, actor="x")


def test_files_go_of_what_rests_and_is_not_taken_up_again(database: Database) -> None:
    registry.register_model(database, MODEL)
    assert not delete_files(database, MODEL.name, 9.0)
    registry.retire_model(database, MODEL.name, now=3.0, actor="x")
    registry.take_up(database, MODEL.name, now=4.0)
    assert not delete_files(database, MODEL.name, 3.5)
    assert delete_files(database, MODEL.name, 4.0)
    assert registry.get_model(database, MODEL.name).manifest == {"files": {}, "files_deleted_at": 5.0}
    with pytest.raises(NegativeVerdict, match="have been deleted"):
        registry.take_up(database, MODEL.name, now=6.0)
    for look_up in (lambda: delete_files(database, "no", 9.0), lambda: registry.take_up(database, "no", now=1.0)):
        with pytest.raises(UnknownModel):
            look_up()


@pytest.mark.parametrize("state", [ModelState.CHAMPION, ModelState.CHALLENGER])
def test_what_serves_is_not_retired(database: Database, state: ModelState) -> None:
    registry.register_model(database, replace(MODEL, state=state))
    with pytest.raises(NegativeVerdict, match="in service"):
        registry.retire_model(database, MODEL.name, now=7.0, actor="operator:ann")
    assert registry.get_model(database, MODEL.name).state == state
    assert [action for action, *_ in trail(database)] == ["model.register"]


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
