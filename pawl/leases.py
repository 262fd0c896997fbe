"""Leases with fencing epochs: of several processes one holds a duty, and a late write of an old holder can be told."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import sqlalchemy as sa
import structlog

from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import NegativeVerdict, StaleWrite
from pawl.schema import leases

log = structlog.get_logger()

RENEWALS_PER_TTL = 3
POLL_S = 0.2
END_WAIT_S = 5.0
"""How long the end of a block waits for a renewal that is on its way: a database that hangs must not hold it up."""


class FencedDatabase(Database):
    """The same database for the holder of a lease: every write proves, in its own transaction, that it still holds it.

    A holder that slept through its lease writes nothing more once another has taken it. One that is merely late goes
    on: nobody else has written meanwhile. Reads are free.
    """

    def __init__(self, database: Database, lease: str, epoch: int) -> None:
        super().__init__(database.engine)
        self.lease = lease
        self.epoch = epoch

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction of the lease's epoch.

        Raises:
            StaleWrite: another process has had the lease since; nothing is written.
        """
        with super().write() as connection:
            require(connection, self.lease, self.epoch)
            yield connection


def require(connection: sa.Connection, name: str, epoch: int) -> None:
    """Make sure, until the transaction ends, that a lease is in this epoch.

    The lock keeps others from taking the lease (`acquire` locks the row for itself), not the holder from renewing it.

    Raises:
        StaleWrite: another process has had it since.
    """
    query = sa.select(leases.c.epoch, leases.c.holder).where(leases.c.name == name)
    found = connection.execute(query.with_for_update(read=True, key_share=True)).first()
    if found is None or int(found.epoch) != epoch:
        holder = "nobody" if found is None else found.holder
        raise StaleWrite(f"{name} has passed to {holder} meanwhile: nothing of this process is written any more")


def this_process() -> str:
    """The name under which this process holds leases, and no other ever: not even one of the same host name and number,
    such as the pod that replaces this one while it lives on, unseen, on a node that is cut off."""
    return f"{socket.gethostname()}:{os.getpid()}:{_birthmark(os.getpid())}"


@cache
def _birthmark(_pid: int) -> str:
    """Another one after a fork."""
    return secrets.token_hex(4)


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


def acquire_patiently(
    database: Database, name: str, holder: str, *, ttl_s: float, clock: Clock, patience_s: float
) -> int | None:
    """As `acquire`, but wait for a lease that runs out: its holder may have been killed. One that renews it was not.

    Args:
        patience_s: a lease that lasts longer than this is not waited for.
    """
    expires_at = expiry(database, name)
    while (epoch := acquire(database, name, holder, ttl_s=ttl_s, now=clock())) is None:
        now_expires_at = expiry(database, name)
        if now_expires_at > expires_at or now_expires_at - clock() > patience_s:
            return None
        time.sleep(POLL_S)
    return epoch


def expiry(database: Database, name: str) -> float:
    """When a lease runs out, or ran out; 0 when nobody ever had it, or it was given back."""
    with database.read() as connection:
        expires_at = connection.execute(sa.select(leases.c.expires_at).where(leases.c.name == name)).scalar()
    return float(expires_at or 0.0)


@contextmanager
def held(
    database: Database, name: str, holder: str, *, ttl_s: float, clock: Clock, patience_s: float = 0.0
) -> Iterator[int]:
    """Hold a lease for the length of a block, which gets its epoch; a thread renews it meanwhile.

    A lease that is lost all the same ends nothing here: what the block writes carries its epoch and is refused.

    Args:
        patience_s: how long to wait for a holder that seems to be dead.

    Raises:
        NegativeVerdict: another process holds it.
    """
    epoch = acquire_patiently(database, name, holder, ttl_s=ttl_s, clock=clock, patience_s=patience_s)
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
        keeper.join(END_WAIT_S)
        _let_go(database, name, holder)


def _let_go(database: Database, name: str, holder: str) -> None:
    """Release at the end of a block, whose own error must not be hidden by a database that is away."""
    try:
        release(database, name, holder)
    except sa.exc.SQLAlchemyError as exc:
        log.warning("lease_not_released", lease=name, reason=type(exc).__name__)


def holder_of(database: Database, name: str) -> str | None:
    """Who had a lease last."""
    with database.read() as connection:
        holder = connection.execute(sa.select(leases.c.holder).where(leases.c.name == name)).scalar()
    return str(holder) if holder is not None else None


def holding(database: Database, name: str, now: float) -> str | None:
    """Who has a lease that has not run out."""
    alive = sa.and_(leases.c.name == name, leases.c.expires_at > now)
    with database.read() as connection:
        holder = connection.execute(sa.select(leases.c.holder).where(alive)).scalar()
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
