"""Every query on what is used of limits: the shared database's side of `serving.database_limits`.

One row per limit and subject, locked for as long as a grant takes; concurrency is the sum of the slots that processes
hold on leases, which lapse when a process is gone. All asked for is granted, or nothing is charged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from pawl.database import Database
from pawl.schema import limit_slots, limit_windows
from serving.limits import end_of_window

PARTS = 64
"""So many parts a large limit is handed out in."""
SMALLEST_PART = 8
"""A limit whose parts would be smaller is handed out unit by unit."""
KEEP_ENDED_S = 3600.0
NEVER_USED = 0.0


class Ask(NamedTuple):
    """What a process wants of one limit."""

    subject: str
    name: str
    limit: int
    length_s: float
    cost: int
    held: int
    """What it still has of an earlier grant; counts if that was in the same window."""
    held_ends_at: float

    @property
    def is_for_slots(self) -> bool:
        return math.isinf(self.length_s)


class Grant(NamedTuple):
    """What it gets: new units, beside those it holds if the window is the same."""

    units: int
    elsewhere: int
    """What is left for everybody after this."""
    ends_at: float


class Short(NamedTuple):
    """Which ask stands against the request; nothing was charged."""

    position: int
    elsewhere: int
    ends_at: float


class Report(NamedTuple):
    """What a process gives back of one limit, or with `units` below 0, what it owes."""

    subject: str
    name: str
    length_s: float
    units: int
    ends_at: float


class Window(NamedTuple):
    """What is used of a limit, until the window ends."""

    used: int
    ends_at: float


class Lease(NamedTuple):
    """How many slots of one limit a process holds, in use or not."""

    subject: str
    n_slots: int


class _Refused(Exception):
    """Ends the transaction, so that nothing is charged."""

    def __init__(self, short: Short) -> None:
        super().__init__(short)
        self.short = short


def current(window: Window, length_s: float, now: float) -> Window:
    """The window that is open now: this one, or a new one."""
    return window if now < window.ends_at else Window(0, end_of_window(length_s, now))


def part_of(limit: int) -> int:
    """How much of a limit a process may have in hand without using it.

    >>> part_of(10), part_of(6400)
    (0, 100)
    """
    part = limit // PARTS
    return part if part >= SMALLEST_PART else 0


def share(limit: int, left: int, needed: int) -> int:
    """How much to grant at once to a process that needs so much.

    >>> share(10, 10, 1), share(6400, 6400, 1), share(6400, 30, 1)
    (1, 100, 30)
    """
    return max(needed, min(part_of(limit), left))


def take(
    database: Database, asks: Sequence[Ask], *, holder: str, now: float, slots_expire_at: float
) -> list[Grant] | Short:
    """Grant every ask, in their order, or none."""
    try:
        with database.write() as connection:
            _commit_lazily(database, connection)
            windows = _lock_windows(database, connection, [(ask.subject, ask.name) for ask in asks])
            return [
                _take_slots(database, connection, index, ask, holder, now, slots_expire_at)
                if ask.is_for_slots
                else _take_units(connection, index, ask, windows[ask.subject, ask.name], now)
                for index, ask in enumerate(asks)
            ]
    except _Refused as exc:
        return exc.short


def _take_units(connection: sa.Connection, index: int, ask: Ask, window: Window, now: float) -> Grant:
    window = current(window, ask.length_s, now)
    left = ask.limit - window.used
    held = ask.held if ask.held_ends_at == window.ends_at else min(ask.held, 0)
    needed = max(0, ask.cost - held)
    if left < needed:
        raise _Refused(Short(index, left, window.ends_at))
    units = share(ask.limit, left, needed)
    _save_window(connection, ask.subject, ask.name, Window(window.used + units, window.ends_at))
    return Grant(units, left - units, window.ends_at)


def _take_slots(
    database: Database,
    connection: sa.Connection,
    index: int,
    ask: Ask,
    holder: str,
    now: float,
    expires_at: float,
) -> Grant:
    """Slots are counted anew each time, without those of processes that have not renewed theirs."""
    here = limit_slots.c.subject == ask.subject
    connection.execute(limit_slots.delete().where(here, limit_slots.c.expires_at <= now))
    rows = connection.execute(sa.select(limit_slots.c.holder, limit_slots.c.n_slots).where(here)).all()
    held = {row.holder: int(row.n_slots) for row in rows}
    left = ask.limit - sum(held.values())
    needed = max(0, ask.cost - ask.held)
    if left < needed:
        raise _Refused(Short(index, left, math.inf))
    units = share(ask.limit, left, needed)
    _save_slots(database, connection, ask.subject, holder, held.get(holder, 0) + units, expires_at)
    return Grant(units, left - units, math.inf)


def report(database: Database, reports: Sequence[Report], *, now: float) -> bool:
    """Take back what processes give back to the window it came from, and charge what they owe to the one open now."""
    with database.write() as connection:
        _commit_lazily(database, connection)
        windows = _lock_windows(database, connection, [(each.subject, each.name) for each in reports])
        for each in reports:
            window = current(windows[each.subject, each.name], each.length_s, now)
            if each.units < 0 or each.ends_at == window.ends_at:
                window = Window(max(0, window.used - each.units), window.ends_at)
                windows[each.subject, each.name] = window  # The next report may be on the same one.
                _save_window(connection, each.subject, each.name, window)
    return True


def hold_slots(database: Database, leases: Sequence[Lease], *, holder: str, expires_at: float) -> bool:
    """Say how many slots a process holds of each limit, and until when that is to be believed."""
    with database.write() as connection:
        _commit_lazily(database, connection)
        known = _lock_slots(connection, [lease.subject for lease in leases], holder)
        mine = limit_slots.c.holder == holder
        if gone := [lease.subject for lease in leases if not lease.n_slots]:
            connection.execute(limit_slots.delete().where(mine, limit_slots.c.subject.in_(gone)))
        kept = [lease for lease in leases if lease.n_slots]
        if renewed := [{"of": lease.subject, "n": lease.n_slots} for lease in kept if lease.subject in known]:
            row = limit_slots.update().where(mine, limit_slots.c.subject == sa.bindparam("of"))
            connection.execute(row.values(n_slots=sa.bindparam("n"), expires_at=expires_at), renewed)
        for lease in kept:
            if lease.subject not in known:  # It lapsed, or was lent while the database was away.
                _save_slots(database, connection, lease.subject, holder, lease.n_slots, expires_at)
    return True


def forget_ended(database: Database, now: float) -> bool:
    """Delete what no longer counts."""
    with database.write() as connection:
        connection.execute(limit_windows.delete().where(limit_windows.c.ends_at < now - KEEP_ENDED_S))
        connection.execute(limit_slots.delete().where(limit_slots.c.expires_at < now - KEEP_ENDED_S))
    return True


def _lock_windows(
    database: Database, connection: sa.Connection, names: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Window]:
    """The rows, made where they are missing and locked in one order, so that nobody waits in a circle."""
    columns = sa.tuple_(limit_windows.c.subject, limit_windows.c.name)
    query = sa.select(limit_windows).where(columns.in_(sorted(names)))
    ordered = query.order_by(limit_windows.c.subject, limit_windows.c.name).with_for_update()
    while True:  # Twice at most, unless `forget_ended` takes a row in between.
        rows = connection.execute(ordered).all()
        found = {(row.subject, row.name): Window(int(row.used), float(row.ends_at)) for row in rows}
        missing = sorted(set(names) - found.keys())
        if not missing:
            return found
        fresh = [{"subject": subject, "name": name, "used": 0, "ends_at": NEVER_USED} for subject, name in missing]
        database.insert_new(connection, limit_windows, fresh)


def _lock_slots(connection: sa.Connection, subjects: Sequence[str], holder: str) -> set[str]:
    """The subjects of which the process has rows, locked in the order in which `take` comes by them."""
    mine = sa.and_(limit_slots.c.holder == holder, limit_slots.c.subject.in_(sorted(subjects)))
    query = sa.select(limit_slots.c.subject).where(mine).order_by(limit_slots.c.subject).with_for_update()
    return set(connection.execute(query).scalars())


def _save_window(connection: sa.Connection, subject: str, name: str, window: Window) -> None:
    mine = sa.and_(limit_windows.c.subject == subject, limit_windows.c.name == name)
    connection.execute(limit_windows.update().where(mine).values(used=window.used, ends_at=window.ends_at))


def _save_slots(
    database: Database, connection: sa.Connection, subject: str, holder: str, n_slots: int, expires_at: float
) -> None:
    values = {"n_slots": n_slots, "expires_at": expires_at}
    mine = sa.and_(limit_slots.c.subject == subject, limit_slots.c.holder == holder)
    if n_slots == 0:
        connection.execute(limit_slots.delete().where(mine))
    elif not database.insert_new(connection, limit_slots, [{"subject": subject, "holder": holder, **values}]):
        connection.execute(limit_slots.update().where(mine).values(**values))


def _commit_lazily(database: Database, connection: sa.Connection) -> None:
    """Do not wait for PostgreSQL's disk: after a crash of the server a moment's counting may be missing."""
    if not database.is_sqlite:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
