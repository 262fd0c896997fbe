"""Tombstones in the shared database and in a file beside it, each a copy of the other.

Restoring an older backup of the database takes tombstones away just as it brings erased rows back. Every drain keeps
what it has seen in a file of its own machine and returns what the database lacks; there it counts as an erasure that
has still to be done, and a worker does it. The two are sets that only grow, so copying is all there is to merging.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
import structlog

from feedback.segment_files import opened
from feedback.tombstones import Erased, Tombstone
from pawl.clock import Clock
from pawl.database import Database
from pawl.durability import sync_directory
from pawl.schema import erasure_places, tombstones

log = structlog.get_logger()

FILE = "tombstones.jsonl"
ERASURE_LOCK = 5823440917
"""An advisory lock of PostgreSQL: whoever inserts records shares it, whoever adds a tombstone has it alone."""
FORGET_PLACE_S = 30 * 86400.0
LOOK_S = 2.0
HEARTBEAT_S = 60.0
PLACE_CHARS = 255


class Grave(NamedTuple):
    """A tombstone as the table has it."""

    number: int
    tombstone: Tombstone
    is_finished: bool
    report: dict[str, object]


class Fingerprint(NamedTuple):
    """Changes with the table, also when an older backup took its place."""

    number: int
    n_rows: int
    until: float


class TombstoneFile:
    """One JSON object per line, only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> set[Tombstone]:
        """What is there. A line that a power cut tore is left out, aloud."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return set()
        found = [_parsed(line) for line in lines if line.strip()]
        if None in found:
            log.error("tombstones_unreadable", path=str(self.path), lines=found.count(None))
        return {each for each in found if each is not None}

    def add(self, more: Iterable[Tombstone]) -> None:
        """Append what is not there; it is on disk afterwards. Two processes at once write a line twice, at worst."""
        new = sorted(set(more) - self.read())
        if not new:
            return
        text = "".join(json.dumps(each._asdict()) + "\n" for each in new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with opened(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            torn = os.fstat(descriptor).st_size and not self.path.read_bytes().endswith(b"\n")
            os.write(descriptor, ("\n" * bool(torn) + text).encode())
            os.fsync(descriptor)
        sync_directory(self.path.parent)


def _parsed(line: str) -> Tombstone | None:
    try:
        found = Tombstone(**json.loads(line))
        return found._replace(until=float(found.until))
    except (ValueError, TypeError):
        return None


def bury(database: Database, graves: Iterable[Tombstone], now: float, *, report: dict[str, object]) -> None:
    """Add tombstones that are not there yet, as erasures still to be done.

    Whoever inserts records at this moment finishes first, and those who come later see the tombstones: what is deleted
    afterwards is all there ever was.
    """
    rows = [
        {**each._asdict(), "created_at": now, "finished_at": None, "report": json.dumps(report)}
        for each in sorted(graves)
    ]
    with database.write() as connection:
        if not database.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ERASURE_LOCK})")
        database.insert_new(connection, tombstones, rows)


def hold_off_erasure(database: Database, connection: sa.Connection) -> None:
    """Until this transaction ends no tombstone is added. On SQLite every writer is alone anyway."""
    if not database.is_sqlite:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock_shared({ERASURE_LOCK})")


def fingerprint(connection: sa.Connection) -> Fingerprint:
    t = tombstones.c
    query = sa.select(sa.func.max(t.number), sa.func.count(), sa.func.sum(t.until))
    number, n_rows, until = connection.execute(query).one()
    return Fingerprint(number or 0, n_rows, until or 0.0)


def graves(connection: sa.Connection, *, only_open: bool = False) -> list[Grave]:
    """Every tombstone of the table, or those whose erasure has still to be done."""
    query = sa.select(tombstones).order_by(tombstones.c.number)
    if only_open:
        query = query.where(tombstones.c.finished_at.is_(None))
    rows = connection.execute(query).all()
    return [
        Grave(
            row.number,
            Tombstone(row.who, row.until, row.reason, row.key_check),
            row.finished_at is not None,
            json.loads(row.report),
        )
        for row in rows
    ]


def has_any(database: Database) -> bool:
    """Whether anything was ever erased."""
    with database.read() as connection:
        return connection.execute(sa.select(tombstones.c.number).limit(1)).first() is not None


def has_open(database: Database) -> bool:
    """Whether an erasure has still to be done."""
    query = sa.select(tombstones.c.number).where(tombstones.c.finished_at.is_(None)).limit(1)
    with database.read() as connection:
        return connection.execute(query).first() is not None


def grave_of(connection: sa.Connection, tombstone: Tombstone) -> Grave:
    """The row of a tombstone that was buried."""
    return next(each for each in graves(connection) if each.tombstone[:2] == tombstone[:2])


def write_report(connection: sa.Connection, number: int, report: dict[str, object]) -> None:
    """How far an erasure is; in the transaction that did the work."""
    here = tombstones.c.number == number
    connection.execute(tombstones.update().where(here).values(report=json.dumps(report)))


def close_grave(connection: sa.Connection, number: int, now: float) -> None:
    """Nothing is left to be done in the database."""
    connection.execute(tombstones.update().where(tombstones.c.number == number).values(finished_at=now))


class Place(NamedTuple):
    """A drain, and the last tombstone that it has applied to its files."""

    name: str
    number: int
    seen_at: float


def confirm(database: Database, place: Place) -> None:
    """Tell everybody how far the files of a place are; places not heard of for a month are forgotten."""
    p = erasure_places.c
    with database.write() as connection:
        known = connection.execute(
            erasure_places.update().where(p.place == place.name).values(number=place.number, seen_at=place.seen_at)
        )
        if not known.rowcount:
            row = {"place": place.name, "number": place.number, "seen_at": place.seen_at}
            database.insert_new(connection, erasure_places, [row])
        connection.execute(erasure_places.delete().where(p.seen_at < place.seen_at - FORGET_PLACE_S))


def places(database: Database) -> list[Place]:
    """Every drain that is known."""
    query = sa.select(erasure_places).order_by(erasure_places.c.place)
    with database.read() as connection:
        return [Place(row.place, row.number, row.seen_at) for row in connection.execute(query)]


class TombstoneBook:
    """What one process knows of the tombstones. Belongs to one thread."""

    def __init__(self, database: Database, path: Path, secret: bytes, *, clock: Clock) -> None:
        self._database = database
        self._file = TombstoneFile(path)
        self._clock = clock
        self.erased = Erased(secret, self._file.read())
        self._seen: Fingerprint | None = None
        self._copied: Fingerprint | None = None
        self._looked_at = -LOOK_S
        self._complained = 0
        self.has_met = False
        """A record of somebody who was erased came by since this was last set to False: its bytes are in a file."""

    @property
    def number(self) -> int:
        """The table's last tombstone, as far as this process knows."""
        return self._seen.number if self._seen else 0

    def within(self, connection: sa.Connection) -> Erased:
        """The tombstones as they stand, for as long as this transaction lasts."""
        hold_off_erasure(self._database, connection)
        self._read(connection)
        return self.erased

    def look(self) -> None:
        """Read the table, at most every `LOOK_S`; then make file and table copies of each other."""
        if abs(self._clock() - self._looked_at) >= LOOK_S:
            self.copy_both_ways()
            self._looked_at = self._clock()

    def copy_both_ways(self) -> None:
        """What the file lacks is appended; what the table lacks, since a backup took its place, is buried anew."""
        with self._database.read() as connection:
            self._read(connection)
            found = {grave.tombstone for grave in graves(connection)} if self._seen != self._copied else None
        if found is None:
            return
        self._file.add(found)
        missing = {each for each in self.erased.tombstones if each[:2] not in {known[:2] for known in found}}
        if missing:
            log.warning("tombstones_returned_to_the_database", count=len(missing))
            bury(self._database, missing, self._clock(), report={})
            with self._database.read() as connection:
                self._read(connection)
        self._copied = self._seen

    def _read(self, connection: sa.Connection) -> None:
        now = fingerprint(connection)
        if now != self._seen:
            self.erased = self.erased.joined(grave.tombstone for grave in graves(connection))
            self._seen = now
            self._complain()

    def _complain(self) -> None:
        n_strange = self.erased.n_of_another_secret
        if n_strange > self._complained:
            log.error("tombstones_of_another_secret", count=n_strange)
            self._complained = n_strange


Apply = Callable[[float], bool]
"""Takes what was erased out of files. Given since when that is known; False while older records are on their way."""


class ErasureWatch:
    """What a drain does about its own files when something is erased, and then it says so.

    What becomes due in one pass of the drain is done in a later one: a record may have come between this pass's look at
    the files and its look at the tombstones. And it becomes due again when a record of somebody erased comes by late,
    from a request that was still running.
    """

    def __init__(self, book: TombstoneBook, database: Database, place: str, *, clock: Clock) -> None:
        self.book = book
        self._database = database
        self._place = place
        self._clock = clock
        self._done = 0
        self._due: int | None = None
        self._due_since = 0.0
        self._told: Place | None = None

    def run(self, apply: Apply) -> None:
        """Look, and do what is due. A database that is away is not this one's concern: whoever drains will notice."""
        try:
            self._run(apply)
        except sa.exc.SQLAlchemyError as exc:
            log.debug("erasure_not_looked_up", reason=type(exc).__name__)

    def _run(self, apply: Apply) -> None:
        self.book.look()
        if self._due is None:
            self._note_what_is_due()
        elif apply(self._due_since):
            self._done, self._due, self.book.has_met = self._due, None, False
        self._tell()

    def _note_what_is_due(self) -> None:
        if self.book.number != self._done or self.book.has_met:
            self._due, self._due_since = self.book.number, self._clock()

    def _tell(self) -> None:
        now, told = self._clock(), self._told
        if told is None or told.number != self._done or now - told.seen_at > HEARTBEAT_S:
            self._told = Place(self._place, self._done, now)
            confirm(self._database, self._told)


def open_watch(database: Database, state_dir: Path, secret: bytes, place: Path, *, clock: Clock) -> ErasureWatch:
    """For the drain of some files on this machine."""
    book = TombstoneBook(database, state_dir / FILE, secret, clock=clock)
    name = f"{socket.gethostname()}:{place.absolute()}"[-PLACE_CHARS:]
    return ErasureWatch(book, database, name, clock=clock)
