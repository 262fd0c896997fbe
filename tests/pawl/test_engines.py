"""Publishing to engines that work, lie, refuse, forget and hang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pawl.adapter_files import Adapter
from pawl.engines import Engine, load_verified, prove_loaded, unload_everywhere, verify
from pawl.errors import BadAdapter, NotNow, PublishFailed, Unreachable
from pawl.fingerprints import fingerprint_of
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import sealed_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return sealed_adapter(tmp_path / "adapters")


@pytest.fixture
def name(adapter: Adapter) -> str:
    return adapter.name


@pytest.fixture
def path(adapter: Adapter) -> Path:
    return adapter.path


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def engine(fake: FakeEngine) -> Iterator[Engine]:
    with closing(Engine(fake.url, answer_timeout_s=2.0)) as client:
        yield client


def test_an_adapter_is_loaded_once_and_proven(fake: FakeEngine, engine: Engine, name: str, path: Path) -> None:
    load_verified([engine], name, path, "tiny")
    load_verified([engine], name, path, "tiny")
    assert fake.adapters == {name: str(path)}
    assert fake.loads == [name]


def test_an_engine_that_rounds_otherwise_is_believed(fake: FakeEngine, engine: Engine, name: str, path: Path) -> None:
    fake.noise = 0.05
    load_verified([engine], name, path, "tiny")
    fake.noise = 0.3
    with pytest.raises(PublishFailed, match=r"its base is 0\.3000 nats per token away"):
        load_verified([engine], name, path, "tiny")


def test_a_name_that_stands_for_other_files_is_refused(fake: FakeEngine, engine: Engine, name: str, path: Path) -> None:
    fake.adapters[name] = "/somewhere/else"
    with pytest.raises(PublishFailed, match="served from /somewhere/else"):
        load_verified([engine], name, path, "tiny")
    assert fake.adapters == {name: "/somewhere/else"}


def test_an_engine_that_only_says_it_loaded_is_found_out(
    fake: FakeEngine, engine: Engine, name: str, path: Path
) -> None:
    fake.forgets_loads = True
    with pytest.raises(PublishFailed, match="served from nowhere"):
        load_verified([engine], name, path, "tiny")


def test_an_engine_that_lists_the_adapter_and_serves_the_base_is_found_out(
    fake: FakeEngine, engine: Engine, name: str, path: Path
) -> None:
    fake.ignores_weights = True
    with pytest.raises(PublishFailed, match="answers exactly as the base does; its weights are not in effect"):
        load_verified([engine], name, path, "tiny")
    assert fake.adapters == {}, "what is not served as it was trained is not left there"


@pytest.mark.parametrize("whose", ["parent", "another"])
def test_an_engine_that_serves_another_adapter_under_the_name_is_found_out(
    fake: FakeEngine, engine: Engine, name: str, path: Path, tmp_path: Path, whose: str
) -> None:
    other = sealed_adapter(tmp_path / "others", seed=2.0)
    load_verified([engine], other.name, other.path, "tiny")
    fake.answers_as[name] = other.name if whose == "another" else whose
    with pytest.raises(PublishFailed, match="is not served as it was trained"):
        load_verified([engine], name, path, "tiny")
    assert set(fake.adapters) == {other.name}


def test_one_replica_of_three_that_lies_stops_the_publishing(name: str, path: Path) -> None:
    fakes = [FakeEngine(), FakeEngine(answers_as={name: "base"}), FakeEngine()]
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(Engine(stack.enter_context(serving(one)).url))) for one in fakes]
        with pytest.raises(PublishFailed, match=fakes[1].url):
            load_verified(engines, name, path, "tiny")
        assert fakes[1].adapters == {}
        fakes[1].answers_as.clear()
        load_verified(engines, name, path, "tiny")
        assert [one.adapters for one in fakes] == [{name: str(path)}] * 3


def test_files_that_are_not_those_that_were_sealed_reach_no_engine(
    fake: FakeEngine, engine: Engine, adapter: Adapter
) -> None:
    for given in ({"sha256": "0" * 64}, {"max_rank": 4}):
        with pytest.raises(BadAdapter):
            load_verified([engine], adapter.name, adapter.path, "tiny", **given)
    (adapter.path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(BadAdapter, match="is a pickle"):
        load_verified([engine], adapter.name, adapter.path, "tiny")
    assert fake.loads == []


def test_without_its_files_an_adapter_is_only_looked_at(fake: FakeEngine, engine: Engine, adapter: Adapter) -> None:
    fingerprint = fingerprint_of(adapter.manifest)
    with pytest.raises(PublishFailed, match=r"from nowhere, and .* cannot be looked through from here"):
        prove_loaded([engine], adapter.name, adapter.path, "tiny", fingerprint)
    assert fake.loads == []
    engine.load(adapter.name, adapter.path)
    prove_loaded([engine], adapter.name, adapter.path, "tiny", fingerprint)
    fake.ignores_weights = True
    with pytest.raises(PublishFailed, match="not in effect"):
        prove_loaded([engine], adapter.name, adapter.path, "tiny", fingerprint)


def test_an_adapter_without_fingerprint_must_at_least_change_something(
    fake: FakeEngine, engine: Engine, name: str, path: Path
) -> None:
    engine.load(name, path)
    prove_loaded([engine], name, path, "tiny", None)
    fake.ignores_weights = True
    with pytest.raises(PublishFailed, match="answers exactly as tiny does"):
        prove_loaded([engine], name, path, "tiny", None)


def test_a_refusal_is_passed_on_with_its_reason(fake: FakeEngine, engine: Engine, name: str, path: Path) -> None:
    fake.refuses = True
    with pytest.raises(PublishFailed, match="rank 64 is greater"):
        load_verified([engine], name, path, "tiny")


@pytest.mark.parametrize("trouble", ["fails", "forgets", "serves another", "serves other files"])
def test_what_may_pass_ends_with_the_exit_code_after_which_a_job_tries_again(
    fake: FakeEngine, engine: Engine, name: str, path: Path, trouble: str
) -> None:
    fake.refuses, fake.forgets_loads = trouble == "fails", trouble == "forgets"
    fake.ignores_weights = trouble == "serves another"
    fake.adapters |= {name: "/somewhere/else"} if trouble == "serves other files" else {}
    with pytest.raises(PublishFailed) as raised:
        load_verified([engine], name, path, "tiny")
    assert raised.value.exit_code == (3 if trouble in ("fails", "forgets") else 1)


def test_an_adapter_that_is_forgotten_before_it_is_proven_may_be_tried_again(engine: Engine, adapter: Adapter) -> None:
    """As by an engine that is started again between loading and proving: it answers 404."""
    with pytest.raises(NotNow) as raised:
        verify(engine, adapter.name, "tiny", fingerprint_of(adapter.manifest))
    assert raised.value.exit_code == 3


def test_a_hanging_engine_is_unreachable(fake: FakeEngine, name: str, path: Path) -> None:
    fake.delay_s = 1.0
    with closing(Engine(fake.url, answer_timeout_s=0.05)) as impatient, pytest.raises(Unreachable) as caught:
        load_verified([impatient], name, path, "tiny")
    assert caught.value.exit_code == 3


def test_unloading_twice_is_fine(fake: FakeEngine, engine: Engine, name: str, path: Path) -> None:
    engine.load(name, path)
    unload_everywhere([engine, engine], name)
    assert fake.adapters == {}
    assert fake.unloads == [name]


def test_what_is_in_use_is_what_the_engine_s_metrics_say(fake: FakeEngine, engine: Engine) -> None:
    assert engine.adapters_in_use() == frozenset()
    fake.in_use |= {"one", "two"}
    assert engine.adapters_in_use() == {"one", "two"}
