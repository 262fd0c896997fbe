"""From this machine's disk to the shared database, in batches, for as long as it takes.

A record leaves the disk only after the database has committed it, and the database ignores an id it has: so a crash
anywhere between repeats work but neither loses nor doubles a row. A record that cannot be stored goes to the
dead-letter table with the reason; it never holds up its batch.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from feedback.errors import SpoolUnavailable
from feedback.interactions import FeedbackEvent, Interaction
from feedback.spool import Spool
from feedback.storing import RecordStore, Stored, unchanged_event, unchanged_text
from feedback.tombstone_store import ErasureWatch
from pawl.clock import Clock
from pawl.database import Database

log = structlog.get_logger()

BATCH = 500
WORTH_IT = 100
IDLE_S = 0.25
TIDY_EVERY_S = 5.0
"""While feedback trickles in; it costs two writes to the disk."""
LONGEST_PAUSE_S = 5.0


class DrainThread(ABC):
    """Drains until it is stopped: at once while there is something, with growing pauses while the database is away."""

    def __init__(self, name: str, *, worth_it: int = 1) -> None:
        """
        Args:
            worth_it: Fewer records than this in a batch are followed by a pause, so that a trickle does not become a
                stream of small transactions.
        """
        self._worth_it = worth_it
        self._wake = threading.Event()
        self._is_stopping = threading.Event()
        self.is_database_up = True
        self._is_paused = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def drain_once(self) -> int:
        """Move one batch; return how many records it was."""

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to drain; called for every record, so it must be cheap."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Move everything if the database answers within `timeout_s`; what is left waits for the next start."""
        self._is_stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = IDLE_S
        while True:
            try:
                moved = self.drain_once()
                pause_s = IDLE_S
                self.is_database_up, self._is_paused = True, False
            except Exception as exc:  # noqa: BLE001 - the thread must outlive whatever the database or the disk does
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                moved = 0
                self._note_failure(exc)
            if moved == 0 and self._is_stopping.is_set():
                return
            if moved < self._worth_it and not self._is_stopping.is_set():
                self._wake.wait(pause_s)
                self._wake.clear()

    def _note_failure(self, exc: Exception) -> None:
        if not self._is_paused:
            log.warning("drain_paused", reason=type(exc).__name__)
        self._is_paused = True
        if not isinstance(exc, SpoolUnavailable | OSError):
            self.is_database_up = False


class Drain(DrainThread):
    """The thread that empties one spool."""

    def __init__(
        self,
        spool: Spool,
        database: Database,
        *,
        clock: Clock,
        on_stored: Callable[[Sequence[Interaction]], None] = lambda _: None,
        on_dead_letters: Callable[[int], None] = lambda _: None,
        prepare_event: Callable[[FeedbackEvent], FeedbackEvent] = unchanged_event,
        prepare_letter: Callable[[str], str] = unchanged_text,
        erasures: ErasureWatch | None = None,
    ) -> None:
        super().__init__("spool-drain", worth_it=WORTH_IT)
        self._spool = spool
        self._erasures = erasures
        self._records = RecordStore(
            database,
            clock=clock,
            prepare_event=prepare_event,
            prepare_letter=prepare_letter,
            tombstones=erasures.book if erasures else None,
        )
        self._on_stored = on_stored
        self._on_dead_letters = on_dead_letters
        self._has_discarded = True  # By an earlier process, for all we know.
        self._tidied_at = -TIDY_EVERY_S

    def drain_once(self) -> int:
        """Move one batch; return how many records it was.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot take rows now; nothing has left the spool.
        """
        if not self._spool.is_healthy:
            with suppress(SpoolUnavailable):  # Draining goes on: it is what makes room in a spool that filled the disk.
                self._spool.probe().result()
        if self._erasures is not None:
            self._erasures.run(self._wipe)
        records = self._spool.oldest(BATCH).result()
        if not records:
            self._tidy()
            return 0
        stored = self._records.store(records)
        self._spool.discard([record.seq for record in records]).result()
        self._has_discarded = True
        report(stored, self._on_stored, self._on_dead_letters)
        return len(records)

    def _wipe(self, since: float) -> bool:
        """Once all that was written before is in the database, nothing of it may stay in the file."""
        oldest_at = self._spool.size().result().oldest_at
        if oldest_at is not None and oldest_at <= since:
            return False
        self._spool.tidy().result()
        return True

    def _tidy(self) -> None:
        """What people wrote shall not stay on this machine's disk once the database has it."""
        if self._has_discarded and time.monotonic() - self._tidied_at >= TIDY_EVERY_S:
            self._spool.tidy().result()
            self._has_discarded, self._tidied_at = False, time.monotonic()


def report(
    stored: Stored, on_stored: Callable[[Sequence[Interaction]], None], on_dead_letters: Callable[[int], None]
) -> None:
    """Tell whoever counts, once the records have left the disk."""
    on_stored(stored.interactions)
    if stored.n_dead:
        on_dead_letters(stored.n_dead)
