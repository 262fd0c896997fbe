"""Every query of erasure: what is removed, in batches, each one transaction with the note of how far it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.erasure import Removed, is_letter_of, is_pair_of, people_in_letter, people_of_pair
from feedback.judged.verdict_store import verdicts_on
from feedback.store import NO_PAIR_TEXT, NO_TEXT
from feedback.text_lock import hold_off_mining
from feedback.tombstones import ERASED_UNIT, Erased, Owner, Person
from pawl import registry
from pawl.database import Database
from pawl.schema import (
    dead_letters,
    feedback_events,
    interactions,
    judge_verdicts,
    limit_slots,
    limit_windows,
    pairs,
    rollouts,
    runs,
    scores,
    shadow_answers,
)

SCAN_ROWS = 2000
"""Of tables that are read through, since no index leads to a person's rows."""
SCAN_LETTERS = 20
"""A dead letter may be a megabyte, and other writers wait for the transaction that reads them."""

ERASED: Mapping[str, Any] = {
    **NO_TEXT,
    "user_id": None,
    "unit_id": sa.literal(ERASED_UNIT).concat(interactions.c.id),
    "is_analysed": False,
    "regenerate_of": None,
}
"""What `tombstones.forgotten` does, to rows."""
NO_PAIR: Mapping[str, Any] = {**NO_PAIR_TEXT, "principals": "[]"}

AFTER_ALL_NAMES = chr(0x10FFFF)
"""Stands for the name of somebody erased, where whoever came at the same moment counts as seen rather than twice."""

Step = Callable[[sa.Connection], Removed | None]
"""Removes one batch; None once there was nothing left to remove."""


def was_erased() -> sa.ColumnElement[bool]:
    return interactions.c.unit_id == sa.literal(ERASED_UNIT).concat(interactions.c.id)


def erased_among(connection: sa.Connection, ids: Sequence[str]) -> set[str]:
    """Which of these interactions were erased."""
    if not ids:
        return set()
    query = sa.select(interactions.c.id).where(interactions.c.id.in_(sorted(set(ids))), was_erased())
    return set(connection.execute(query).scalars())


def drop_what_hangs_on(connection: sa.Connection, ids: Sequence[str]) -> Removed:
    """Remove feedback on interactions, their scores, the pairs from them, and what was put aside of them."""
    if not ids:
        return Removed()
    letters = [f"interact-{one}" for one in ids]
    counts = Counter(
        feedback=_delete(connection, feedback_events, feedback_events.c.interaction_id.in_(ids)),
        scores=_delete(connection, scores, scores.c.interaction_id.in_(ids)),
        verdicts=_delete(connection, judge_verdicts, verdicts_on(ids)),
        shadow_answers=_delete(connection, shadow_answers, shadow_answers.c.interaction_id.in_(ids)),
        dead_letters=_delete(connection, dead_letters, dead_letters.c.id.in_(letters)),
    )
    sides = sa.or_(pairs.c.chosen_interaction.in_(ids), pairs.c.rejected_interaction.in_(ids))
    return Removed(counts).plus(drop_pairs(connection, sides))


def lock_in_order(connection: sa.Connection, column: sa.Column[str], ids: Sequence[str]) -> None:
    """Lock rows in the order of their ids, as everybody does: in any other order two could wait for each other.

    A statement that changes several rows locks them as it comes to them. SQLite has one writer at a time anyhow.
    """
    connection.execute(sa.select(column).where(column.in_(ids)).order_by(column).with_for_update()).all()


def drop_pairs(connection: sa.Connection, which: sa.ColumnElement[bool]) -> Removed:
    """Remove pairs; of those that a promoted run trained on the lineage stays, without texts and names."""
    p = pairs.c
    has_something = sa.or_(p.chosen != NO_PAIR["chosen"], p.principals != NO_PAIR["principals"])
    # In the order of ids: see `lock_in_order`.
    query = sa.select(p.id, p.first_run).where(which, has_something).order_by(p.id).with_for_update()
    found = connection.execute(query).all()
    if not found:
        return Removed()
    unused = [row.id for row in found if row.first_run is None]
    used = [row.id for row in found if row.first_run is not None]
    _delete(connection, pairs, p.id.in_(unused))
    connection.execute(pairs.update().where(p.id.in_(used)).values(**NO_PAIR))
    trained = _runs_that_trained_on(connection, {row.id for row in found})
    trained.update(Counter(row.first_run for row in found if row.first_run and row.first_run not in trained))
    return Removed(Counter(pairs=len(found)), trained)


def _runs_that_trained_on(connection: sa.Connection, pair_ids: set[str]) -> Counter[str]:
    """How many of these pairs each finished run took for its training set, promoted or not."""
    rows = connection.execute(sa.select(runs.c.id, runs.c.detail).execution_options(yield_per=1))
    found = {row.id: len(pair_ids.intersection(json.loads(row.detail).get("new_pair_ids") or ())) for row in rows}
    return Counter({run: n for run, n in found.items() if n})


def _delete(connection: sa.Connection, table: sa.Table, *which: sa.ColumnElement[bool]) -> int:
    return connection.execute(table.delete().where(*which)).rowcount


def steps_for(person: Person, secret: bytes, limit_subject: Callable[[str, str], str], n_rows: int) -> list[Step]:
    """What removes one person's records, table by table; those that know the name best come last.

    Args:
        limit_subject: Who a user of a key is in the tables of limits.
        n_rows: Of one batch, at most.
    """
    return [
        _through(pairs, lambda row: is_pair_of(person, secret, row), _drop_found_pairs, SCAN_ROWS),
        _through(
            dead_letters, lambda row: is_letter_of(person, secret, row["payload"]), _drop_found_letters, SCAN_LETTERS
        ),
        lambda connection: _limits_of(connection, person, limit_subject),
        lambda connection: _feedback_of(connection, person, n_rows),
        lambda connection: _interactions_of(connection, person, n_rows),
    ]


def completion_step(suffix: str) -> Step:
    """Removes one completion."""

    def step(connection: sa.Connection) -> Removed | None:
        query = sa.select(interactions.c.id).where(interactions.c.id == suffix, sa.not_(was_erased()))
        return _erase(connection, list(connection.execute(query).scalars()))

    return step


def _interactions_of(connection: sa.Connection, person: Person, n_rows: int) -> Removed | None:
    i = interactions.c
    query = sa.select(i.id).where(i.user_id == person.user, i.created_at <= person.until, *_key(i, person))
    return _erase(connection, list(connection.execute(query.order_by(i.created_at).limit(n_rows)).scalars()))


def _erase(connection: sa.Connection, ids: Sequence[str]) -> Removed | None:
    """A mining pass that holds the texts ends before, and the pairs that it made of them are seen then."""
    if not ids:
        return None
    hold_off_mining(connection)
    lock_in_order(connection, interactions.c.id, ids)
    _forget_last_counted(connection, ids)
    connection.execute(interactions.update().where(interactions.c.id.in_(ids)).values(**ERASED))
    return drop_what_hangs_on(connection, ids).plus(Removed(Counter(interactions=len(ids))))


def _forget_last_counted(connection: sa.Connection, ids: Sequence[str]) -> None:
    """A running rollout keeps the name of the last user whom it has counted, to tell users of one moment apart."""
    i, r = interactions.c, rollouts.c
    units = set(connection.execute(sa.select(i.unit_id).where(i.id.in_(ids)).distinct()).scalars())
    for rollout_id, stored in connection.execute(sa.select(r.id, r.state).order_by(r.id)).all():
        state = json.loads(stored)
        if state.get("cursor") and state["cursor"][1] in units:
            state["cursor"][1] = AFTER_ALL_NAMES
            connection.execute(rollouts.update().where(r.id == rollout_id).values(state=json.dumps(state)))


def _feedback_of(connection: sa.Connection, person: Person, n_rows: int) -> Removed | None:
    f = feedback_events.c
    mine = sa.select(f.id).where(f.user_id == person.user, f.created_at <= person.until, *_key(f, person))
    ids = list(connection.execute(mine.limit(n_rows)).scalars())
    if not ids:
        return None
    hold_off_mining(connection)  # An edit is a text as well.
    return Removed(Counter(feedback=_delete(connection, feedback_events, f.id.in_(ids))))


def _key(columns: Any, person: Person) -> list[sa.ColumnElement[bool]]:
    return [columns.key_id == person.key_id] if person.key_id is not None else []


def _through(
    table: sa.Table,
    is_wanted: Callable[[Mapping[str, Any]], bool],
    drop: Callable[[sa.Connection, Sequence[str]], Removed],
    n_rows: int,
) -> Step:
    """Reads a table through in the order of its ids, a page in each transaction."""
    last = ""

    def step(connection: sa.Connection) -> Removed | None:
        nonlocal last
        columns = [table.c[name] for name in SCANNED[table.name]]
        page = connection.execute(sa.select(*columns).where(table.c.id > last).order_by(table.c.id).limit(n_rows))
        rows = page.mappings().all()
        if not rows:
            return None
        last = rows[-1]["id"]
        wanted = [row["id"] for row in rows if is_wanted({str(name): value for name, value in row.items()})]
        return drop(connection, wanted) if wanted else Removed()

    return step


SCANNED = {
    "pairs": ("id", "principals", "chosen_interaction", "rejected_interaction"),
    "dead_letters": ("id", "payload"),
}


def _drop_found_pairs(connection: sa.Connection, ids: Sequence[str]) -> Removed:
    return drop_pairs(connection, pairs.c.id.in_(ids))


def _drop_found_letters(connection: sa.Connection, ids: Sequence[str]) -> Removed:
    return Removed(Counter(dead_letters=_delete(connection, dead_letters, dead_letters.c.id.in_(ids))))


def _limits_of(connection: sa.Connection, person: Person, limit_subject: Callable[[str, str], str]) -> Removed | None:
    name = limit_subject(person.key_id or "", person.user)
    n_rows = 0
    for table in (limit_windows, limit_slots):
        subject = table.c.subject
        mine = subject == name if person.key_id is not None else subject.endswith(name, autoescape=True)
        n_rows += _delete(connection, table, mine)
    return Removed(Counter(limits=n_rows)) if n_rows else None


def mark_models(connection: sa.Connection, trained: Mapping[str, int], now: float) -> list[str]:
    """Write on every model that learned from erased pairs, or descends from one that did, that it has; their names."""
    return [
        name
        for run, n_pairs in sorted(trained.items())
        for name in registry.mark_erased(connection, run, n_pairs, now=now)
    ]


def count_for(connection: sa.Connection, person: Person) -> Counter[str]:
    """What an erasure would find by way of the indexes; nothing is changed."""
    i, f, p = interactions.c, feedback_events.c, pairs.c
    mine = sa.and_(i.user_id == person.user, i.created_at <= person.until, *_key(i, person))
    ids = sa.select(i.id).where(mine)
    said = sa.and_(f.user_id == person.user, f.created_at <= person.until, *_key(f, person))
    wanted = {
        "interactions": sa.select(sa.func.count()).select_from(interactions).where(mine),
        "feedback": sa.select(sa.func.count()).where(sa.or_(f.interaction_id.in_(ids), said)),
        "scores": sa.select(sa.func.count()).where(scores.c.interaction_id.in_(ids)),
        "verdicts": sa.select(sa.func.count()).where(verdicts_on(ids)),
        "shadow_answers": sa.select(sa.func.count()).where(shadow_answers.c.interaction_id.in_(ids)),
        "pairs": sa.select(sa.func.count()).where(
            sa.or_(p.chosen_interaction.in_(ids), p.rejected_interaction.in_(ids)), p.chosen != NO_PAIR["chosen"]
        ),
    }
    return Counter({name: int(connection.execute(query).scalar_one()) for name, query in wanted.items()})


def models_of(connection: sa.Connection, person: Person) -> list[str]:
    """The models that learned from pairs of this person's, and those that descend from them; nothing is changed."""
    i, p = interactions.c, pairs.c
    ids = sa.select(i.id).where(i.user_id == person.user, i.created_at <= person.until, *_key(i, person))
    sides = sa.or_(p.chosen_interaction.in_(ids), p.rejected_interaction.in_(ids))
    found = connection.execute(sa.select(p.id, p.first_run).where(sides)).all()
    trained = {*_runs_that_trained_on(connection, {row.id for row in found}), *(r.first_run for r in found)} - {None}
    return sorted({name for run in trained for name in registry.models_after(connection, str(run))})


class NewestRow(NamedTuple):
    """The interaction made last, to see whether the secret at hand made its id."""

    id: str
    key_id: str
    user_id: str | None


def newest_interaction(connection: sa.Connection) -> NewestRow | None:
    i = interactions.c
    query = sa.select(i.id, i.key_id, i.user_id).where(sa.not_(was_erased()))
    row = connection.execute(query.order_by(i.created_at.desc()).limit(1)).first()
    return NewestRow(*row) if row else None


def people(database: Database, erased: Erased) -> Iterator[Person]:
    """Everybody named in the database whom these tombstones cover, for when nobody has their names any more."""
    seen: set[tuple[str, str]] = set()
    with database.read() as connection:
        for key_id, user in _named(connection):
            if (key_id, user) in seen:
                continue
            seen.add((key_id, user))
            if (until := erased.until(key_id, user)) >= 0:
                yield Person(user, key_id, until)


def _named(connection: sa.Connection) -> Iterator[tuple[str, str]]:
    for table in (interactions, feedback_events):
        names = sa.select(table.c.key_id, table.c.user_id).where(table.c.user_id.is_not(None)).distinct()
        for key_id, user in connection.execute(names.execution_options(yield_per=SCAN_ROWS)):
            yield str(key_id), str(user)
    for row in connection.execute(sa.select(pairs.c.principals).execution_options(yield_per=SCAN_ROWS)):
        yield from people_of_pair(row.principals)
    for row in connection.execute(sa.select(dead_letters.c.payload).execution_options(yield_per=10)):
        yield from people_in_letter(row.payload)


def completions(database: Database, erased: Erased) -> Iterator[str]:
    """The completions here that were erased by their own id."""
    i = interactions.c
    query = sa.select(i.id, i.key_id).where(sa.not_(was_erased())).execution_options(yield_per=SCAN_ROWS)
    with database.read() as connection:
        for suffix, key_id in connection.execute(query):
            if erased.covers(Owner(key_id, None, suffix, 0.0)):
                yield str(suffix)
