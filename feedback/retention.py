"""Records that are kept no longer: deleted in small transactions, a bounded number each time the worker comes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from feedback.erasure_store import NO_PAIR, lock_in_order
from feedback.judged.verdict_store import verdicts_on
from feedback.text_lock import hold_off_mining
from pawl.database import Database
from pawl.schema import dead_letters, feedback_events, interactions, judge_verdicts, pairs, scores, shadow_answers

DAY_S = 86400.0


class Limits(NamedTuple):
    """For how many days what is kept; None: for ever."""

    interactions_days: float | None
    pairs_days: float | None
    dead_letters_days: float | None


def kept_since(days: float | None, now: float) -> float:
    """From when on a record is kept; what is older must not be made anew either."""
    return 0.0 if days is None else now - days * DAY_S


class Pruned(NamedTuple):
    """What one visit deleted."""

    counts: Counter[str]
    is_more: bool
    """The bound was reached before the end."""


Prune = Callable[[sa.Connection, float, int], Counter[str]]
"""Deletes one batch of what is older than a moment; empty once there is nothing left."""


def prune(database: Database, limits: Limits, now: float, *, batch_rows: int, max_batches: int) -> Pruned:
    """Delete what is too old: at most `max_batches` transactions of at most `batch_rows` rows each, oldest first."""
    counts: Counter[str] = Counter()
    n_batches = 0
    for delete, days in _due(limits):
        before = kept_since(days, now)
        while n_batches < max_batches and (found := _one_batch(database, delete, before, batch_rows)):
            counts += found
            n_batches += 1
    return Pruned(counts, is_more=n_batches == max_batches)


def _one_batch(database: Database, delete: Prune, before: float, n_rows: int) -> Counter[str]:
    with database.write() as connection:
        return delete(connection, before, n_rows)


def _due(limits: Limits) -> list[tuple[Prune, float]]:
    wanted: Mapping[Prune, float | None] = {
        _old_interactions: limits.interactions_days,
        _old_feedback: limits.interactions_days,
        _old_pairs: limits.pairs_days,
        _old_letters: limits.dead_letters_days,
    }
    return [(delete, days) for delete, days in wanted.items() if days is not None]


def _old_interactions(connection: sa.Connection, before: float, n_rows: int) -> Counter[str]:
    """With their scores, the verdicts on them, what a candidate said in their place and all feedback on them."""
    i = interactions.c
    query = sa.select(i.id).where(i.created_at < before).order_by(i.created_at, i.id).limit(n_rows)
    ids = connection.execute(query).scalars().all()
    if not ids:
        return Counter()
    hold_off_mining(connection)
    lock_in_order(connection, i.id, ids)
    return Counter(
        feedback=_delete(connection, feedback_events.c.interaction_id, ids),
        scores=_delete(connection, scores.c.interaction_id, ids),
        verdicts=connection.execute(judge_verdicts.delete().where(verdicts_on(ids))).rowcount,
        shadow_answers=_delete(connection, shadow_answers.c.interaction_id, ids),
        interactions=_delete(connection, i.id, ids),
    )


def _old_feedback(connection: sa.Connection, before: float, n_rows: int) -> Counter[str]:
    """What is on no interaction that is here; on one that is, it stays as long as that does."""
    f = feedback_events.c
    is_alone = sa.not_(sa.exists().where(interactions.c.id == f.interaction_id))
    query = sa.select(f.id).where(f.created_at < before, is_alone).order_by(f.created_at, f.id).limit(n_rows)
    return _deleted(connection, "feedback", f.id, connection.execute(query).scalars().all())


def _old_pairs(connection: sa.Connection, before: float, n_rows: int) -> Counter[str]:
    """Of those that a promoted run trained on, the lineage stays."""
    p = pairs.c
    has_something = sa.or_(p.chosen != NO_PAIR["chosen"], p.principals != NO_PAIR["principals"])
    query = sa.select(p.id).where(p.created_at < before, has_something).order_by(p.created_at, p.id).limit(n_rows)
    ids = connection.execute(query).scalars().all()
    if ids:
        lock_in_order(connection, p.id, ids)
        connection.execute(pairs.update().where(p.id.in_(ids), p.first_run.is_not(None)).values(**NO_PAIR))
        connection.execute(pairs.delete().where(p.id.in_(ids), p.first_run.is_(None)))
    return Counter(pairs=len(ids)) if ids else Counter()


def _old_letters(connection: sa.Connection, before: float, n_rows: int) -> Counter[str]:
    d = dead_letters.c
    query = sa.select(d.id).where(d.created_at < before).order_by(d.created_at, d.id).limit(n_rows)
    return _deleted(connection, "dead_letters", d.id, connection.execute(query).scalars().all())


def _deleted(connection: sa.Connection, name: str, column: sa.Column[str], ids: Sequence[str]) -> Counter[str]:
    return Counter({name: _delete(connection, column, ids)}) if ids else Counter()


def _delete(connection: sa.Connection, column: sa.Column[str], ids: Sequence[str]) -> int:
    return connection.execute(sa.delete(column.table).where(column.in_(ids))).rowcount
