"""What the shared database knows of completions, and of earlier feedback on them, when feedback comes in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from pawl.database import Database
from pawl.schema import feedback_events, interactions


class Asked(NamedTuple):
    """Which completion, and which feedback on it."""

    interaction_id: str
    feedback_id: str
    beginnings: tuple[str, ...] = ()
    """How the id of the event begins that the same call may have made before."""


class Earlier(NamedTuple):
    """An event that came with the same key."""

    event_id: str
    at: float
    is_retraction: bool
    follows_retraction: bool | None
    """Whether the event before it took the feedback back; None if it was the first."""


class Last(NamedTuple):
    """The newest event of a feedback id."""

    at: float
    is_retraction: bool


class Standing(NamedTuple):
    """What is known."""

    alias: str | None = None
    """The model the client asked for; None while the interaction is not visible."""
    variant: str | None = None
    completion_id: str | None = None
    key_id: str = ""
    """Of the completion's owner, as `user_id`."""
    user_id: str | None = None
    is_stored: bool = True
    """False where the owner wanted no text kept."""
    last: Last | None = None
    earlier: Earlier | None = None
    is_complete: bool = True
    """False where nobody could be asked, so that nothing follows from what is missing here."""


NOT_VISIBLE = Standing()
UNKNOWN = Standing(is_complete=False)


def _rated_interactions() -> sa.Select[str, str, str, str, str, str | None, bool]:
    i = interactions.c
    columns = (i.id, i.alias, i.assigned_variant, i.completion_id, i.key_id, i.user_id, i.is_stored)
    return sa.select(*columns).where(i.id.in_(sa.bindparam("ids", expanding=True)))


def _newest_events() -> sa.Select[str, float, bool]:
    f = feedback_events.c
    place = sa.func.row_number().over(partition_by=f.feedback_id, order_by=(f.created_at.desc(), f.id.desc()))
    placed = sa.select(f.feedback_id, f.created_at, f.is_retraction, place.label("place"))
    history = placed.where(f.feedback_id.in_(sa.bindparam("ids", expanding=True))).subquery()
    return sa.select(history.c.feedback_id, history.c.created_at, history.c.is_retraction).where(history.c.place == 1)


def _earlier_events() -> sa.Select[str, float, bool, bool | None]:
    f, e = feedback_events.c, feedback_events.alias().c
    is_before = sa.or_(e.created_at < f.created_at, sa.and_(e.created_at == f.created_at, e.id < f.id))
    before = sa.select(e.is_retraction).where(e.feedback_id == f.feedback_id, is_before)
    latest = before.order_by(e.created_at.desc(), e.id.desc()).limit(1).scalar_subquery()
    return sa.select(f.id, f.created_at, f.is_retraction, latest).where(f.id.in_(sa.bindparam("ids", expanding=True)))


RATED, NEWEST, EARLIER = _rated_interactions(), _newest_events(), _earlier_events()
"""Put together once: that costs as much as asking."""
BEGUN = (
    "SELECT b.value, (SELECT min(f.id) FROM feedback_events AS f WHERE f.id >= b.value AND f.id < b.value || 'g')"
    " FROM {} AS b (value)"
)
"""The first id that begins so; ids are hexadecimal."""
BEGUN_SQLITE = sa.text(BEGUN.removesuffix(" (value)").format("json_each(:beginnings)"))
BEGUN_POSTGRESQL = sa.text(BEGUN.format("json_array_elements_text(CAST(:beginnings AS json))"))


def standings(database: Database, asked: Sequence[Asked]) -> list[Standing]:
    """One for each, in the same order."""
    with database.read() as connection:
        rated = connection.execute(RATED, {"ids": [one.interaction_id for one in asked]}).all()
        events = connection.execute(NEWEST, {"ids": [one.feedback_id for one in asked]}).all()
        earlier = _earlier(database, connection, [begun for one in asked for begun in one.beginnings])
    known = {
        id: Standing(alias, variant, completion_id, key_id, user_id, is_stored)
        for id, alias, variant, completion_id, key_id, user_id, is_stored in rated
    }
    last = {feedback_id: Last(at, is_retraction) for feedback_id, at, is_retraction in events}
    return [
        known.get(one.interaction_id, NOT_VISIBLE)._replace(
            last=last.get(one.feedback_id),
            earlier=next((earlier[begun] for begun in one.beginnings if begun in earlier), None),
        )
        for one in asked
    ]


def _earlier(database: Database, connection: sa.Connection, beginnings: Sequence[str]) -> Mapping[str, Earlier]:
    """The events whose ids begin so, by how they begin."""
    if not beginnings:
        return {}
    query = BEGUN_SQLITE if database.is_sqlite else BEGUN_POSTGRESQL
    begun = connection.execute(query, {"beginnings": json.dumps(beginnings)}).all()
    ids = [event_id for _, event_id in begun if event_id is not None]
    if not ids:
        return {}
    found = {row[0]: Earlier(*row) for row in connection.execute(EARLIER, {"ids": ids})}
    return {beginning: found[event_id] for beginning, event_id in begun if event_id is not None}


def completion_of_uuid(database: Database, unique: str) -> str | None:
    """The id of the completion whose id has these 32 hexadecimal digits first, if it is visible."""
    i = interactions.c
    query = sa.select(i.completion_id).where(i.id >= unique, i.id < unique + "g")
    with database.read() as connection:
        found = connection.execute(query).scalars().first()
    return str(found) if found is not None else None
