"""Records from this machine's disk become rows of the shared database; a bad one never holds up the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from feedback.interactions import FeedbackEvent, Interaction
from feedback.recording import event_from_json, exchange_from_json, parse_interaction
from feedback.spool import SpoolRecord
from feedback.store import event_row, interaction_row, save_records
from pawl.clock import Clock
from pawl.database import Database

log = structlog.get_logger()

AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)


class Batch(NamedTuple):
    """Rows ready for the database, and the interactions they came from."""

    interactions: list[dict[str, Any]]
    events: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    parsed: list[Interaction]


class Stored(NamedTuple):
    """What became of some records."""

    interactions: list[Interaction]
    n_dead: int


def unchanged(interaction: Interaction) -> Interaction:
    return interaction


def never(_: Interaction) -> bool:
    return False


def unchanged_event(event: FeedbackEvent) -> FeedbackEvent:
    return event


def unchanged_text(text: str) -> str:
    return text


class RecordStore:
    """Writes records to the database; an id that it has is left as it is."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        prepare: Callable[[Interaction], Interaction] = unchanged,
        prepare_event: Callable[[FeedbackEvent], FeedbackEvent] = unchanged_event,
        prepare_letter: Callable[[str], str] = unchanged_text,
        is_erased: Callable[[Interaction], bool] = never,
    ) -> None:
        """
        Args:
            prepare: What is done to an interaction before it becomes a row, such as taking out personal data.
            prepare_event: The same for feedback.
            prepare_letter: The same for the text of a record that is put aside, since it cannot be read or stored.
            is_erased: Whether a person has asked for it to be forgotten while it was on its way; it is dropped then.
        """
        self._database = database
        self._clock = clock
        self._prepare = prepare
        self._prepare_event = prepare_event
        self._prepare_letter = prepare_letter
        self._is_erased = is_erased

    def store(self, records: Sequence[SpoolRecord]) -> Stored:
        """Commit every record, as a row or as a dead letter.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot take rows now; some of them may be there.
        """
        batch = self._parse(records)
        if not (batch.interactions or batch.events or batch.dead_letters):
            return Stored([], 0)
        try:
            save_records(self._database, batch.interactions, batch.events, batch.dead_letters)
        except Exception as exc:
            if not is_the_rows_fault(exc):
                raise
            return self._store_without_the_bad_one(records, exc)
        return Stored(batch.parsed, len(batch.dead_letters))

    def _store_without_the_bad_one(self, records: Sequence[SpoolRecord], exc: Exception) -> Stored:
        """Halve until the record that the database refuses stands alone, and put that one aside."""
        if len(records) == 1:
            save_records(self._database, [], [], [self._dead_letter(records[0], exc)])
            return Stored([], 1)
        middle = len(records) // 2
        first, second = self.store(records[:middle]), self.store(records[middle:])
        return Stored(first.interactions + second.interactions, first.n_dead + second.n_dead)

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
            batch.events.append(event_row(self._prepare_event(event_from_json(record.meta))))
            return
        parsed = parse_interaction(exchange_from_json(record.meta), record.request or b"", record.response or b"")
        if self._is_erased(parsed):
            return
        parsed = self._prepare(parsed)
        batch.interactions.append(interaction_row(parsed))
        batch.parsed.append(parsed)

    def _dead_letter(self, record: SpoolRecord, exc: Exception) -> dict[str, Any]:
        # The driver's own text may quote the row, so only the kind of the error is logged.
        log.error("dead_letter", kind=record.kind, id=record.id, reason=type(exc).__name__)
        parts = [record.meta, record.request or b"", record.response or b""]
        return {
            "id": f"{record.kind[:8]}-{record.id}",
            "kind": record.kind,
            "payload": self._prepare_letter("\n".join(map(readable, parts))),
            "reason": type(exc).__name__,
            "created_at": self._clock(),
        }


def readable(part: bytes) -> str:
    """Bytes as a text that any database takes."""
    return part.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")


def is_the_rows_fault(exc: Exception) -> bool:
    """Whether a failed write says something about its rows.

    It does not when the server is away or read-only, or knows no such table because it is not migrated yet: then every
    row would fail, so the batch waits. A programming error without the server's error code came from the driver, which
    could not encode a value.
    """
    if isinstance(exc, sa.exc.ProgrammingError):
        return getattr(exc.orig, "sqlstate", None) is None
    return not isinstance(exc, AWAY)
