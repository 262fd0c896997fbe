"""What mining reads: the ids and relations of a whole history by column, then facts and texts part by part.

No statement runs longer than it takes to read ids: on SQLite readers hold up whoever writes. What counts is the
feedback that was live when `read_history` looked; what comes later waits for the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from feedback.batches import columns, look_up, names, stream
from feedback.candidates import MINED_SIGNALS, NAMING_SIGNALS, Answer, Opinion, Said, Served, answer_of, opinion_of
from feedback.judged.verdict_store import read_verdict_ids
from feedback.pairs import Texts
from feedback.part_work import Workplace
from feedback.partitions import NOBODY, History, Ids
from feedback.stored_json import read_json
from feedback.text_lock import hold_off_removal
from pawl.database import Database
from pawl.ids import completion_suffix
from pawl.schema import feedback_events, interactions

ID, EVENT_ID, CONVERSATION = "S48", "S32", "S64"
"""Types of columns: what they hold is hexadecimal."""
SOME_CONVERSATION = "?"
"""Of answers that were recorded without one: any two of them might share it."""
RELATED_IDS = 5000
"""Looked up in one go, by whoever looks up some."""


class Relations(NamedTuple):
    """Of some interactions, by column."""

    ids: Ids
    conversations: Ids
    replaced: Ids
    """What each was asked again instead of."""


def read_history(database: Database, alias: str, place: Workplace | None = None) -> History:
    """The interactions of an alias that live feedback, a verdict or a regeneration touches or names, and those words.

    A verdict stands among the events: it is about one of its two answers and names the other.

    Args:
        place: where interactions are looked up; in this process unless told otherwise.
    """
    said = zip(_live_events(database), read_verdict_ids(database, alias), strict=True)
    events, rated, named = map(np.concatenate, said)
    find_by = partial(_find_related, database, place, alias)
    again = find_by("regenerate_of", _replaced(database))
    wanted = np.unique(np.concatenate([rated, named, again.replaced]))
    rest = find_by("id", np.setdiff1d(wanted[wanted != NOBODY], again.ids, assume_unique=True))
    found = Relations(*map(np.concatenate, zip(again, rest, strict=True)))
    order = np.argsort(found.ids)
    found = Relations(*(column[order] for column in found))
    return History(found.ids, found.conversations, found.replaced, events, rated, named)


def count_events(database: Database) -> int:
    """How much feedback there is, of every alias: what there is to mine is hardly more."""
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(feedback_events)).scalar_one())


def _live_events(database: Database) -> list[Ids]:
    """Of every alias: an event does not say whose it is, and the interactions are looked up anyhow."""
    f, newer = feedback_events.c, feedback_events.alias("newer").c
    is_newer = sa.or_(newer.created_at > f.created_at, sa.and_(newer.created_at == f.created_at, newer.id > f.id))
    is_replaced = sa.exists().where(newer.feedback_id == f.feedback_id, is_newer)
    query = sa.select(f.id, f.interaction_id, sa.case((f.type.in_(NAMING_SIGNALS), f.value), else_='""'))
    live = query.where(f.type.in_(MINED_SIGNALS), sa.not_(f.is_retraction), sa.not_(is_replaced))
    with database.read() as connection:
        return columns(stream(connection, live), (EVENT_ID, ID, ID), _with_named)


def _with_named(row: Sequence[Any]) -> tuple[str, str, str]:
    """The value in the last column becomes the interaction it names, if it can name one."""
    event_id, rated, value = row
    return event_id, rated, completion_suffix(str(read_json(value))) or ""


def _replaced(database: Database) -> Ids:
    """What was asked again, of every alias: read from the index alone."""
    i = interactions.c
    # Not `is_not(None)`: for that SQLite would read the whole table, for this it walks the index.
    query = sa.select(i.regenerate_of).where(i.regenerate_of > "")
    with database.read() as connection:
        (found,) = columns(stream(connection, query), (ID,))
    return np.unique(found)


def _find_related(database: Database, place: Workplace | None, alias: str, column: str, wanted: Ids) -> Relations:
    """The interactions of an alias that have one of these in a column, in any order."""
    if place is None or len(wanted) <= RELATED_IDS:
        return related(database, wanted, alias=alias, column=column)
    lots = (wanted[start : start + RELATED_IDS] for start in range(0, len(wanted), RELATED_IDS))
    found = place.each(partial(related, alias=alias, column=column), lots)
    return Relations(*map(np.concatenate, zip(*found, strict=True)))


def related(database: Database, wanted: Ids, *, alias: str, column: str) -> Relations:
    """The same for some of them."""
    i = interactions.c
    conversation = sa.case((i.is_stored, sa.func.coalesce(i.prompt_sha, SOME_CONVERSATION)), else_="")
    query = sa.select(i.id, conversation, sa.func.coalesce(i.regenerate_of, "")).where(i.alias == alias)
    with database.read() as connection:
        return Relations(*columns(look_up(connection, query, i[column], names(wanted)), (ID, CONVERSATION, ID)))


class StoredTexts(NamedTuple):
    """`Texts` as JSON."""

    prompt: str
    completion: str
    tools: str | None = None


class Heard(NamedTuple):
    """What mining must know of interactions, and of those first read their texts, which came in the same rows."""

    answers: list[Answer]
    texts: dict[str, StoredTexts]


def read_answers(database: Database, ids: Sequence[str], most_chars: int = 0) -> Heard:
    """What mining must know of these interactions.

    Args:
        most_chars: of texts, kept as they are stored; of the other interactions only the answer is.
    """
    i = interactions.c
    query = sa.select(*(i[name] for name in Served._fields), i.tools)
    answers: list[Answer] = []
    texts: dict[str, StoredTexts] = {}
    with database.read() as connection:
        for row in chain.from_iterable(look_up(connection, query, i.id, ids)):
            served = _served(row[:-1])
            answers.append(answer_of(served))
            if most_chars > 0 and served.is_stored and served.prompt and served.completion is not None:
                kept = texts[served.id] = StoredTexts(row.prompt, row.completion, row.tools)
                most_chars -= sum(len(text) for text in kept if text is not None)
    return Heard(answers, texts)


def _served(row: Sequence[Any]) -> Served:
    *facts, prompt, completion = row
    messages = None if prompt is None else tuple(read_json(prompt))
    return Served._make((*facts, messages, None if completion is None else read_json(completion)))


def read_opinions(database: Database, ids: Sequence[str]) -> list[Opinion]:
    """What mining must know of these events."""
    f = feedback_events.c
    query = sa.select(*(f[name] for name in Said._fields))
    with database.read() as connection:
        return [opinion_of(_said(row)) for batch in look_up(connection, query, f.id, ids) for row in batch]


def _said(row: Sequence[Any]) -> Said:
    said = Said._make(row)
    return said._replace(value=read_json(str(said.value)))


def read_texts(connection: sa.Connection, ids: Sequence[str]) -> dict[str, Texts]:
    """What these interactions said, by id; those of which no text is kept are left out."""
    stored = read_stored_texts(connection, ids)
    return {one: _texts(texts) for one, texts in stored.items()}


def _texts(stored: StoredTexts) -> Texts:
    tools = None if stored.tools is None else tuple(read_json(stored.tools))
    return Texts(tuple(read_json(stored.prompt)), read_json(stored.completion), tools)


def read_stored_texts(connection: sa.Connection, ids: Sequence[str]) -> dict[str, StoredTexts]:
    """The same as it is stored."""
    i = interactions.c
    query = sa.select(i.id, i.prompt, i.completion, i.tools).where(_has_texts())
    return {
        row.id: StoredTexts(row.prompt, row.completion, row.tools)
        for rows in look_up(connection, query, i.id, ids)
        for row in rows
    }


def hold_texts(connection: sa.Connection, ids: Sequence[str]) -> set[str]:
    """Which of these interactions have texts; until the transaction ends nobody can remove those.

    Comes before anything else in a transaction: see `text_lock`.
    """
    hold_off_removal(connection)
    i = interactions.c
    query = sa.select(i.id).where(_has_texts())
    return {row.id for rows in look_up(connection, query, i.id, ids) for row in rows}


def _has_texts() -> sa.ColumnElement[bool]:
    i = interactions.c
    return sa.and_(i.is_stored, i.prompt.is_not(None), i.completion.is_not(None))


def read_edits(connection: sa.Connection, ids: Sequence[str]) -> dict[str, str]:
    """The texts that users wanted, by event id."""
    f = feedback_events.c
    batches = look_up(connection, sa.select(f.id, f.value), f.id, ids)
    return {row.id: str(read_json(row.value)) for batch in batches for row in batch}


def known_events(connection: sa.Connection, ids: Sequence[str]) -> set[str]:
    """Which of these events are there."""
    f = feedback_events.c
    return {row.id for batch in look_up(connection, sa.select(f.id), f.id, ids) for row in batch}
