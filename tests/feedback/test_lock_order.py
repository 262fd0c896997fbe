"""Whoever removes rows and whoever judges them lock them in one order, so neither waits for the other for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from feedback.retention import Limits, prune
from feedback.tombstones import Subject
from pawl.database import Database, open_database
from pawl.schema import interactions
from pawl.settings import DatabaseSettings
from tests.feedback.people import eraser
from tests.pawl.records import interaction_id, save, served
from tests.servers import PostgreSQL
from tests.serving.waiting import eventually

ANN = Subject("ann")
FIRST, LAST = interaction_id(1), interaction_id(2)


def forget_everything(database: Database, _directory: Path) -> None:
    prune(database, Limits(1.0, None, None), 1e9, batch_rows=10, max_batches=10)


def erase_ann(database: Database, directory: Path) -> None:
    at_work = eraser(database, directory)
    at_work.erase(at_work.bury(at_work.tombstone(ANN, "")), ANN)


@pytest.mark.parametrize("remove", [forget_everything, erase_ann])
def test_judging_and_removal_of_the_same_rows_both_end(
    postgresql: PostgreSQL, postgresql_template: str, tmp_path: Path, remove: Callable[[Database, Path], None]
) -> None:
    """The rows lie in the table in the other order, in which a plain statement would lock them."""
    url = postgresql.create_database("lock_order_" + remove.__name__, postgresql_template)
    database = open_database(DatabaseSettings(url=url))
    save(database, [served(2)])
    save(database, [served(1)])
    failures: list[BaseException] = []

    def go() -> None:
        try:
            remove(database, tmp_path)
        except BaseException as exc:  # noqa: BLE001 - told to the test
            failures.append(exc)

    remover = threading.Thread(target=go)
    with database.write() as connection:
        hold_row(connection, FIRST)
        remover.start()
        eventually(lambda: waits_for_a_lock(database) or not remover.is_alive(), within_s=60)
        hold_row(connection, LAST)
    remover.join(60)
    assert not remover.is_alive()
    assert failures == []
    database.close()


def hold_row(connection: sa.Connection, row_id: str) -> None:
    """What a judge holds of both answers until the verdict is there."""
    query = sa.select(interactions.c.id).where(interactions.c.id == row_id).with_for_update(read=True)
    assert connection.execute(query).scalars().all() == [row_id]


def waits_for_a_lock(database: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with database.read() as connection:
        return bool(connection.execute(sa.text(query)).scalar())
