"""What deleting leaves in a database's files, and how it is got rid of.

Neither database overwrites what it deletes. SQLite keeps it in free pages; PostgreSQL keeps dead rows until a vacuum,
and even then their bytes stay in the page until something else needs the room. Only writing a table anew leaves
nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
import structlog

from pawl.database import Database

log = structlog.get_logger()

PERSONAL_TABLES = (
    "interactions", "feedback_events", "scores", "judge_verdicts", "shadow_answers", "pairs", "dead_letters",
    "limit_windows", "limit_slots",
)  # fmt: skip
"""Where rows are of people."""
LOCK_WAIT_S = 60
CHECKPOINT_ATTEMPTS = 100


def reclaim(database: Database, *, is_rewriting: bool, pause: Callable[[float], None]) -> None:
    """Take what was deleted out of the files.

    Args:
        is_rewriting: Write the tables anew. PostgreSQL locks each one meanwhile: records wait in the gateways' spools.
            Without it what was deleted is out of reach of every query, but not yet of somebody who has the disk.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: somebody held on to a table for too long, or there is no room for a second copy.
    """
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if database.is_sqlite:
            _reclaim_sqlite(connection, is_rewriting=is_rewriting, pause=pause)
        else:
            _reclaim_postgresql(connection, is_rewriting=is_rewriting)


def _reclaim_sqlite(connection: sa.Connection, *, is_rewriting: bool, pause: Callable[[float], None]) -> None:
    if is_rewriting:
        connection.exec_driver_sql("VACUUM")
    for _ in range(CHECKPOINT_ATTEMPTS):  # A reader may need the log for a moment; nothing to do in a rollback journal.
        is_busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
        if not is_busy:
            return
        pause(0.1)
    log.warning("erasure_log_in_use")


def _reclaim_postgresql(connection: sa.Connection, *, is_rewriting: bool) -> None:
    vacuum = "VACUUM (FULL)" if is_rewriting else "VACUUM"
    connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_WAIT_S}s'")
    connection.exec_driver_sql("SET statement_timeout = 0")
    try:
        for table in PERSONAL_TABLES:
            connection.exec_driver_sql(f"{vacuum} {table}")
    finally:
        connection.exec_driver_sql("RESET lock_timeout")
        connection.exec_driver_sql("RESET statement_timeout")
