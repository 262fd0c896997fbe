"""What the worker keeps up, alias by alias, and what it shows of what others did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ab_testing.canary import Decision
from ab_testing.controller import Action, start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_orders import controller_of
from ab_testing.rollout_store import Rollout, get_rollout, save_progress
from ab_testing.route_store import load_route
from ab_testing.shadow_orders import start_shadow
from feedback.recording import conversation_sha
from monitoring.metrics import REGISTRY
from pawl import leases, registry
from pawl.cli.worker import Worker, rejected_pairs
from pawl.clock import now
from pawl.database import Database, open_database
from pawl.registry import Model, ModelState, RunStatus
from pawl.schema import rollouts
from pawl.settings import DatabaseSettings, RolloutSettings, Settings, ShadowSettings
from tests.pawl.records import interaction_id, save, served
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter

BASE = "base-model"


def make_settings(*urls: str) -> Settings:
    """One alias per engine: `first`, `second`."""
    models = {name: {"engines": [url], "champion": BASE} for name, url in zip(("first", "second"), urls, strict=True)}
    return Settings.model_validate({"serving": {"models": models}})


def register(
    database: Database, alias: str, number: int, state: ModelState = ModelState.CANDIDATE, adapters: Path | None = None
) -> str:
    """A version, with its files if there is a place for them."""
    name = f"{alias}--r{number:04d}"
    path = str(place_adapter(adapters, name, base=BASE)) if adapters else f"/adapters/{name}"
    at = float(number)
    registry.register_model(database, Model(name, alias, BASE, None, None, path, None, None, state, {}, at, at))
    return name


def roll_out(database: Database, alias: str, number: int, adapters: Path | None = None) -> Rollout:
    """A rollout of version `number`, which is registered for it."""
    name = register(database, alias, number, adapters=adapters)
    route = load_route(database, alias) or Route(alias, 0, BASE)
    return start_rollout(database, RolloutSettings(), route, name, now=float(number), epoch=0)


def finish(database: Database, rollout: Rollout, *, is_promoted: bool) -> None:
    """By a person."""
    controller = controller_of(database, now)
    actions: Sequence[Action] = ("advance", "advance", "advance") if is_promoted else ("roll_back",)
    for action in actions:
        controller.act(rollout.alias, action, "test", actor="operator:eve", epoch=0)


def break_rollout(database: Database, rollout: Rollout) -> None:
    with database.write() as connection:
        connection.execute(rollouts.update().where(rollouts.c.id == rollout.id).values(state="{"))


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_one_alias_that_fails_does_not_starve_the_others(database: Database, tmp_path: Path) -> None:
    with serving(FakeEngine(base=BASE)) as engine:
        worker = Worker(make_settings(engine.url, engine.url), database)
        broken, fine = roll_out(database, "first", 1, tmp_path), roll_out(database, "second", 2, tmp_path)
        break_rollout(database, broken)
        worker.tick_rollouts()
        worker.reload_adapters()
        worker.show_learning()
    assert get_rollout(database, fine.id).updated_at > fine.updated_at
    assert engine.adapters == {fine.candidate: str(tmp_path / fine.candidate)}
    assert sample("pawl_rollout_state", model="second", state="hold") == 1  # It is over its time.


def test_a_controller_that_cannot_read_the_database_says_so_and_moves_nothing(
    database: Database, tmp_path: Path
) -> None:
    settings = make_settings("http://127.0.0.1:9", "http://127.0.0.1:9")
    rollout = roll_out(database, "first", 1)
    nowhere = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}"))  # A directory: nobody can open it.
    Worker(settings, nowhere).tick_rollouts()
    assert sample("pawl_rollout_blind", model="first") == 1
    assert get_rollout(database, rollout.id) == rollout
    Worker(settings, database).tick_rollouts()
    assert sample("pawl_rollout_blind", model="first") == 0
    assert get_rollout(database, rollout.id).updated_at > rollout.updated_at
    nowhere.close()


def test_what_a_person_did_shows(database: Database) -> None:
    worker = Worker(make_settings("http://127.0.0.1:9", "http://127.0.0.1:9"), database)
    rollout = roll_out(database, "first", 1)
    worker.show_learning()
    assert sample("pawl_rollout_state", model="first", state="ramp") == 1
    before = sample("pawl_rollbacks_total", metric="operator")
    finish(database, rollout, is_promoted=False)
    worker.show_learning()
    worker.show_learning()
    assert sample("pawl_rollout_state", model="first", state="ramp") == 0
    assert sample("pawl_rollout_state", model="first", state="rolled_back") == 1
    assert sample("pawl_rollbacks_total", metric="operator") - before == 1


def test_a_rollback_shows_under_its_metric(database: Database) -> None:
    worker = Worker(make_settings("http://127.0.0.1:9", "http://127.0.0.1:9"), database)
    rollout = roll_out(database, "first", 1)
    before = sample("pawl_rollbacks_total", metric="toxicity")
    over = replace(rollout, state=replace(rollout.state, status="rolled_back"), updated_at=9.0)
    decision = Decision("roll_back", 0.0, "toxic", "harm", "toxicity")
    save_progress(database, rollout, over, decision, None, actor="controller", epoch=0)
    worker.show_learning()
    assert sample("pawl_rollbacks_total", metric="toxicity") - before == 1


def add_run(database: Database, alias: str, cycle: str, at: float, skipped: dict[str, int]) -> None:
    run = registry.create_run(database, alias, cycle, epoch=0, now=at)
    registry.update_run(database, run, now=at, step="mine", status=RunStatus.SKIPPED, detail={"skipped": skipped})


def test_what_gave_no_pair_is_told_of_each_alias_s_newest_mining(database: Database) -> None:
    worker = Worker(make_settings("http://127.0.0.1:9", "http://127.0.0.1:9"), database)
    before = sample("pawl_pairs_rejected_total", reason="unpaired")
    add_run(database, "first", "one", 1.0, {"unpaired": 3, "same_text": 2})
    worker.show_learning()
    add_run(database, "first", "two", 2.0, {"unpaired": 5})
    add_run(database, "second", "one", 3.0, {"unpaired": 1})
    worker.show_learning()
    assert sample("pawl_pairs_rejected_total", reason="unpaired") - before == 6
    assert rejected_pairs(registry.list_runs(database)) == Counter(unpaired=6)


def test_a_worker_without_the_lease_leaves_rollouts_alone(database: Database) -> None:
    rollout = roll_out(database, "first", 1)
    assert leases.acquire(database, "rollout/first", "elsewhere:7", ttl_s=60.0, now=now()) == 1
    Worker(make_settings("http://127.0.0.1:9", "http://127.0.0.1:9"), database).tick_rollouts()
    assert get_rollout(database, rollout.id) == rollout


def test_the_worker_asks_in_the_dark_and_keeps_the_adapter(database: Database, tmp_path: Path) -> None:
    with serving(FakeEngine(base=BASE)) as engine:
        settings = make_settings(engine.url, engine.url)
        name = register(database, "first", 1, adapters=tmp_path)
        start_shadow(
            database, settings, "first", name,
            actor="tester", clock=lambda: now() - 60.0, wanted=ShadowSettings(share=1.0),
        )  # fmt: skip
        question = served(1, alias="first", created_at=now() - 30.0, parameters={"model": "first"})
        sha = conversation_sha("first", question.prompt or (), {})
        save(database, [replace(question, prompt_sha=sha, id=interaction_id(number)) for number in range(5)])
        worker = Worker(settings, database)
        before = sample("pawl_shadow_answers_total", model="first", outcome="ok")
        while worker.mirror() is not None:
            pass
        assert sample("pawl_shadow_answers_total", model="first", outcome="ok") - before == 5
        assert [body["model"] for body in engine.bodies] == [name] * 5
        worker.reload_adapters()
        assert name in engine.adapters
