"""Every query on the verdicts of judges: ids, scores and hashes, no words of anybody's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.batches import columns, look_up, stream
from feedback.candidates import Verdict, principal_of
from feedback.judged.reply import Scores
from feedback.judged.rulings import Outcome, Ruling
from feedback.messages import digest
from feedback.partitions import Ids
from pawl.database import Database
from pawl.schema import interactions, judge_verdicts

VERDICT_ID, INTERACTION_ID = "S32", "S48"
"""Types of columns."""


class Judged(NamedTuple):
    """Two answers that went to a judge before."""

    first: str
    second: str
    is_settled: bool
    """It could be read, or was asked for often enough."""
    attempts: int


class Judging(NamedTuple):
    """Who judges, and by what."""

    judge: str
    """The model."""
    constitution: str
    """SHA-256."""


class Heard(NamedTuple):
    """What a judge said of two answers, as it is kept."""

    ruling: Ruling
    forward: Scores | None
    backward: Scores | None
    attempts: int
    judged_at: float


def verdict_id(first: str, second: str) -> str:
    """The same for two interactions in either order."""
    return digest("verdict", *sorted((first, second)))


def read_verdict_ids(database: Database, alias: str) -> list[Ids]:
    """Id and both interactions of each verdict that mining must know of, by column."""
    v = judge_verdicts.c
    query = sa.select(v.id, v.first, v.second).where(v.alias == alias, v.outcome != Outcome.UNREADABLE.value)
    with database.read() as connection:
        return columns(stream(connection, query), (VERDICT_ID, INTERACTION_ID, INTERACTION_ID))


def read_verdicts(database: Database, ids: Sequence[str]) -> list[Verdict]:
    """Those of the verdicts with these ids that mining must know of."""
    v = judge_verdicts.c
    query = sa.select(v.first, v.second, v.winner, v.margin).where(v.outcome != Outcome.UNREADABLE.value)
    with database.read() as connection:
        return [Verdict._make(row) for batch in look_up(connection, query, v.id, ids) for row in batch]


def show_verdict(database: Database, one: str | None, other: str) -> dict[str, Any] | None:
    """All that is kept of a verdict on two interactions, for people; None if there is none."""
    if one is None:
        return None
    row = database.first_row(sa.select(judge_verdicts).where(judge_verdicts.c.id == verdict_id(one, other)))
    return {**row, "scores": json.loads(row["scores"])} if row else None


def judged_before(
    database: Database, alias: str, conversations: Sequence[str], max_attempts: int, only: Judging | None
) -> dict[str, list[Judged]]:
    """What was judged already, by conversation.

    Args:
        max_attempts: after so many unreadable replies two answers are asked about no more.
        only: leaves out what others judged, or by another constitution.
    """
    v = judge_verdicts.c
    query = sa.select(v.conversation, v.first, v.second, v.outcome, v.attempts).where(v.alias == alias)
    if only is not None:
        query = query.where(v.judge == only.judge, v.constitution == only.constitution)
    found: dict[str, list[Judged]] = {}
    with database.read() as connection:
        for row in (row for rows in look_up(connection, query, v.conversation, conversations) for row in rows):
            is_settled = row.outcome != Outcome.UNREADABLE.value or row.attempts >= max_attempts
            found.setdefault(row.conversation, []).append(Judged(row.first, row.second, is_settled, row.attempts))
    return found


def last_conversation(database: Database, alias: str) -> str:
    """The conversation that was judged last; the empty text before the first."""
    v = judge_verdicts.c
    query = sa.select(v.conversation).where(v.alias == alias).order_by(v.judged_at.desc(), v.id).limit(1)
    row = database.first_row(query)
    return str(row["conversation"]) if row else ""


def judged_askers(database: Database, alias: str) -> Iterator[tuple[frozenset[str], float]]:
    """Of each verdict the principals who got the two answers, and when the later one was given."""
    v, one, other = judge_verdicts.c, interactions.alias("one"), interactions.alias("other")
    both = judge_verdicts.join(one, one.c.id == v.first).join(other, other.c.id == v.second)
    asked: list[sa.ColumnElement[Any]] = [
        side.c[name] for side in (one, other) for name in ("key_id", "user_id", "created_at")
    ]
    query: sa.Select[Any] = sa.select(*asked).select_from(both).where(v.alias == alias)
    with database.read() as connection:
        for rows in stream(connection, query):
            for key, user, at, other_key, other_user, other_at in map(tuple, rows):
                yield frozenset((principal_of(key, user), principal_of(other_key, other_user))), max(at, other_at)


def save_verdict(
    database: Database, alias: str, conversation: str, sides: tuple[str, str], heard: Heard, by: Judging
) -> bool:
    """Keep a verdict in the place of an earlier one on the same answers; False if a text of theirs is gone.

    Replies that cannot be read take the place of others such alone: what was ruled before stands.

    Nobody can erase the texts between this look at them and the transaction's end; who wants to then finds the verdict.

    Args:
        sides: ids of both interactions, the smaller one first: what the ruling and the scores call first.
    """
    row, v = _row(alias, conversation, sides, heard, by), judge_verdicts.c
    earlier = judge_verdicts.delete().where(v.id == row["id"])
    if heard.ruling.outcome is Outcome.UNREADABLE:
        earlier = earlier.where(v.outcome == Outcome.UNREADABLE.value)
    with database.write() as connection:
        if len(connection.execute(_kept(sides).with_for_update(read=True)).all()) < len(sides):
            return False
        connection.execute(earlier)
        database.insert_new(connection, judge_verdicts, [row])
    return True


def are_kept(database: Database, sides: tuple[str, str]) -> bool:
    """Whether the texts of both interactions are still there."""
    with database.read() as connection:
        return len(connection.execute(_kept(sides)).all()) == len(sides)


def _kept(sides: tuple[str, str]) -> sa.Select[str]:
    i = interactions.c
    return sa.select(i.id).where(i.id.in_(sides), i.is_stored, i.completion.is_not(None)).order_by(i.id)


def _row(alias: str, conversation: str, sides: tuple[str, str], heard: Heard, by: Judging) -> dict[str, Any]:
    outcome, lead = heard.ruling
    winner = sides[lead < 0] if outcome is Outcome.PREFERRED else None
    scores = {"in_order": _shown(heard.forward), "reversed": _swapped(_shown(heard.backward))}
    return {
        "id": verdict_id(*sides),
        "alias": alias,
        "conversation": conversation,
        "first": sides[0],
        "second": sides[1],
        "outcome": outcome.value,
        "winner": winner,
        "margin": abs(lead),
        "scores": json.dumps(scores),
        "judge": by.judge,
        "constitution": by.constitution,
        "attempts": heard.attempts,
        "judged_at": heard.judged_at,
    }


def _shown(scores: Scores | None) -> dict[str, dict[str, float]] | None:
    return None if scores is None else {name: sides._asdict() for name, sides in scores.items()}


def _swapped(scores: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]] | None:
    """So that `first` means the same answer in both orders."""
    if scores is None:
        return None
    return {name: {"first": each["second"], "second": each["first"]} for name, each in scores.items()}


def verdicts_on(ids: Sequence[str] | sa.Select[Any]) -> sa.ColumnElement[bool]:
    """Which verdicts are about any of these interactions."""
    return sa.or_(judge_verdicts.c.first.in_(ids), judge_verdicts.c.second.in_(ids))
