"""What was asked, read from the store."""

from __future__ import annotations

import json
from collections.abc import Sequence

import sqlalchemy as sa

from feedback.batches import look_up
from feedback.similarity.matching import ReadQuestions
from feedback.similarity.questions import Question, question_of
from pawl.database import Database
from pawl.schema import interactions


def reader(database: Database) -> ReadQuestions:
    """Looks questions up by the ids of interactions; texts that are not kept, or not comparable, are not found."""

    def read(ids: Sequence[str]) -> dict[str, Question]:
        i = interactions.c
        query = sa.select(i.id, i.alias, i.prompt_sha, i.prompt).where(i.is_stored, i.prompt.is_not(None))
        with database.read() as connection:
            rows = [row for batch in look_up(connection, query, i.id, ids) for row in batch]
        found = {row.id: question_of(row.alias, row.prompt_sha, json.loads(row.prompt)) for row in rows}
        return {name: question for name, question in found.items() if question is not None}

    return read
