"""Leases with fencing epochs: of several processes one holds a duty, and a late write of an old holder can be told."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
import structlog

from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.schema import leases

log = structlog.get_logger()

RENEWALS_PER_TTL = 3


def this_process() -> str:
    """The name under which this process holds leases."""
    return f"{socket.gethostname()}:{os.getpid()}"


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


def renew(database: Database, name: str, holder: str, epoch: int, *, ttl_s: float, now: float) -> bool:
    """Keep a lease that is still held in this epoch; False when another process has had it since."""
    with database.write() as connection:
        mine = sa.and_(leases.c.name == name, leases.c.holder == holder, leases.c.epoch == epoch)
        return connection.execute(leases.update().where(mine).values(expires_at=now + ttl_s)).rowcount == 1


@contextmanager
def held(database: Database, name: str, holder: str, *, ttl_s: float, clock: Clock) -> Iterator[int]:
    """Hold a lease for the length of a block, which gets its epoch; a thread renews it meanwhile.

    A lease that is lost all the same ends nothing here: what the block writes carries its epoch and is refused.

    Raises:
        NegativeVerdict: another process holds it.
    """
    epoch = acquire(database, name, holder, ttl_s=ttl_s, now=clock())
    if epoch is None:
        raise NegativeVerdict(f"another process holds {name}: {holder_of(database, name)}")
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(ttl_s / RENEWALS_PER_TTL):
            try:
                if not renew(database, name, holder, epoch, ttl_s=ttl_s, now=clock()):
                    log.warning("lease_lost", lease=name)
                    return
            except sa.exc.SQLAlchemyError as exc:
                log.warning("lease_not_renewed", lease=name, reason=type(exc).__name__)

    keeper = threading.Thread(target=keep, name=f"lease {name}", daemon=True)
    keeper.start()
    try:
        yield epoch
    finally:
        is_over.set()
        keeper.join()
        release(database, name, holder)


def holder_of(database: Database, name: str) -> str | None:
    """Who had a lease last."""
    with database.read() as connection:
        holder = connection.execute(sa.select(leases.c.holder).where(leases.c.name == name)).scalar()
    return str(holder) if holder is not None else None


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
