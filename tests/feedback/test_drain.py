"""The drain: everything arrives once, however often it is interrupted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.drain import BATCH, Drain
from feedback.errors import SpoolUnavailable
from feedback.interactions import FeedbackEvent, Interaction
from feedback.recording import event_to_json, exchange_to_json
from feedback.spool import Connection, Spool, SpoolRecord
from pawl.database import Database, open_database, upgrade
from pawl.schema import dead_letters, feedback_events, interactions
from pawl.settings import DatabaseSettings
from tests.feedback.test_recording import exchange, request_of, whole
from tests.serving.waiting import eventually

WAIT_S = 30.0


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db")
    yield spool
    spool.close()


def interaction_record(number: int, **changes: Any) -> SpoolRecord:
    name = f"{number:048x}"
    meta = exchange_to_json(exchange(id=name, completion_id=f"chatcmpl-{name}", **changes))
    return SpoolRecord(0, "interaction", name, name, 1.0, meta, request_of(f"question {number}"), whole("answer"))


def feedback_record(number: int) -> SpoolRecord:
    name = f"{number:032x}"
    event = FeedbackEvent(
        name, f"fb_thumbs_{number}", f"{number:048x}", "c", "thumbs", "up", False, None, None, None, "", None, 1.0
    )
    return SpoolRecord(0, "feedback", name, event.feedback_id, 1.0, event_to_json(event), None, None)


def fill(spool: Spool, *records: SpoolRecord) -> None:
    for future in [spool.append(record) for record in records]:
        future.result(WAIT_S)


def rows_waiting(spool: Spool) -> int:
    return spool.size().result(WAIT_S).rows


def count(database: Database, table: sa.Table) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


class Tally:
    """What a drain reported."""

    def __init__(self) -> None:
        self.stored: list[Interaction] = []
        self.n_dead = 0

    def drain(self, spool: Spool, database: Database) -> Drain:
        return Drain(spool, database, clock=time.time, on_stored=self.stored.extend, on_dead_letters=self._bury)

    def _bury(self, n: int) -> None:
        self.n_dead += n


def test_everything_moves(spool: Spool, database: Database) -> None:
    fill(spool, *(interaction_record(n) for n in range(BATCH + 5)), *(feedback_record(n) for n in range(5)))
    tally = Tally()
    drain = tally.drain(spool, database)
    assert [drain.drain_once() for _ in range(3)] == [BATCH, 10, 0]
    assert rows_waiting(spool) == 0
    assert (count(database, interactions), count(database, feedback_events)) == (BATCH + 5, 5)
    assert len(tally.stored) == BATCH + 5


def test_a_crash_between_the_two_commits_doubles_nothing(
    spool: Spool, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(spool, *(interaction_record(n) for n in range(9)), feedback_record(1))
    drain = Tally().drain(spool, database)
    with monkeypatch.context() as crash:
        crash.setattr(spool, "discard", lambda _: spool.submit(_fail_like_a_disk))
        with pytest.raises(SpoolUnavailable):
            drain.drain_once()
    assert rows_waiting(spool) == 10
    drain.drain_once()
    assert (rows_waiting(spool), count(database, interactions), count(database, feedback_events)) == (0, 9, 1)


def _fail_like_a_disk(_: Connection) -> None:
    raise sqlite3.OperationalError("disk I/O error")


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(orders=st.lists(st.permutations(range(6)), min_size=1, max_size=3))
def test_replays_in_any_order_change_nothing(spool: Spool, database: Database, orders: list[list[int]]) -> None:
    records = [*(interaction_record(n) for n in range(3)), *(feedback_record(n) for n in range(3))]
    drain = Tally().drain(spool, database)
    for order in orders:
        fill(spool, *(records[position] for position in order))
        drain.drain_once()
    assert (rows_waiting(spool), count(database, interactions), count(database, feedback_events)) == (0, 3, 3)


POISON = {
    "meta that is no JSON": SpoolRecord(0, "interaction", "p" * 48, "p", 1.0, b"\xff{", b"secret\x00", b"x"),
    "meta of another version": SpoolRecord(0, "interaction", "p" * 48, "p", 1.0, b'{"new": 1}', b"secret", b"x"),
    "an event that is no JSON": SpoolRecord(0, "feedback", "p" * 32, "p", 1.0, b"secret", None, None),
    "a text in place of a number": interaction_record(99, latency_ms={"a": 1}),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=list(POISON))
def test_a_poisoned_row_is_put_aside_and_the_others_are_stored(
    spool: Spool, database: Database, poison: SpoolRecord
) -> None:
    healthy = [interaction_record(n) for n in range(99)]
    fill(spool, *healthy[:50], poison, *healthy[50:])
    tally = Tally()
    assert tally.drain(spool, database).drain_once() == 100
    assert (rows_waiting(spool), count(database, interactions)) == (0, 99)
    assert (tally.n_dead, len(tally.stored)) == (1, 99)
    with database.read() as connection:
        buried = connection.execute(sa.select(dead_letters)).one()
    assert buried.kind == poison.kind
    assert buried.reason
    assert poison.meta.decode("utf-8", "backslashreplace")[:4] in buried.payload


def test_a_row_that_only_postgresql_refuses(spool: Spool, database: Database) -> None:
    """A name longer than its column: SQLite takes it, PostgreSQL does not, and neither loses anything."""
    fill(spool, interaction_record(0), interaction_record(1, model="m" * 300), interaction_record(2))
    tally = Tally()
    tally.drain(spool, database).drain_once()
    n_refused = 0 if database.is_sqlite else 1
    assert rows_waiting(spool) == 0
    assert (count(database, interactions), count(database, dead_letters)) == (3 - n_refused, n_refused)
    assert tally.n_dead == n_refused


def test_a_database_without_its_schema_yet(spool: Spool, database_url: str) -> None:
    """`pawl serve` may start before `pawl db upgrade`: the rows wait, and none is taken for a bad one."""
    database = open_database(DatabaseSettings(url=database_url))
    tally = Tally()
    with running(tally.drain(spool, database)) as drain:
        fill(spool, interaction_record(0))
        drain.wake()
        eventually(lambda: not drain.is_database_up)
        upgrade(database)
        drain.wake()
        eventually(lambda: count(database, interactions) == 1)
    assert (rows_waiting(spool), tally.n_dead) == (0, 0)
    database.close()


@contextmanager
def running(drain: Drain) -> Iterator[Drain]:
    drain.start()
    try:
        yield drain
    finally:
        drain.stop(WAIT_S)


def test_a_database_that_goes_and_comes_back(spool: Spool, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Tally().drain(spool, database)) as drain:
        fill(spool, *(interaction_record(n) for n in range(5)))
        drain.wake()
        eventually(lambda: count(database, interactions) == 5)
        with monkeypatch.context() as outage:
            outage.setattr(Database, "write", _is_down)
            fill(spool, *(interaction_record(n) for n in range(5, 12)))
            drain.wake()
            eventually(lambda: not drain.is_database_up)
            assert rows_waiting(spool) == 7
        drain.wake()
        eventually(lambda: rows_waiting(spool) == 0)
        eventually(lambda: drain.is_database_up)
    assert count(database, interactions) == 12


def _is_down(_: Database) -> Any:
    raise sa.exc.OperationalError("connect", {}, Exception("connection refused"))


def test_an_error_nobody_foresaw_does_not_end_the_thread(
    spool: Spool, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Tally().drain(spool, database)) as drain:
        with monkeypatch.context() as odd:
            odd.setattr(Spool, "oldest", lambda *_: 1 / 0)
            drain.wake()
            eventually(lambda: drain._is_paused)
        fill(spool, interaction_record(0))
        drain.wake()
        eventually(lambda: count(database, interactions) == 1)


def test_stopping_empties_the_spool(spool: Spool, database: Database) -> None:
    fill(spool, *(interaction_record(n) for n in range(3 * BATCH)))
    drain = Tally().drain(spool, database)
    drain.start()
    drain.stop(WAIT_S)
    assert rows_waiting(spool) == 0
    assert count(database, interactions) == 3 * BATCH


def test_stopping_empties_a_spool_of_large_records(
    spool: Spool, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.spool.MAX_TAKEN_BYTES", 1)
    fill(spool, *(interaction_record(n) for n in range(5)))
    drain = Tally().drain(spool, database)
    drain.start()
    drain.stop(WAIT_S)
    assert (rows_waiting(spool), count(database, interactions)) == (0, 5)
