"""From the local spool to the shared database, in batches, for as long as it takes.

A record leaves the spool only after the database has committed it, and the database ignores an id it has: so a crash
anywhere between repeats work but neither loses nor doubles a row. A record that cannot be stored goes to the
dead-letter table with the reason; it never holds up its batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from feedback.errors import SpoolUnavailable
from feedback.interactions import Interaction
from feedback.recording import event_from_json, exchange_from_json, parse_interaction
from feedback.spool import Spool, SpoolRecord
from feedback.store import event_row, interaction_row, save_records
from pawl.clock import Clock
from pawl.database import Database

log = structlog.get_logger()

BATCH = 200
IDLE_S = 0.25
LONGEST_PAUSE_S = 5.0
AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)


class Batch(NamedTuple):
    """Rows ready for the database, and the interactions they came from."""

    interactions: list[dict[str, Any]]
    events: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    parsed: list[Interaction]


class Drain:
    """The thread that empties one spool."""

    def __init__(
        self,
        spool: Spool,
        database: Database,
        *,
        clock: Clock,
        on_stored: Callable[[Sequence[Interaction]], None] = lambda _: None,
        on_dead_letters: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._spool = spool
        self._database = database
        self._clock = clock
        self._on_stored = on_stored
        self._on_dead_letters = on_dead_letters
        self._wake = threading.Event()
        self._is_stopping = threading.Event()
        self.is_database_up = True
        self._is_paused = False
        self._thread = threading.Thread(target=self._run, name="spool-drain", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to drain; called for every record, so it must be cheap."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Empty the spool if the database answers within `timeout_s`; what is left waits for the next start."""
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
            if moved == 0:
                if self._is_stopping.is_set():
                    return
                self._wake.wait(pause_s)
                self._wake.clear()

    def _note_failure(self, exc: Exception) -> None:
        if not self._is_paused:
            log.warning("drain_paused", reason=type(exc).__name__)
        self._is_paused = True
        if not isinstance(exc, SpoolUnavailable):
            self.is_database_up = False

    def drain_once(self) -> int:
        """Move one batch; return how many records it was.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot take rows now; nothing has left the spool.
        """
        if not self._spool.is_healthy:
            with suppress(SpoolUnavailable):  # Draining goes on: it is what makes room in a spool that filled the disk.
                self._spool.probe().result()
        records = self._spool.oldest(BATCH).result()
        if not records:
            return 0
        batch = self._parse(records)
        try:
            save_records(self._database, batch.interactions, batch.events, batch.dead_letters)
            stored = batch.parsed
        except Exception as exc:
            if not is_the_rows_fault(exc):
                raise
            batch = batch._replace(dead_letters=[])
            stored = self._store_one_by_one(records)
        self._spool.discard([record.seq for record in records]).result()
        self._on_stored(stored)
        if batch.dead_letters:
            self._on_dead_letters(len(batch.dead_letters))
        return len(records)

    def _parse(self, records: Sequence[SpoolRecord]) -> Batch:
        batch = Batch([], [], [], [])
        for record in records:
            try:
                self._parse_one(record, batch)
            except Exception as exc:  # noqa: BLE001 - one bad record must not block the others; it is kept, with the reason
                batch.dead_letters.append(self._dead_letter(record, exc))
        return batch

    def _parse_one(self, record: SpoolRecord, batch: Batch) -> None:
        if record.kind == "feedback":
            batch.events.append(event_row(event_from_json(record.meta)))
            return
        parsed = parse_interaction(exchange_from_json(record.meta), record.request or b"", record.response or b"")
        batch.interactions.append(interaction_row(parsed))
        batch.parsed.append(parsed)

    def _store_one_by_one(self, records: Sequence[SpoolRecord]) -> list[Interaction]:
        """The batch held a row the database refuses: store the others and put that one aside."""
        stored: list[Interaction] = []
        for record in records:
            one = self._parse([record])
            try:
                save_records(self._database, one.interactions, one.events, one.dead_letters)
                stored += one.parsed
                if one.dead_letters:
                    self._on_dead_letters(1)
            except Exception as exc:
                if not is_the_rows_fault(exc):
                    raise
                save_records(self._database, [], [], [self._dead_letter(record, exc)])
                self._on_dead_letters(1)
        return stored

    def _dead_letter(self, record: SpoolRecord, exc: Exception) -> dict[str, Any]:
        # The driver's own text may quote the row, so only the kind of the error is logged.
        log.error("dead_letter", kind=record.kind, id=record.id, reason=type(exc).__name__)
        parts = [record.meta, record.request or b"", record.response or b""]
        return {
            "id": f"{record.kind[:8]}-{record.id}",
            "kind": record.kind,
            "payload": "\n".join(part.decode("utf-8", "backslashreplace").replace("\x00", "\\x00") for part in parts),
            "reason": type(exc).__name__,
            "created_at": self._clock(),
        }


def is_the_rows_fault(exc: Exception) -> bool:
    """Whether a failed write says something about its rows.

    It does not when the server is away or read-only, or knows no such table because it is not migrated yet: then every
    row would fail, so the batch waits. A programming error without the server's error code came from the driver, which
    could not encode a value.
    """
    if isinstance(exc, sa.exc.ProgrammingError):
        return getattr(exc.orig, "sqlstate", None) is None
    return not isinstance(exc, AWAY)
