"""An alias's records all at once, as objects: what tests look at, and what mining part by part is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.store import JSON_COLUMNS
from pawl.database import Database
from pawl.schema import feedback_events, interactions


def whole_history(database: Database, alias: str) -> tuple[list[Interaction], list[FeedbackEvent]]:
    """Every interaction of an alias by id, and all feedback on them in order of time."""
    i, f = interactions.c, feedback_events.c
    on_them = sa.select(feedback_events).join(interactions, i.id == f.interaction_id).where(i.alias == alias)
    with database.read() as connection:
        served = connection.execute(sa.select(interactions).where(i.alias == alias).order_by(i.id)).mappings().all()
        said = connection.execute(on_them.order_by(f.created_at, f.id)).mappings().all()
    return [_interaction(row) for row in served], [FeedbackEvent(**_decoded(row)) for row in said]


def _interaction(row: Mapping[Any, Any]) -> Interaction:
    values = _decoded(row)
    prompt = None if values["prompt"] is None else tuple(values["prompt"])
    return Interaction(**(values | {"prompt": prompt, "status": Status(values["status"])}))


def _decoded(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: json.loads(value) if name in JSON_COLUMNS and value else value for name, value in row.items()}
