"""From all journals of this machine, living and abandoned, to the shared database."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import orjson
import structlog

from feedback.drain import DrainThread, report
from feedback.errors import SpoolUnavailable
from feedback.interactions import Interaction
from feedback.journal_reader import JournalReader
from feedback.segment_files import lock
from feedback.segments import Frame
from feedback.spool import SpoolRecord
from feedback.storing import RecordStore, unchanged, unchanged_text
from feedback.tombstone_store import ErasureWatch
from pawl.clock import Clock
from pawl.database import Database

log = structlog.get_logger()

BATCH = 500
WORTH_IT = 100
DRAIN_LOCK = "drain.lock"


class JournalDrain(DrainThread):
    """Drains every folder of a spool directory. Of several drains of one directory, one works and the others wait."""

    def __init__(
        self,
        directory: Path,
        database: Database,
        *,
        clock: Clock,
        on_stored: Callable[[Sequence[Interaction]], None] = lambda _: None,
        on_dead_letters: Callable[[int], None] = lambda _: None,
        on_damage: Callable[[int], None] = lambda _: None,
        prepare: Callable[[Interaction], Interaction] = unchanged,
        prepare_letter: Callable[[str], str] = unchanged_text,
        erasures: ErasureWatch | None = None,
    ) -> None:
        """
        Args:
            on_damage: Told how many records could not be read back; they are lost, and the log says where.
            erasures: Whose records are dropped on the way, and wiped from the journals; without it nobody's.
        """
        super().__init__("journal-drain", worth_it=WORTH_IT)
        self._lock_file: IO[str] | None = None
        self._directory = directory
        self._records = RecordStore(
            database,
            clock=clock,
            prepare=prepare,
            prepare_letter=prepare_letter,
            tombstones=erasures.book if erasures else None,
        )
        self._erasures = erasures
        self._on_stored = on_stored
        self._on_dead_letters = on_dead_letters
        self._on_damage = on_damage
        self._readers: dict[str, JournalReader] = {}
        self._complaints: set[tuple[str, str, int | None]] = set()

    def stop(self, timeout_s: float) -> None:
        """Move everything if the database answers within `timeout_s`; what is left waits for the next start."""
        super().stop(timeout_s)
        if not self._thread.is_alive():
            self._let_go()

    def _let_go(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def drain_once(self) -> int:
        """Move a batch of every journal; return how many records it was: none while another drain is at work here.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot take rows now; what was not stored comes again.
        """
        if not self._is_the_only_one():
            return 0
        n_moved = sum(self._drain(reader) for reader in self._journals())
        if self._erasures is not None:
            self._erasures.run(self._wipe)
        return n_moved

    def _wipe(self, since: float) -> bool:
        """Once all that was written before is in the database, no journal needs it any more."""
        readers = list(self._readers.values())
        if not all(reader.is_past(since) for reader in readers):
            return False
        for reader in readers:
            reader.wipe()
        return True

    def _is_the_only_one(self) -> bool:
        if self._lock_file is None:
            try:
                self._lock_file = lock(self._directory / DRAIN_LOCK)
            except SpoolUnavailable:
                return False
        return True

    def _journals(self) -> list[JournalReader]:
        with os.scandir(self._directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        known = self._readers
        self._readers = {name: known.get(name) or self._reader_of(name) for name in names}
        return list(self._readers.values())

    def _reader_of(self, name: str) -> JournalReader:
        return JournalReader(self._directory / name, on_damage=self._on_damage)

    def _drain(self, reader: JournalReader) -> int:
        frames = self._take(reader)
        try:
            stored = self._records.store([record_of(frame, reader.directory.name) for frame in frames])
        except BaseException:
            reader.forget()
            raise
        self._commit(reader)
        if frames:
            report(stored, self._on_stored, self._on_dead_letters)
        return len(frames)

    def _take(self, reader: JournalReader) -> list[Frame]:
        """One journal that cannot be read does not hold up the others."""
        try:
            return reader.take(BATCH)
        except OSError as exc:
            self._complain("journal_unreadable", reader, exc)
            return []

    def _commit(self, reader: JournalReader) -> None:
        """A full disk must not stop the drain: it is what makes room. The place is kept in memory meanwhile."""
        try:
            reader.commit()
        except OSError as exc:
            self._complain("journal_place_not_written", reader, exc)

    def _complain(self, event: str, reader: JournalReader, exc: OSError) -> None:
        """Once for each trouble: the drain comes by several times a second."""
        trouble = (event, reader.directory.name, exc.errno)
        if trouble not in self._complaints:
            self._complaints.add(trouble)
            log.error(event, directory=reader.directory.name, reason=exc.strerror)


def record_of(frame: Frame, journal: str) -> SpoolRecord:
    """As the spool would hold it. A record whose facts cannot be read is named by its place."""
    try:
        name = str(orjson.loads(frame.meta)["id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        name = f"{journal[-32:]}-{frame.seq}"
    return SpoolRecord(frame.seq, "interaction", name, name, frame.at, frame.meta, frame.request, frame.response)
