"""What waits for a judge: a walk through the conversations that were answered more than once, in the order of hashes.

Hashes of conversations are as good as dice, so the walk is a draw that comes out the same each time. It starts after
the conversation that was judged last, so that every run goes on where the one before ended.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.batches import look_up
from feedback.candidates import MINED_SIGNALS, Opinion, Served, answer_of
from feedback.history import read_opinions
from feedback.interactions import Status
from feedback.judged import verdict_store
from feedback.judged.siblings import Rules, Siblings, Usable, choose
from feedback.judged.verdict_store import Judging
from feedback.poisoning.identities import Identities
from pawl.database import Database
from pawl.schema import feedback_events, interactions

PAGE_ROWS = 5000
"""Hashes of conversations that are read at once, by an index alone."""
READ_ANSWERS = 32
"""Of one conversation, the newest: of a popular prompt there is no end of answers."""
MAX_ATTEMPTS = 3
"""Two answers about which a judge said nothing readable so often are left alone."""
WEEK_S = 7 * 86400.0


class Limits(NamedTuple):
    """How much is judged."""

    rules: Rules
    per_principal: int
    """A week."""
    trusted: frozenset[str]
    """Keys and principals of whom there may be any number."""
    since: float
    """Older answers are not judged: no pair would be made of them."""


def waiting(
    database: Database, alias: str, limits: Limits, only: Judging | None, left_out: Counter[str]
) -> Iterator[Siblings]:
    """Everything that should be judged, in turn.

    Args:
        only: judge again what others judged, or by another constitution.
        left_out: gets how many answers were not sent, by reason.
    """
    room = _Room(limits.per_principal, Identities(limits.trusted, frozenset()))
    for askers, at in verdict_store.judged_askers(database, alias) if only is None else ():
        room.take(askers, at)
    for conversations in _walk(database, alias):
        judged = verdict_store.judged_before(database, alias, conversations, MAX_ATTEMPTS, only)
        for conversation in conversations:
            given = _answers(database, alias, conversation, limits.since)
            if len(given) < 2:
                continue
            before = {
                frozenset((one.first, one.second)): None if one.is_settled else one.attempts
                for one in judged.get(conversation, ())
            }
            opinions = _opinions(database, [one.served.id for one in given])
            for siblings in choose(given, opinions, before, limits.rules, lambda why, n: left_out.update({why: n})):
                if room.has(siblings.askers, siblings.at):
                    room.take(siblings.askers, siblings.at)
                    yield siblings
                else:
                    left_out["principal"] += 2


class _Room:
    """How many pairs of each principal are judged in each week."""

    def __init__(self, most: int, who: Identities) -> None:
        self._most = most
        self._who = who
        self._taken: Counter[tuple[str, int]] = Counter()

    def has(self, askers: frozenset[str], at: float) -> bool:
        return all(self._taken[place] < self._most for place in self._places(askers, at))

    def take(self, askers: frozenset[str], at: float) -> None:
        self._taken.update(self._places(askers, at))

    def _places(self, askers: frozenset[str], at: float) -> list[tuple[str, int]]:
        return [(asker, int(at // WEEK_S)) for asker in askers if not self._who.is_trusted(asker)]


def _walk(database: Database, alias: str) -> Iterator[list[str]]:
    """Conversations with several answers, a page at a time, once round."""
    start = verdict_store.last_conversation(database, alias)
    yield from _span(database, start, None)
    if start:
        yield from _span(database, "", start)


def _span(database: Database, after: str, until: str | None) -> Iterator[list[str]]:
    """Those of the hashes after one and up to another that occur more than once, whoever's alias they are."""
    while True:
        page = _page(database, after, until)
        if not page:
            return
        counts = Counter(page)
        if len(page) == PAGE_ROWS and len(counts) > 1 and counts[page[-1]] == 1:  # There may be more of the last one.
            del counts[page.pop()]
        after = page[-1]
        yield [conversation for conversation, n in counts.items() if n > 1]


def _page(database: Database, after: str, until: str | None) -> list[str]:
    sha = interactions.c.prompt_sha
    query = sa.select(sha).where(sha > after).order_by(sha).limit(PAGE_ROWS)
    with database.read() as connection:
        found = connection.execute(query if until is None else query.where(sha <= until))
        return [str(each) for each in found.scalars()]


def _answers(database: Database, alias: str, conversation: str, since: float) -> list[Usable]:
    """The newest whole answers that are stored with their texts, and that answered the very same messages."""
    i = interactions.c
    is_usable = sa.and_(i.is_stored, i.is_complete, i.status == Status.OK.value, i.completion.is_not(None))
    query = sa.select(*(i[name] for name in Served._fields)).where(
        i.prompt_sha == conversation, i.alias == alias, is_usable, i.created_at >= since
    )
    with database.read() as connection:
        rows = connection.execute(query.order_by(i.created_at.desc(), i.id).limit(READ_ANSWERS)).all()
    found = [Usable(served, answer_of(served)) for served in map(_served, rows)]
    usable = [one for one in found if one.answer.problem is None]
    most = Counter(one.answer.conversation for one in usable).most_common(1)
    return [one for one in usable if one.answer.conversation == most[0][0]]


def _served(row: Sequence[Any]) -> Served:
    *facts, prompt, completion = row
    messages = None if prompt is None else tuple(json.loads(prompt))
    return Served._make((*facts, messages, None if completion is None else json.loads(completion)))


def _opinions(database: Database, ids: Sequence[str]) -> list[Opinion]:
    """All live feedback on these interactions."""
    f = feedback_events.c
    query = sa.select(f.id, f.feedback_id, f.is_retraction).where(f.type.in_(MINED_SIGNALS))
    with database.read() as connection:
        events = [
            row
            for rows in look_up(connection, query.order_by(f.created_at, f.id), f.interaction_id, ids)
            for row in rows
        ]
    latest = {event.feedback_id: event for event in events}
    return read_opinions(database, sorted(event.id for event in latest.values() if not event.is_retraction))
