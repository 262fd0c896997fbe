"""Calls that come twice to one machine: to one process of a gateway first, and then to another.

Every process keeps its own answers in its own spool, in the commit that keeps what was sent. So the others' files say
what they answered, also those of processes that were killed, and also while the database is away.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from feedback.spool import Connection
from serving.feedback_repeats import Found, Stamp, first_answers

log = structlog.get_logger()

TURNS = "turns.lock"
"""Beside the spools. It stays empty."""
PATIENCE_S = 0.5
"""For a spool that its owner is putting in order at this moment."""
PLACE_BITS = 62
"""The kernel counts bytes of a file in 63."""


class Turns:
    """One call per key at a time, among all processes of this machine that share a directory of spools.

    Each key is a byte of one file, locked while its call runs: the locks are the kernel's and end with their process.
    """

    def __init__(self, directory: Path) -> None:
        self._file = (directory / TURNS).open("a")
        self._held: set[int] = set()

    def __len__(self) -> int:
        """How many calls of this process run."""
        return len(self._held)

    def take(self, stamp: Stamp) -> bool:
        """Whether no other call with this key runs; from now on this one does."""
        place = place_of(stamp)
        if place in self._held or not self._has_locked(place):
            return False
        self._held.add(place)
        return True

    def give_back(self, stamp: Stamp) -> None:
        """The call is answered."""
        place = place_of(stamp)
        self._held.discard(place)
        with suppress(OSError, ValueError):  # It was closed, or could not be locked in the first place.
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        self._file.close()

    def _has_locked(self, place: int) -> bool:
        """True also where the system has no more locks: then two calls at once may both be taken, as one event."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as exc:
            log.warning("feedback_turn_not_locked", reason=exc.strerror)
        return True


def place_of(stamp: Stamp) -> int:
    """The byte that stands for a key."""
    digest = hashlib.blake2b(f"{stamp.owner}/{stamp.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - PLACE_BITS)


class Neighbours:
    """The spools of the other processes, which are only read. Belongs to one thread."""

    def __init__(self, own: Path) -> None:
        self._own = own
        self._open: dict[int, Connection] = {}

    def first_answers(self, connection: Connection, stamps: Sequence[Stamp], now: float) -> list[Found | None]:
        """What was answered on this machine, by this process's own spool or by another one's."""
        found = first_answers(connection, stamps, now)
        missing = [place for place, answer in enumerate(found) if answer is None]
        for spool in self._others() if missing else ():
            asked = [stamps[place] for place in missing]
            for place, answer in zip(missing, self._asked(spool, asked, now), strict=True):
                found[place] = found[place] or answer
        return found

    def close(self) -> None:
        """Let go of the files."""
        while self._open:
            self._open.popitem()[1].close()

    def _others(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._own.parent) as entries:
            for entry in entries:
                if entry.name.endswith(self._own.suffix) and entry.name != self._own.name:
                    yield entry

    def _asked(self, spool: os.DirEntry[str], stamps: Sequence[Stamp], now: float) -> list[Found | None]:
        """Nothing from a file that cannot be read, such as one that is being made."""
        number = spool.inode()
        try:
            if number not in self._open:
                self._open[number] = opened_to_read(spool.path)
            return first_answers(self._open[number], stamps, now)
        except sqlite3.Error as exc:
            log.debug("feedback_neighbour_not_read", spool=spool.name, reason=str(exc))
            if (broken := self._open.pop(number, None)) is not None:
                broken.close()
            return [None] * len(stamps)


def opened_to_read(path: str) -> Connection:
    """A connection that never writes: SQLite before 3.51.3 can corrupt a WAL file that several connections write."""
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode=ro",
        uri=True,
        check_same_thread=False,
        isolation_level=None,
        timeout=PATIENCE_S,
    )
    connection.execute("PRAGMA cache_size = -64")
    return connection
