"""Who makes pairs of stored texts and who removes such texts take turns, so that no pair outlives its text.

Either works in a transaction: the one looks whether texts are still there and adds pairs of them, the other removes
texts and the pairs of them. At the same time neither would see what the other is about to commit.

On PostgreSQL an advisory lock keeps them apart: miners share it, whoever removes texts has it alone and passes the
miners that come after. To lock the rows would do as well, but is written into them: that made 600 MB of write-ahead log
of a first pass over a million interactions. SQLite has one writer at a time anyhow.

Both take it before they lock any row, so that nobody who holds one waits for it; and in a statement of its own, for a
statement sees what was committed when it began, not when it was done waiting.
"""

from __future__ import annotations

import sqlalchemy as sa

TEXT_LOCK = 4471902683


def hold_off_removal(connection: sa.Connection) -> None:
    """Until this transaction ends no text of an interaction goes; who wants to remove some then sees what it added."""
    _lock(connection, f"SELECT pg_advisory_xact_lock_shared({TEXT_LOCK})")


def hold_off_mining(connection: sa.Connection) -> None:
    """Until this transaction ends no pair is added; those of whoever was at it are there to be seen."""
    _lock(connection, f"SELECT pg_advisory_xact_lock({TEXT_LOCK})")


def _lock(connection: sa.Connection, statement: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(statement)
