"""What was asked, read from the store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import sqlalchemy as sa

from feedback.batches import look_up
from feedback.part_work import Workplace
from feedback.similarity.matching import BATCH, ReadQuestions, ReadSettings
from feedback.similarity.questions import Question, question_of
from feedback.stored_json import read_json
from pawl.database import Database
from pawl.schema import interactions


def reader(database: Database) -> ReadQuestions:
    """Looks questions up by the ids of interactions; texts that are not kept, or not comparable, are not found."""
    return partial(read_questions, database)


def settings_reader(place: Workplace) -> ReadSettings:
    """Looks their settings up, wherever parts of the history are worked on: to take prompts apart is most of it."""

    def read(ids: Sequence[str]) -> dict[str, bytes]:
        lots = (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
        return dict(chain.from_iterable(map(dict.items, place.each(read_settings, lots))))

    return read


def read_questions(database: Database, ids: Sequence[str]) -> dict[str, Question]:
    """What was asked in some interactions."""
    i = interactions.c
    query = sa.select(i.id, i.alias, i.prompt_sha, i.prompt).where(i.is_stored, i.prompt.is_not(None))
    with database.read() as connection:
        rows = [row for batch in look_up(connection, query, i.id, ids) for row in batch]
    found = {row.id: question_of(row.alias, row.prompt_sha, read_json(row.prompt)) for row in rows}
    return {name: question for name, question in found.items() if question is not None}


def read_settings(database: Database, ids: Sequence[str]) -> dict[str, bytes]:
    """With what these questions may be compared."""
    return {name: question.setting for name, question in read_questions(database, ids).items()}
