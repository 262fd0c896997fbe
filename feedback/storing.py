"""Records from this machine's disk become rows of the shared database; a bad one never holds up the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from feedback.erasure_store import drop_what_hangs_on, erased_among
from feedback.interactions import FeedbackEvent, Interaction
from feedback.recording import event_from_json, exchange_from_json, parse_interaction
from feedback.spool import SpoolRecord
from feedback.store import event_row, interaction_row
from feedback.tombstone_store import TombstoneBook
from feedback.tombstones import Owner, forgotten, owner_in, owner_of_event, owner_of_interaction
from feedback.unstored import meetings, withhold_texts
from pawl.clock import Clock
from pawl.database import AWAY, Database
from pawl.schema import dead_letters, feedback_events, interactions

log = structlog.get_logger()

TABLES = (interactions, feedback_events, dead_letters)
"""In the order in which rows are added."""


class Ready(NamedTuple):
    """One record on its way into the database."""

    table: sa.Table
    row: Mapping[str, Any]
    owner: Owner | None
    """None where even that cannot be read."""
    interaction: Interaction | None = None
    """What the row was made from, if it is one."""

    @property
    def rated(self) -> str | None:
        """The interaction that feedback is about."""
        return self.row["interaction_id"] if self.table is feedback_events else None


class Stored(NamedTuple):
    """What became of some records."""

    interactions: list[Interaction]
    n_dead: int


def unchanged(interaction: Interaction) -> Interaction:
    return interaction


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
        tombstones: TombstoneBook | None = None,
    ) -> None:
        """
        Args:
            prepare: What is done to an interaction before it becomes a row, such as taking out personal data.
            prepare_event: The same for feedback.
            prepare_letter: The same for the text of a record that is put aside, since it cannot be read or stored.
            tombstones: Who has been erased while records were on their way; without it nobody.
        """
        self._database = database
        self._clock = clock
        self._prepare = prepare
        self._prepare_event = prepare_event
        self._prepare_letter = prepare_letter
        self._tombstones = tombstones

    def store(self, records: Sequence[SpoolRecord]) -> Stored:
        """Commit every record, as a row or as a dead letter.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database cannot take rows now; some of them may be there.
        """
        batch = [self._read(record) for record in records]
        if not batch:
            return Stored([], 0)
        try:
            return self._save(batch)
        except Exception as exc:
            if not is_the_rows_fault(exc):
                raise
            return self._store_without_the_bad_one(records, exc)

    def _store_without_the_bad_one(self, records: Sequence[SpoolRecord], exc: Exception) -> Stored:
        """Halve until the record that the database refuses stands alone, and put that one aside."""
        if len(records) == 1:
            return self._save([self._put_aside(records[0], exc)])
        middle = len(records) // 2
        first, second = self.store(records[:middle]), self.store(records[middle:])
        return Stored(first.interactions + second.interactions, first.n_dead + second.n_dead)

    def _read(self, record: SpoolRecord) -> Ready:
        try:
            if record.kind == "feedback":
                event = event_from_json(record.meta)
                return Ready(feedback_events, event_row(self._prepare_event(event)), owner_of_event(event))
            parsed = parse_interaction(exchange_from_json(record.meta), record.request or b"", record.response or b"")
            return ready_interaction(self._prepare(parsed), owner_of_interaction(parsed))
        except Exception as exc:  # noqa: BLE001 - one bad record must not block the others; it is kept, with the reason
            return self._put_aside(record, exc)

    def _put_aside(self, record: SpoolRecord, exc: Exception) -> Ready:
        return Ready(dead_letters, self._dead_letter(record, exc), owner_in(record.meta))

    def _save(self, batch: Sequence[Ready]) -> Stored:
        with self._database.write() as connection:
            kept = self._without_the_erased(connection, batch)
            for table in TABLES:
                if rows := [each.row for each in kept if each.table is table]:
                    self._database.insert_new(connection, table, rows)
        # In a transaction of its own: of two that meet, the later one sees what the other has committed.
        answers, said = ([each.row for each in kept if each.table is table] for table in TABLES[:2])
        withhold_texts(self._database, meetings(answers, said))
        found = [each.interaction for each in kept if each.interaction is not None]
        return Stored(found, sum(each.table is dead_letters for each in kept))

    def _without_the_erased(self, connection: sa.Connection, batch: Sequence[Ready]) -> Sequence[Ready]:
        """What remains of the batch; nobody can be erased between this and the transaction's end."""
        erased = self._tombstones.within(connection) if self._tombstones is not None else None
        if not erased:
            return batch
        gone = {place for place, each in enumerate(batch) if each.owner is not None and erased.covers(each.owner)}
        if gone and self._tombstones is not None:
            self._tombstones.has_met = True
        faded = {place: fade(found) for place in gone if (found := batch[place].interaction) is not None}
        unsaid = erased_among(connection, [each.rated for each in batch if each.rated is not None])
        drop_what_hangs_on(connection, [each.row["id"] for each in faded.values()])
        return [
            faded.get(place, each)
            for place, each in enumerate(batch)
            if place in faded or (place not in gone and each.rated not in unsaid)
        ]

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


def ready_interaction(interaction: Interaction, owner: Owner) -> Ready:
    return Ready(interactions, interaction_row(interaction), owner, interaction)


def fade(interaction: Interaction) -> Ready:
    """What is left of one that was erased: its numbers."""
    left = forgotten(interaction)
    return ready_interaction(left, owner_of_interaction(left))


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
