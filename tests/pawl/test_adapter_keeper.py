"""What the registry, the routes and the rollouts say should be served, and the worker that sees to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_orders import controller_of, open_rollout
from ab_testing.rollout_store import Rollout
from ab_testing.route_store import load_route
from monitoring.metrics import REGISTRY
from pawl import leases, registry
from pawl.cli.adapter_keeper import AdapterKeeper, desired_by_replica, desired_of, drain_s
from pawl.database import Database
from pawl.errors import BadAdapter, PublishFailed, StaleWrite
from pawl.reconciliation import Desired, Wanted
from pawl.registry import Model, ModelState, RunStatus
from pawl.settings import RolloutSettings, Settings
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter

BASE = "tiny"
ALIAS = "assistant"


@pytest.fixture
def fakes() -> Iterator[tuple[FakeEngine, FakeEngine, FakeEngine]]:
    with serving(FakeEngine()) as one, serving(FakeEngine()) as two, serving(FakeEngine()) as three:
        yield one, two, three


@pytest.fixture
def settings(fakes: tuple[FakeEngine, ...]) -> Settings:
    served = {"engines": [fake.url for fake in fakes], "champion": BASE}
    return Settings.model_validate({"serving": {"models": {ALIAS: served}}})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def add_model(
    database: Database, directory: Path, number: int, state: ModelState = ModelState.CANDIDATE, run: str | None = None
) -> str:
    name = f"tiny--r{number:04d}"
    path = str(place_adapter(directory, name, base=BASE, seed=float(number)))
    at = float(number)
    registry.register_model(database, Model(name, ALIAS, BASE, None, run, path, None, None, state, {}, at, at))
    return name


def roll_out(database: Database, candidate: str, clock: Clock, *, ends: str = "") -> Rollout:
    clock.now += 1
    route = load_route(database, ALIAS) or Route(ALIAS, 0, BASE)
    rollout = start_rollout(database, RolloutSettings(), route, candidate, now=clock(), epoch=0)
    controller = controller_of(database, clock)
    for action in {"promoted": ("advance",) * 3, "rolled back": ("roll_back",)}.get(ends, ()):
        controller.act(ALIAS, action, "test", actor="operator:eve", epoch=0)  # type: ignore[arg-type]
    return rollout


def wanted(database: Database, settings: Settings, now: float = 0.0) -> set[str]:
    return {one.name for one in desired_of(database, settings.serving, ALIAS, now).wanted}


def keep(keeper: AdapterKeeper) -> None:
    assert keeper.has_duty()
    keeper.settle(ALIAS)
    keeper.keep({ALIAS: keeper.desired(ALIAS)})


def test_the_champion_before_is_kept_ready_whatever_was_rolled_back_since(
    database: Database, settings: Settings, clock: Clock, tmp_path: Path
) -> None:
    first, second, third, fourth = (add_model(database, tmp_path, number) for number in range(1, 5))
    for name, ends in ((first, "promoted"), (second, "promoted"), (third, "rolled back"), (fourth, "")):
        roll_out(database, name, clock, ends=ends)
    assert wanted(database, settings) == {first, second, fourth}


def test_the_registry_moves_with_the_rollout_in_one_transaction(
    database: Database, clock: Clock, tmp_path: Path
) -> None:
    first, second = (add_model(database, tmp_path, number) for number in (1, 2))
    for name, ends, state in ((first, "promoted", ModelState.CHAMPION), (second, "", ModelState.CHALLENGER)):
        roll_out(database, name, clock, ends=ends)
        assert registry.get_model(database, name).state == state
    controller_of(database, clock).act(ALIAS, "roll_back", "x", actor="operator:eve", epoch=0)
    states = [registry.get_model(database, name).state for name in (first, second)]
    assert states == [ModelState.CHAMPION, ModelState.RETIRED]


def test_a_candidate_waits_in_the_engines_once_its_round_has_passed(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    run = registry.create_run(database, ALIAS, "one", epoch=0, now=1.0)
    name = add_model(database, tmp_path, 1, run=run.id)
    assert wanted(database, settings) == set()
    desired = desired_of(database, settings.serving, ALIAS, 1e9)
    assert desired == Desired(), "while it is evaluated it is its round's business"
    registry.update_run(database, run, now=2.0, step="canary", status=RunStatus.PASSED, detail={})
    assert wanted(database, settings) == {name}


def test_what_has_been_retired_is_unwanted_when_no_request_can_still_run_with_it(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    name = add_model(database, tmp_path, 1)
    registry.set_state(database, name, ModelState.RETIRED, now=5000.0)
    rest_s = drain_s(settings.serving)
    assert rest_s > settings.serving.timeouts.total_s
    assert desired_of(database, settings.serving, ALIAS, 5000.0 + rest_s - 1).unwanted == frozenset()
    assert desired_of(database, settings.serving, ALIAS, 5000.0 + rest_s).unwanted == {name}


def test_what_a_route_names_is_wanted_whatever_its_state(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    name = add_model(database, tmp_path, 1, ModelState.RETIRED)
    models = {ALIAS: settings.serving.models[ALIAS].model_copy(update={"champion": name})}
    serving = settings.serving.model_copy(update={"models": models})
    desired = desired_of(database, serving, ALIAS, 1e9)
    assert ([one.name for one in desired.wanted], desired.unwanted) == ([name], frozenset())


def test_aliases_that_share_a_replica_keep_each_other_s_adapters() -> None:
    one, two = (Wanted(name, Path("/x"), BASE) for name in ("one", "two"))
    by_alias = {"a": Desired((one,), frozenset({"two", "old"})), "b": Desired((two,))}
    found = desired_by_replica(by_alias, {"a": ["http://x", "http://y"], "b": ["http://y"]})
    assert found["http://x"] == Desired((one,), frozenset({"two", "old"}))
    assert found["http://y"] == Desired((one, two), frozenset({"old"}))


def missing(fake: FakeEngine) -> float | None:
    return REGISTRY.get_sample_value("pawl_adapters_missing", {"model": ALIAS, "replica": fake.url})


def test_a_replica_that_forgets_or_lies_is_put_right_or_told_of(
    database: Database, settings: Settings, fakes: tuple[FakeEngine, ...], clock: Clock, tmp_path: Path
) -> None:
    name = add_model(database, tmp_path, 1, ModelState.CHAMPION)
    fakes[1].answers_as = {name: "base", f"pawl-proof--{name}": "base"}
    keeper = AdapterKeeper(settings, database, "one", clock)
    keep(keeper)
    assert [list(fake.adapters) for fake in fakes] == [[name], [], [name]]
    assert [missing(fake) for fake in fakes] == [0, 1, 0]
    fakes[0].adapters.clear()
    fakes[1].answers_as = {}
    keep(keeper)
    assert [list(fake.adapters) for fake in fakes] == [[name]] * 3
    assert [missing(fake) for fake in fakes] == [0, 0, 0]


def test_a_retired_adapter_goes_from_every_replica_and_its_files_stay(
    database: Database, settings: Settings, fakes: tuple[FakeEngine, ...], clock: Clock, tmp_path: Path
) -> None:
    name = add_model(database, tmp_path, 1)
    roll_out(database, name, clock)
    keeper = AdapterKeeper(settings, database, "one", clock)
    keep(keeper)
    controller_of(database, clock).act(ALIAS, "roll_back", "x", actor="operator:eve", epoch=0)
    keep(keeper)
    assert [list(fake.adapters) for fake in fakes] == [[name]] * 3, "requests may still run with it"
    clock.now += drain_s(settings.serving)
    fakes[2].in_use.add(name)
    keep(keeper)
    assert [list(fake.adapters) for fake in fakes] == [[], [], [name]]
    fakes[2].in_use.clear()
    keep(keeper)
    assert fakes[2].adapters == {}
    assert (tmp_path / name).is_dir()


def test_of_two_workers_one_looks_after_the_replicas(database: Database, settings: Settings, clock: Clock) -> None:
    one, two = (AdapterKeeper(settings, database, holder, clock) for holder in ("one", "two"))
    assert [one.has_duty(), two.has_duty(), one.has_duty()] == [True, False, True]
    one.release()
    assert [two.has_duty(), one.has_duty()] == [True, False]


@pytest.mark.parametrize("lie", ["forgets_loads", "ignores_weights", "answers_as", "refuses"])
def test_one_replica_of_three_that_lies_keeps_a_candidate_from_being_routed_to(
    database: Database, settings: Settings, fakes: tuple[FakeEngine, ...], clock: Clock, tmp_path: Path, lie: str
) -> None:
    name = add_model(database, tmp_path, 1)
    setattr(fakes[1], lie, {name: "parent"} if lie == "answers_as" else True)
    with pytest.raises(PublishFailed, match=fakes[1].url):
        open_rollout(database, settings, ALIAS, name, actor="test", clock=clock)
    assert load_route(database, ALIAS) is None
    assert registry.get_model(database, name).state == ModelState.CANDIDATE
    setattr(fakes[1], lie, {} if lie == "answers_as" else False)
    open_rollout(database, settings, ALIAS, name, actor="test", clock=clock)
    assert registry.get_model(database, name).state == ModelState.CHALLENGER


def test_weights_that_are_not_the_registered_ones_are_not_routed_to(
    database: Database, settings: Settings, fakes: tuple[FakeEngine, ...], clock: Clock, tmp_path: Path
) -> None:
    known = registry.get_model(database, add_model(database, tmp_path, 1))
    registry.register_model(database, replace(known, name="tiny--r0002", sha256="0" * 64))
    place_adapter(tmp_path, "tiny--r0002", base=BASE)
    for model in (known.name, "tiny--r0002"):
        (tmp_path / model / "chat_template.jinja").write_text("{{ cycler.__init__ }}")
        with pytest.raises(BadAdapter):
            open_rollout(database, settings, ALIAS, model, actor="test", clock=clock)
    assert load_route(database, ALIAS) is None
    assert [fake.loads for fake in fakes] == [[], [], []]


def test_a_gateway_sends_out_only_what_the_engines_have_loaded(
    database: Database, settings: Settings, fakes: tuple[FakeEngine, ...], clock: Clock, tmp_path: Path
) -> None:
    """It has no adapters' directory to look through."""
    name = add_model(database, tmp_path / "adapters", 1)
    path = tmp_path / "adapters" / name
    for fake in fakes[:2]:
        fake.adapters[name] = str(path)
    hidden = (tmp_path / "adapters").rename(tmp_path / "hidden")
    with pytest.raises(PublishFailed, match="cannot be looked through from here"):
        open_rollout(database, settings, ALIAS, name, actor="test", clock=clock)
    assert fakes[2].loads == []
    hidden.rename(tmp_path / "adapters")
    open_rollout(database, settings, ALIAS, name, actor="test", clock=clock)


def test_a_leader_that_slept_through_its_lease_promotes_nothing(
    database: Database, clock: Clock, tmp_path: Path
) -> None:
    name = add_model(database, tmp_path, 1)
    roll_out(database, name, clock)
    epoch = leases.acquire(database, f"rollout/{ALIAS}", "one", ttl_s=1.0, now=clock())
    assert epoch is not None
    asleep = controller_of(leases.FencedDatabase(database, f"rollout/{ALIAS}", epoch), clock)
    clock.now += 10
    assert leases.acquire(database, f"rollout/{ALIAS}", "two", ttl_s=60.0, now=clock()) == epoch + 1
    with pytest.raises(StaleWrite):
        asleep.act(ALIAS, "advance", "good", actor="one", epoch=epoch)
    assert registry.get_model(database, name).state == ModelState.CHALLENGER
    controller_of(database, clock).act(ALIAS, "roll_back", "bad", actor="two", epoch=epoch + 1)
    assert asleep.act(ALIAS, "advance", "good", actor="one", epoch=epoch) is None
    assert registry.get_model(database, name).state == ModelState.RETIRED
