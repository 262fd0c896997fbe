"""Who makes pairs of stored texts and who removes such texts take turns, so that no pair outlives its text.

Either works in a transaction: the one looks whether texts are still there and adds pairs of them, the other removes
texts and the pairs of them. At the same time neither would see what the other is about to commit.

On PostgreSQL an advisory lock keeps them apart: miners share it, whoever removes texts has it alone and passes the
miners that come after. To lock the rows would do as well, but is written into each of them, and so into the
write-ahead log. SQLite has one writer at a time anyhow.

Both take it before they lock any row, so that nobody who holds one waits for it; and in a statement of its own, for a
statement sees what was committed when it began, not when it was done waiting.
"""

from __future__ import annotations

import sqlalchemy as sa

TEXT_LOCK = 4471902683
MINER_PATIENCE_S = 100
"""A pass that runs unattended must not end because an erasure takes its time; less than any statement may take."""


def hold_off_removal(connection: sa.Connection) -> None:
    """Until this transaction ends no text of an interaction goes; who wants to remove some then sees what it added."""
    _lock(connection, f"SELECT pg_advisory_xact_lock_shared({TEXT_LOCK})", MINER_PATIENCE_S)


def hold_off_mining(connection: sa.Connection, patience_s: int | None = None) -> None:
    """Until this transaction ends no pair is added; those of whoever was at it are there to be seen.

    Args:
        patience_s: None: as long as for any lock.
    """
    _lock(connection, f"SELECT pg_advisory_xact_lock({TEXT_LOCK})", patience_s)


def _lock(connection: sa.Connection, statement: str, patience_s: int | None) -> None:
    if connection.dialect.name != "postgresql":
        return
    if patience_s is not None:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{patience_s}s'")
    connection.exec_driver_sql(statement)
    if patience_s is not None:
        connection.exec_driver_sql("SET LOCAL lock_timeout TO DEFAULT")
