"""People with histories of their own, for tests of erasure: genuine ids, feedback, pairs, scores, dead letters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from feedback.erasure import spellings
from feedback.erasure_run import Eraser
from feedback.interactions import FeedbackEvent, Interaction
from feedback.mining import mine_alias
from feedback.store import Score, mark_pairs_used, save_scores
from pawl import ids, registry
from pawl.database import Database
from pawl.registry import Model, ModelState, RunStatus
from pawl.schema import metadata, pairs
from tests.pawl.records import feedback, interaction, save

SECRET = b"a secret for tests, long enough"
NOW = 1000.0
"""When people ask to be forgotten."""
ADAPTER, CHILD = "base-model--r0001-1a2b3c4d", "base-model--r0002-5e6f7a8b"
History = tuple[list[Interaction], list[FeedbackEvent]]
Dump = dict[str, list[dict[str, Any]]]


def suffix_of(number: int, user: str, key_id: str = "") -> str:
    """A genuine completion id, of second `number`."""
    unique = ids.uuid7(float(number), number.to_bytes(ids.RANDOM_BYTES))
    return ids.make_completion_suffix(SECRET, unique, ids.Principal(key_id, user))


def said_to(user: str, number: int, *, key_id: str = "", **changes: Any) -> Interaction:
    """A question of this user's and its answer, both of which say whose they are."""
    fields: dict[str, Any] = {
        "created_at": float(number),
        "key_id": key_id,
        "user_id": user,
        "unit_id": f"{key_id}/{user}" if key_id else user,
        "experiment": "ro_1",
        "is_analysed": True,
        "prompt": ({"role": "user", "content": f"question {number // 2} of {user}"},),
        "completion": {"role": "assistant", "content": f"answer {number} for {user}"},
        "parameters": {"metadata": {"note": f"by {user}"}},
    }
    return interaction(suffix_of(number, user, key_id), **(fields | changes))


def thumb_on(rated: Interaction, value: str, **changes: Any) -> FeedbackEvent:
    fields: dict[str, Any] = {"created_at": rated.created_at + 0.5, "key_id": rated.key_id, "user_id": rated.user_id}
    return feedback(rated.id, value=value, **(fields | changes))


def history_of(
    user: str, start: int, n_pairs: int = 2, key_id: str = ""
) -> tuple[list[Interaction], list[FeedbackEvent]]:
    """Answers in twos, of which the user likes the first and dislikes the second."""
    served = [said_to(user, start + n, key_id=key_id) for n in range(2 * n_pairs)]
    events = [thumb_on(one, "up" if n % 2 == 0 else "down") for n, one in enumerate(served)]
    return served, events


def fill(database: Database, *histories: History) -> None:
    """Save, score and mine."""
    for served, events in histories:
        save(database, served, events)
        save_scores(database, [Score(one.id, 0.1, False, "comply", False, "test", 1.0) for one in served])
    mine_alias(database, "assistant", NOW)


def train(database: Database, user: str) -> None:
    """A promoted run that learned from a user's pairs, and a later one that went on from its model."""
    with database.read() as connection:
        query = sa.select(pairs.c.id).where(pairs.c.principals.contains(f"/{user}"))
        pair_ids = list(connection.execute(query).scalars())
    run = registry.create_run(database, "assistant", "2026-W01", epoch=1, now=1.0)
    registry.update_run(
        database, run, now=2.0, step="canary", status=RunStatus.PASSED, detail={"new_pair_ids": pair_ids}
    )
    mark_pairs_used(database, pair_ids, run.id)
    for name, parent, run_id in ((ADAPTER, "base-model", run.id), (CHILD, ADAPTER, "r0002")):
        model = Model(
            name, "assistant", "base-model", parent, run_id, None, None, None, ModelState.RETIRED, {"rank": 8}, 1.0, 1.0
        )
        registry.register_model(database, model)


def eraser(database: Database, directory: Path, **changes: Any) -> Eraser:
    fields: dict[str, Any] = {
        "database": database,
        "secret": SECRET,
        "state_dir": directory / "state",
        "runs_dir": directory / "runs",
        "limit_subject": lambda key_id, user: f"{key_id}/{user}",
        "actor": "tester",
        "clock": lambda: NOW,
        "pause": lambda _: None,
        "batch_rows": 3,
    }
    return Eraser(**(fields | changes))


def dump(database: Database) -> Dump:
    """Every row of every table, in an order of its own."""
    with database.read() as connection:
        return {
            table.name: sorted((dict(row) for row in connection.execute(sa.select(table)).mappings()), key=str)
            for table in metadata.sorted_tables
        }


def restore(database: Database, backup: Dump) -> None:
    """Put a backup in the place of everything."""
    with database.write() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
            if backup[table.name]:
                connection.execute(table.insert(), backup[table.name])


def mentions(found: Dump, text: str) -> list[str]:
    """The tables in which a text is to be found, as it is or as JSON writes it."""
    return sorted({name for name, rows in found.items() for row in rows if speaks_of(row, text)})


def speaks_of(row: Mapping[str, Any], text: str) -> bool:
    values = [value for value in row.values() if isinstance(value, str)]
    return any(spelling in value for spelling in spellings(text) for value in values)
