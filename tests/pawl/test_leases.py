"""Of several holders one holds, and every change of hands is a new epoch."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time

import pytest
import sqlalchemy as sa

from pawl import leases
from pawl.database import Database
from pawl.errors import NegativeVerdict, StaleWrite
from pawl.schema import leases as table
from tests.serving.waiting import eventually

NAME = "rollout/assistant"


def take(database: Database, holder: str, now: float, ttl_s: float = 10.0) -> int | None:
    return leases.acquire(database, NAME, holder, ttl_s=ttl_s, now=now)


def test_one_holds_while_the_other_waits(database: Database) -> None:
    assert leases.epoch_of(database, NAME) == 0
    assert take(database, "a", 0.0) == 1
    assert take(database, "b", 9.9) is None
    assert take(database, "a", 9.9) == 1
    assert take(database, "b", 19.8) is None
    assert leases.epoch_of(database, NAME) == 1


def test_an_expired_lease_changes_hands_with_a_new_epoch(database: Database) -> None:
    epochs = [take(database, holder, now) for holder, now in (("a", 0.0), ("b", 10.0), ("a", 20.0), ("a", 40.0))]
    assert epochs == [1, 2, 3, 3]
    assert take(database, "b", 41.0) is None


def test_a_released_lease_is_free_at_once_but_only_its_holder_releases_it(database: Database) -> None:
    take(database, "a", 0.0)
    leases.release(database, NAME, "b")
    assert take(database, "b", 1.0) is None
    leases.release(database, NAME, "a")
    assert take(database, "b", 1.0) == 2


def test_leases_of_other_names_are_independent(database: Database) -> None:
    take(database, "a", 0.0)
    assert leases.acquire(database, "rollout/helper", "b", ttl_s=10.0, now=0.0) == 1


def test_a_held_lease_outlives_its_time_and_is_free_afterwards(database: Database) -> None:
    ticks = itertools.count()

    def clock() -> float:
        """A second later whenever somebody looks."""
        return float(next(ticks))

    with leases.held(database, NAME, "a", ttl_s=0.06, clock=clock) as epoch:
        assert epoch == 1
        eventually(lambda: next(ticks) >= 50 and expiry(database) > 1.06)
        assert not leases.renew(database, NAME, "b", epoch, ttl_s=10.0, now=0.0)
        with pytest.raises(NegativeVerdict, match="another process holds rollout/assistant: a"):
            leases.held(database, NAME, "b", ttl_s=10.0, clock=lambda: 0.0).__enter__()
    assert take(database, "b", 0.5) == 2


def test_a_lease_that_was_lost_is_not_taken_back(database: Database) -> None:
    assert take(database, "a", 0.0) == 1
    assert take(database, "b", 10.0) == 2
    assert take(database, "a", 20.0) == 3
    assert not leases.renew(database, NAME, "a", 1, ttl_s=10.0, now=21.0)
    assert leases.renew(database, NAME, "a", 3, ttl_s=10.0, now=21.0)
    assert take(database, "b", 30.9) is None


def expiry(database: Database) -> float:
    with database.read() as connection:
        return float(connection.execute(sa.select(table.c.expires_at).where(table.c.name == NAME)).scalar_one())


def race(database: Database, now: float, n: int = 6) -> list[int]:
    """The epochs of those that got it."""
    barrier, won = threading.Barrier(n), []

    def runner(number: int) -> None:
        barrier.wait(30)
        epoch = take(database, f"holder-{number}", now)
        if epoch is not None:
            won.append(epoch)

    threads = [threading.Thread(target=runner, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return won


def test_of_many_at_once_exactly_one_gets_it(database: Database) -> None:
    assert race(database, 0.0) == [1]
    assert race(database, 5.0) in ([], [1])
    assert len(race(database, 100.0)) == 1


def note(database: Database, text: str) -> None:
    """Something that a duty writes."""
    with database.write() as connection:
        database.insert_new(connection, table, [{"name": text, "holder": "-", "epoch": 1, "expires_at": 0.0}])


def is_noted(database: Database, text: str) -> bool:
    return leases.holder_of(database, text) is not None


def test_a_holder_that_slept_through_its_lease_writes_nothing_more(database: Database) -> None:
    epoch = take(database, "a", 0.0)
    ours = leases.FencedDatabase(database, NAME, epoch or 0)
    note(ours, "in time")
    note(leases.FencedDatabase(database, NAME, epoch or 0), "late, but nobody else came")
    assert take(database, "b", 100.0) == 2
    with pytest.raises(StaleWrite, match="rollout/assistant has passed to b"):
        note(ours, "too late")
    assert [is_noted(database, text) for text in ("in time", "late, but nobody else came", "too late")] == [
        True, True, False,
    ]  # fmt: skip
    assert ours.is_sqlite == database.is_sqlite


def test_nobody_takes_a_lease_while_its_holder_writes_but_the_holder_renews_it(database: Database) -> None:
    if database.is_sqlite:
        pytest.skip("one writer at a time is all that SQLite has")
    ours = leases.FencedDatabase(database, NAME, take(database, "a", 0.0, ttl_s=1.0) or 0)
    taken: list[int | None] = []
    other = threading.Thread(target=lambda: taken.append(take(database, "b", 100.0)))
    with ours.write():
        assert leases.renew(database, NAME, "a", ours.epoch, ttl_s=1.0, now=2.0)
        other.start()
        other.join(0.3)
        assert taken == []
    other.join(30)
    assert taken == [2]


def test_a_holder_that_comes_anew_every_second_leaves_nothing_at_the_pool(database: Database) -> None:
    before = len(list(database.engine.pool.dispatch.checkin))
    fenced = [leases.FencedDatabase(database, NAME, epoch) for epoch in range(5)]
    assert len(list(database.engine.pool.dispatch.checkin)) == before
    assert {one.engine for one in fenced} == {database.engine}


def test_a_lease_that_nobody_ever_had_lets_nobody_write(database: Database) -> None:
    with pytest.raises(StaleWrite, match="nobody"), leases.FencedDatabase(database, "none", 1).write():
        pass


def test_who_is_at_work_is_known_while_the_lease_lasts(database: Database) -> None:
    assert leases.holding(database, NAME, 0.0) is None
    take(database, "a", 0.0)
    assert (leases.holding(database, NAME, 9.9), leases.holding(database, NAME, 10.0)) == ("a", None)


def test_a_renewal_that_hangs_holds_up_no_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    is_hanging, may_end = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> bool:
        is_hanging.set()
        return may_end.wait(60)

    monkeypatch.setattr(leases, "renew", hang)
    monkeypatch.setattr(leases, "END_WAIT_S", 0.1)
    with leases.held(database, NAME, "a", ttl_s=0.03, clock=lambda: 0.0):
        assert is_hanging.wait(60)
    assert not may_end.is_set()
    may_end.set()
    assert take(database, "b", 0.0) == 2


def hold(database: Database, patience_s: float, now: float = 0.0) -> int:
    with leases.held(database, NAME, "b", ttl_s=10.0, clock=lambda: now, patience_s=patience_s) as epoch:
        return epoch


def test_a_lease_that_runs_out_is_waited_for_and_one_that_lasts_is_not(database: Database) -> None:
    take(database, "a", 0.0, ttl_s=20.0)
    with pytest.raises(NegativeVerdict, match="another process holds"):
        hold(database, patience_s=5.0)
    ticks = itertools.count()
    options = {"ttl_s": 10.0, "patience_s": 30.0}
    assert leases.acquire_patiently(database, NAME, "b", clock=lambda: float(next(ticks)), **options) == 2


def test_a_holder_that_renews_its_lease_is_alive_and_not_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(database, "a", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: leases.renew(database, NAME, "a", 1, ttl_s=11.0, now=0.0))
    with pytest.raises(NegativeVerdict, match="another process holds"):
        hold(database, patience_s=20.0)


def test_no_two_processes_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = leases.this_process()
    assert ours == leases.this_process()
    assert ours.startswith(f"{socket.gethostname()}:{os.getpid()}:")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    child = leases.this_process()
    leases._birthmark.cache_clear()
    assert leases.this_process() != child
