"""Replicas that forget, lie, hang and keep too much, put right without asking more of them than is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from pawl.adapter_files import Adapter
from pawl.engines import Engine
from pawl.reconciliation import PROOF, Desired, Reconciliation, Wanted, reconcile, reconcile_one
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import sealed_adapter

NOBODY: frozenset[str] = frozenset()


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Adapter, Adapter]:
    return sealed_adapter(tmp_path / "adapters"), sealed_adapter(tmp_path / "adapters", seed=2.0, number=43)


def wanted(*adapters: Adapter) -> Desired:
    return Desired(tuple(Wanted(one.name, one.path, "tiny", one.sha256) for one in adapters))


def put_right(fake: FakeEngine, desired: Desired, proven: frozenset[str] = NOBODY) -> Reconciliation:
    with closing(Engine(fake.url, answer_timeout_s=5.0)) as engine:
        return reconcile_one(engine, desired, proven, lambda _name: True, max_rank=32)


def reasons(done: Reconciliation) -> str:
    return "; ".join(failure.reason for failure in done.failures)


def test_a_restarted_replica_gets_its_adapters_back(fake: FakeEngine, adapters: tuple[Adapter, Adapter]) -> None:
    first, second = adapters
    done = put_right(fake, wanted(first, second))
    assert done.changes == ((first.name, "loaded"), (second.name, "loaded"))
    assert done.proven == {first.name, second.name}
    assert fake.adapters == {one.name: str(one.path) for one in adapters}
    again = put_right(fake, wanted(first, second), done.proven)
    assert (again.changes, again.failures, again.proven) == ((), (), done.proven)
    fake.adapters.clear()
    assert put_right(fake, wanted(first), done.proven).changes == ((first.name, "loaded"),)


def test_nothing_is_served_under_its_own_name_before_it_is_proven(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter]
) -> None:
    first, second = adapters
    fake.answers_as[PROOF + first.name] = "base"
    done = put_right(fake, wanted(first, second))
    assert "answers exactly as the base does" in reasons(done)
    assert first.name not in fake.loads
    assert set(fake.adapters) == {second.name}, "one that is served wrong keeps no other from being served"
    assert done.changes == ((first.name, "refused"), (second.name, "loaded"))


@pytest.mark.parametrize("whose", ["base", "parent"])
def test_what_is_found_there_is_proven_too_and_only_told_of_if_it_is_something_else(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter], whose: str
) -> None:
    first = adapters[0]
    fake.adapters[first.name] = str(first.path)
    assert put_right(fake, wanted(first)).proven == {first.name}
    fake.answers_as[first.name] = whose
    assert put_right(fake, wanted(first), frozenset({first.name})).proven == {first.name}, "not asked twice"
    done = put_right(fake, wanted(first))
    assert "not served as it was trained" in reasons(done)
    assert (done.proven, fake.adapters) == (NOBODY, {first.name: str(first.path)}), "it may be in use"


class Busy(FakeEngine):
    """Has no time to answer questions."""

    async def complete(self, _request: web.Request) -> web.Response:
        return web.Response(status=503, text="overloaded")


def test_what_users_are_served_by_is_not_taken_from_a_replica_that_is_busy(adapters: tuple[Adapter, Adapter]) -> None:
    first = adapters[0]
    with serving(Busy(adapters={first.name: str(first.path)})) as busy:
        done = put_right(busy, wanted(first))
    assert "503 overloaded" in reasons(done)
    assert (done.proven, busy.unloads) == (NOBODY, [])


def test_one_replica_of_three_that_lies_or_is_down_keeps_the_others_from_nothing(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter]
) -> None:
    first = adapters[0]
    with serving(FakeEngine()) as stopped:
        pass
    with serving(FakeEngine(forgets_loads=True)) as liar:
        urls = [stopped.url, liar.url, fake.url]
        done = reconcile({url: wanted(first) for url in urls}, {}, lambda _name: True)
    assert [one.engine for one in done] == urls
    assert [one.proven for one in done] == [NOBODY, NOBODY, {first.name}]
    assert "ConnectError" in reasons(done[0])
    assert "served from nowhere" in reasons(done[1])


def test_a_replica_that_hangs_is_left_alone_until_the_next_time(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter]
) -> None:
    with serving(FakeEngine(delay_s=3.0)) as hanging:
        desired = {url: wanted(*adapters) for url in (hanging.url, fake.url)}
        slow, quick = reconcile(desired, {}, lambda _name: True, answer_timeout_s=0.5)
        hanging.delay_s = 0.0
    assert {failure.name for failure in slow.failures} == {one.name for one in adapters}
    assert "Timeout" in reasons(slow)
    assert hanging.loads == []
    assert quick.engine == fake.url


def test_what_nobody_thought_of_at_one_replica_does_not_end_the_others(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter]
) -> None:
    fake.adapters["old"] = "/old"

    def broken(_name: str) -> bool:
        raise ZeroDivisionError

    with serving(FakeEngine()) as other:
        desired = {fake.url: Desired(unwanted=frozenset({"old"})), other.url: wanted(adapters[0])}
        first, second = reconcile(desired, {}, broken)
    assert not first.changes
    assert second.proven == {adapters[0].name}


def test_a_name_that_stands_for_other_files_is_left_alone(fake: FakeEngine, adapters: tuple[Adapter, Adapter]) -> None:
    fake.adapters[adapters[0].name] = "/somewhere/else"
    done = put_right(fake, wanted(adapters[0]))
    assert "served from /somewhere/else" in reasons(done)
    assert fake.adapters == {adapters[0].name: "/somewhere/else"}


def test_files_are_looked_through_before_every_load(fake: FakeEngine, adapters: tuple[Adapter, Adapter]) -> None:
    first = adapters[0]
    (first.path / "adapter_model.bin").write_bytes(b"\x80")
    assert "is a pickle" in reasons(put_right(fake, wanted(first)))
    assert fake.loads == []


def test_other_weights_than_those_registered_are_not_loaded(
    fake: FakeEngine, adapters: tuple[Adapter, Adapter]
) -> None:
    (one,) = wanted(adapters[0]).wanted
    done = put_right(fake, Desired((replace(one, sha256="0" * 64),)))
    assert "not the weights that were registered" in reasons(done)
    assert fake.loads == []


def test_what_is_no_longer_wanted_goes_once_nothing_runs_with_it(fake: FakeEngine) -> None:
    fake.adapters |= {"old": "/old", "older": "/older", "somebody-else-s": "/x"}
    fake.in_use.add("old")
    desired = Desired(unwanted=frozenset({"old", "older", "never-there"}))
    assert put_right(fake, desired).changes == (("older", "unloaded"),)
    fake.in_use.clear()
    assert put_right(fake, desired).changes == (("old", "unloaded"),)
    assert set(fake.adapters) == {"somebody-else-s"}


def test_what_was_taken_up_again_meanwhile_stays(fake: FakeEngine) -> None:
    fake.adapters["old"] = "/old"
    with closing(Engine(fake.url)) as engine:
        done = reconcile_one(engine, Desired(unwanted=frozenset({"old"})), NOBODY, lambda name: name != "old")
    assert (done.changes, fake.adapters) == ((), {"old": "/old"})


def test_a_trial_that_a_killed_worker_left_is_tidied(fake: FakeEngine) -> None:
    fake.adapters[PROOF + "x"] = "/x"
    put_right(fake, Desired())
    assert fake.adapters == {}
