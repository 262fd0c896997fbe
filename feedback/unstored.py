"""Texts of feedback on completions whose owner wanted nothing stored: the signal stays, the words go.

A gateway that knows withholds them before they reach its disk. Where feedback comes before its completion is visible,
the two meet in the database; whichever arrives last, this looks once it is there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from feedback.signals import TEXTS
from pawl.database import Database
from pawl.schema import feedback_events, interactions

NO_TEXT = json.dumps("")
IDS_AT_ONCE = 500
HELD = ("reason", "comment", "tags")


def meetings(answers: Iterable[Mapping[str, Any]], said: Iterable[Mapping[str, Any]]) -> set[str]:
    """The interactions to look at once these rows of interactions and events are committed."""
    unstored = {row["id"] for row in answers if not row["is_stored"]}
    return unstored | {row["interaction_id"] for row in said if _has_text(row)}


def _has_text(row: Mapping[str, Any]) -> bool:
    return row["type"] in TEXTS or any(row[name] is not None for name in HELD)


def withhold_texts(database: Database, interaction_ids: Collection[str]) -> None:
    """Remove the words said about those of these interactions of which nothing may be stored."""
    ids = sorted(interaction_ids)
    for start in range(0, len(ids), IDS_AT_ONCE):
        _withhold(database, ids[start : start + IDS_AT_ONCE])


def _withhold(database: Database, ids: Collection[str]) -> None:
    i, f = interactions.c, feedback_events.c
    unstored = sa.select(i.id).where(i.id.in_(ids), sa.not_(i.is_stored))
    with database.read() as connection:
        found = connection.execute(unstored).scalars().all()
    if found:
        is_text = sa.and_(f.type.in_(sorted(TEXTS)), sa.not_(f.is_retraction))
        value = sa.case((is_text, NO_TEXT), else_=f.value)
        words = feedback_events.update().where(f.interaction_id.in_(found))
        with database.write() as connection:
            connection.execute(words.values(value=value, reason=None, comment=None, tags=None))
