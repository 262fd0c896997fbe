"""Leases with fencing epochs: of several processes one holds a duty, and a late write of an old holder can be told."""

from __future__ import annotations

import sqlalchemy as sa

from pawl.database import Database
from pawl.schema import leases


def acquire(database: Database, name: str, holder: str, *, ttl_s: float, now: float) -> int | None:
    """Take or renew a lease; return its epoch, or None while another process holds it.

    The epoch grows by one whenever the holder changes. Every side effect carries it, so that a holder which slept
    through its lease is recognised when it writes.
    """
    with database.write() as connection:
        current = connection.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).first()
        if current is None:
            row = {"name": name, "holder": holder, "epoch": 1, "expires_at": now + ttl_s}
            return 1 if database.insert_new(connection, leases, [row]) else None
        if current.holder != holder and current.expires_at > now:
            return None
        epoch = int(current.epoch) + int(current.holder != holder)
        values = {"holder": holder, "epoch": epoch, "expires_at": now + ttl_s}
        connection.execute(leases.update().where(leases.c.name == name).values(**values))
        return epoch


def release(database: Database, name: str, holder: str) -> None:
    """Let another process have it at once."""
    with database.write() as connection:
        mine = sa.and_(leases.c.name == name, leases.c.holder == holder)
        connection.execute(leases.update().where(mine).values(expires_at=0.0))


def epoch_of(database: Database, name: str) -> int:
    """The epoch in force, for a person who acts beside the holder; 0 when nobody has held the lease yet."""
    with database.read() as connection:
        epoch = connection.execute(sa.select(leases.c.epoch).where(leases.c.name == name)).scalar()
    return int(epoch or 0)
