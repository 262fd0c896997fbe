"""Publishing to engines that work, lie, refuse, forget and hang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pawl.engines import Engine, load_verified, reconcile, unload_everywhere
from pawl.errors import PublishFailed, Unreachable
from tests.retrain.fake_engine import FakeEngine, serving

NAME = "tiny--r0001-0123abcd"
PATH = Path("/adapters/base/tiny--r0001-0123abcd")


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def engine(fake: FakeEngine) -> Iterator[Engine]:
    with closing(Engine(fake.url, answer_timeout_s=2.0)) as client:
        yield client


def test_an_adapter_is_loaded_once_and_verified(fake: FakeEngine, engine: Engine) -> None:
    load_verified([engine], NAME, PATH, "tiny")
    load_verified([engine], NAME, PATH, "tiny")
    assert fake.adapters == {NAME: str(PATH)}
    assert fake.loads == [NAME]
    assert all(body["temperature"] == 0 for body in fake.bodies)


def test_every_replica_gets_it(fake: FakeEngine, engine: Engine) -> None:
    with serving(FakeEngine()) as other, closing(Engine(other.url)) as second:
        load_verified([engine, second], NAME, PATH, "tiny")
        assert fake.adapters == other.adapters == {NAME: str(PATH)}


def test_a_name_that_stands_for_other_files_is_refused(fake: FakeEngine, engine: Engine) -> None:
    fake.adapters[NAME] = "/somewhere/else"
    with pytest.raises(PublishFailed, match="served from /somewhere/else"):
        load_verified([engine], NAME, PATH, "tiny")


def test_an_engine_that_only_says_it_loaded_is_found_out(fake: FakeEngine, engine: Engine) -> None:
    fake.forgets_loads = True
    with pytest.raises(PublishFailed, match="served from nowhere"):
        load_verified([engine], NAME, PATH, "tiny")


def test_an_adapter_without_effect_is_found_out(fake: FakeEngine, engine: Engine) -> None:
    fake.ignores_weights = True
    with pytest.raises(PublishFailed, match="answers exactly as tiny does"):
        load_verified([engine], NAME, PATH, "tiny")


def test_a_refusal_is_passed_on_with_its_reason(fake: FakeEngine, engine: Engine) -> None:
    fake.refuses = True
    with pytest.raises(PublishFailed, match="rank 64 is greater"):
        load_verified([engine], NAME, PATH, "tiny")


def test_a_hanging_engine_is_unreachable(fake: FakeEngine) -> None:
    fake.delay_s = 1.0
    with closing(Engine(fake.url, answer_timeout_s=0.05)) as impatient, pytest.raises(Unreachable) as caught:
        load_verified([impatient], NAME, PATH, "tiny")
    assert caught.value.exit_code == 3


def test_unloading_twice_is_fine(fake: FakeEngine, engine: Engine) -> None:
    engine.load(NAME, PATH)
    unload_everywhere([engine, engine], NAME)
    assert fake.adapters == {}
    assert fake.unloads == [NAME]


def test_a_restarted_engine_gets_its_adapters_back(fake: FakeEngine, engine: Engine) -> None:
    wanted = {NAME: PATH, "other": Path("/adapters/base/other")}
    engine.load(NAME, PATH)
    done = reconcile([engine], wanted)
    assert done.loaded == ((fake.url, "other"),)
    assert not done.failures
    assert reconcile([engine], wanted).loaded == ()


def test_a_replica_that_is_down_does_not_keep_the_others_waiting(fake: FakeEngine, engine: Engine) -> None:
    with serving(FakeEngine()) as stopped:
        pass
    with closing(Engine(stopped.url)) as down:
        done = reconcile([down, engine], {NAME: PATH})
    assert done.loaded == ((fake.url, NAME),)
    assert [(failure.engine, failure.name) for failure in done.failures] == [(stopped.url, NAME)]


def test_reconciling_never_replaces_what_has_another_path(fake: FakeEngine, engine: Engine) -> None:
    fake.adapters[NAME] = "/somewhere/else"
    done = reconcile([engine], {NAME: PATH})
    assert "served from /somewhere/else" in done.failures[0].reason
    assert fake.adapters[NAME] == "/somewhere/else"
