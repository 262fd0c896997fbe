"""Of several holders one holds, and every change of hands is a new epoch."""

from __future__ import annotations

import itertools
import threading

import pytest
import sqlalchemy as sa

from pawl import leases
from pawl.database import Database
from pawl.errors import NegativeVerdict
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
