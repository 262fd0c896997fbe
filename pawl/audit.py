"""The audit trail: who did what to which thing, appended and never changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from pawl.database import Database
from pawl.schema import audit_events


class AuditEvent(NamedTuple):
    """One line of the trail."""

    at: float
    actor: str
    """A person at a command line, an API key's id, or a part of Pawl."""
    action: str
    """What was done, such as `key.revoke`."""
    subject: str
    """What it was done to."""
    detail: Mapping[str, object]
    """More about it; never a prompt, a secret or a key."""


def note(connection: sa.Connection, event: AuditEvent) -> None:
    """Write a line inside the transaction that does the deed, so that there is never one without the other."""
    connection.execute(audit_events.insert().values(**_row(event)))


def save_events(database: Database, events: Sequence[AuditEvent]) -> None:
    """Write lines about what needed no transaction of its own."""
    with database.write() as connection:
        connection.execute(audit_events.insert(), [_row(event) for event in events])


def latest_events(database: Database, *, subject: str | None = None, limit: int = 50) -> list[AuditEvent]:
    """The newest lines first, of one subject if it is named."""
    query = sa.select(audit_events).order_by(audit_events.c.id.desc()).limit(limit)
    if subject is not None:
        query = query.where(audit_events.c.subject == subject)
    with database.read() as connection:
        rows = connection.execute(query).all()
    return [AuditEvent(row.at, row.actor, row.action, row.subject, json.loads(row.detail)) for row in rows]


def _row(event: AuditEvent) -> dict[str, object]:
    return {**event._asdict(), "detail": json.dumps(dict(event.detail))}
