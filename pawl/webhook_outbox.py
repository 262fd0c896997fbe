"""Every query on events and where they have been sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from pawl.database import Database
from pawl.schema import webhook_deliveries, webhook_endpoints, webhook_events
from pawl.webhook_events import Event, is_wanted

WAITING, SENT, DEAD = "waiting", "sent", "dead"


class Delivery(NamedTuple):
    """An event on its way to one endpoint."""

    event: Event
    attempts: int
    """Made so far."""


class Standing(NamedTuple):
    """How an endpoint is doing."""

    waiting: int
    sent: int
    dead: int
    last_error: str | None
    """Of what waits or was given up."""


def hand_out(database: Database, endpoint: str, patterns: Sequence[str], now: float) -> int:
    """Give an endpoint all events that it has not been given; how many those were.

    What happened before it was first seen is not sent to it.
    """
    with database.read() as connection:
        found = [(row.id, row.type) for row in connection.execute(_not_given(endpoint))]
        is_known = connection.execute(_since(endpoint)).first() is not None
    blank = {"endpoint": endpoint, "status": WAITING, "attempts": 0, "next_at": now, "updated_at": now}
    rows = [{"event_id": one, **blank} for one, kind in found if is_wanted(kind, patterns)]
    if is_known and not rows:
        return 0
    with database.write() as connection:
        database.insert_new(connection, webhook_endpoints, [{"endpoint": endpoint, "since": now}])
        return database.insert_new(connection, webhook_deliveries, rows)


def _since(endpoint: str) -> sa.Select[tuple[float]]:
    return sa.select(webhook_endpoints.c.since).where(webhook_endpoints.c.endpoint == endpoint)


def _not_given(endpoint: str) -> sa.Select[tuple[str, str]]:
    e, d = webhook_events.c, webhook_deliveries.c
    given = sa.exists().where(d.event_id == e.id, d.endpoint == endpoint)
    return (
        sa.select(e.id, e.type).where(e.at >= _since(endpoint).scalar_subquery(), sa.not_(given)).order_by(e.at, e.id)
    )


def due(database: Database, endpoint: str, now: float, limit: int) -> list[Delivery]:
    """What may be sent now, the oldest event first."""
    e, d = webhook_events.c, webhook_deliveries.c
    query = (
        sa.select(e.id, e.type, e.at, e.payload, d.attempts)
        .join(webhook_deliveries, d.event_id == e.id)
        .where(d.endpoint == endpoint, d.status == WAITING, d.next_at <= now)
        .order_by(e.at, e.id)
        .limit(limit)
    )
    with database.read() as connection:
        rows = connection.execute(query).all()
    return [Delivery(Event(row.id, row.type, row.at, row.payload), row.attempts) for row in rows]


def note_attempt(
    database: Database, endpoint: str, event_id: str, *, status: str, error: str | None, next_at: float, now: float
) -> None:
    """Keep how an attempt went."""
    d = webhook_deliveries.c
    values = {"status": status, "attempts": d.attempts + 1, "next_at": next_at, "last_error": error, "updated_at": now}
    with database.write() as connection:
        connection.execute(
            webhook_deliveries.update().where(d.event_id == event_id, d.endpoint == endpoint).values(**values)
        )


def revive(database: Database, endpoint: str, now: float) -> int:
    """Try again what was given up; how many events that is."""
    d = webhook_deliveries.c
    values = {"status": WAITING, "attempts": 0, "next_at": now, "updated_at": now}
    with database.write() as connection:
        dead = webhook_deliveries.update().where(d.endpoint == endpoint, d.status == DEAD)
        return connection.execute(dead.values(**values)).rowcount


def forget_before(database: Database, moment: float) -> int:
    """Delete old events with all that is known of them; endpoints are not sent those any more."""
    old = sa.select(webhook_events.c.id).where(webhook_events.c.at < moment)
    late = webhook_endpoints.c.since < moment
    with database.write() as connection:
        connection.execute(webhook_endpoints.update().where(late).values(since=moment))
        connection.execute(webhook_deliveries.delete().where(webhook_deliveries.c.event_id.in_(old)))
        return connection.execute(webhook_events.delete().where(webhook_events.c.at < moment)).rowcount


def standing(database: Database, endpoint: str) -> Standing:
    """How many events an endpoint waits for, has had and missed."""
    d = webhook_deliveries.c
    counts = sa.select(d.status, sa.func.count()).where(d.endpoint == endpoint).group_by(d.status)
    failed = sa.select(d.last_error).where(d.endpoint == endpoint, d.status != SENT, d.last_error.is_not(None))
    with database.read() as connection:
        found = {str(status): int(n) for status, n in connection.execute(counts)}
        error = connection.execute(failed.order_by(d.updated_at.desc()).limit(1)).scalar()
    return Standing(found.get(WAITING, 0), found.get(SENT, 0), found.get(DEAD, 0), error)
