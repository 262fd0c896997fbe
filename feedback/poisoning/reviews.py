"""The queue of quarantined pairs in the shared database, and what the defence has to know of who sent them.

The queue holds ids and decisions; the texts stay where they are, among the mined pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.batches import look_up
from feedback.pairs import PreferencePair, UnpairedExample
from feedback.part_work import Here, Workplace
from feedback.poisoning.defence import Defended, SideTables, defend
from feedback.poisoning.identities import key_of
from feedback.poisoning.singles import DefendedSingles, defend_singles
from feedback.store import get_pair
from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.schema import interactions, pair_reviews, pairs
from pawl.settings import DefenceSettings

LOOKED_UP = 500
USERS_AT_ONCE = 2000
"""Looked up in one go, by whoever looks up some."""


class Decision(StrEnum):
    """What a reviewer says of a quarantined pair."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


class WaitingPair(NamedTuple):
    """One line of the queue."""

    id: str
    reason: str
    source: str
    principals: tuple[str, ...]
    quarantined_at: float
    pair: PreferencePair


def defend_stored(
    database: Database, alias: str, found: Sequence[PreferencePair], settings: DefenceSettings, now: float
) -> Defended:
    """Run the defence over pairs of an alias with what the database knows of their principals.

    Args:
        found: all that may be trained on together; caps and tests are about the whole set.
    """
    principals = {each for pair in found for each in pair.principals}
    return defend(found, side_tables(database, alias, principals, now), settings)


def side_tables(
    database: Database, alias: str, principals: Iterable[str], now: float, place: Workplace | None = None
) -> SideTables:
    """What the database knows of an alias's pairs, and of who is behind them.

    Args:
        place: where principals are looked up; in this process unless told otherwise.
    """
    return SideTables(now, first_seen(database, principals, place), load_decisions(database, alias))


def defend_stored_singles(
    database: Database, found: Sequence[UnpairedExample], settings: DefenceSettings, now: float
) -> DefendedSingles:
    """As `defend_stored`, for single thumbs; there is no queue of those, so reviewers have decided on none."""
    seen = first_seen(database, {each for example in found for each in example.principals})
    return defend_singles(found, SideTables(now, seen), settings)


def first_seen(database: Database, principals: Iterable[str], place: Workplace | None = None) -> dict[str, float]:
    """When each of these principals was first served: looked up by index, never a walk through the history."""
    wanted = sorted(set(principals))
    users = sorted({principal.removeprefix(f"{key_of(principal)}/") for principal in wanted} - {""})
    lots = (users[start : start + USERS_AT_ONCE] for start in range(0, len(users), USERS_AT_ONCE))
    place = place if place is not None and len(users) > USERS_AT_ONCE else Here(database)
    of_keys = _came_without_name(database) if any(principal.endswith("/") for principal in wanted) else []
    seen: dict[str, float] = {}
    for principal, at in chain(of_keys, *place.each(came, lots)):
        seen[principal] = min(at, seen.get(principal, at))
    return {principal: seen[principal] for principal in wanted if principal in seen}


def came(database: Database, users: Sequence[str]) -> list[tuple[str, float]]:
    """The principals of these names, and when each was first served."""
    with database.read() as connection:
        found = look_up(connection, _earliest(), interactions.c.user_id, users)
        return [(f"{row.key_id}/{row.user_id}", row.at) for rows in found for row in rows]


def _came_without_name(database: Database) -> list[tuple[str, float]]:
    """The same of those who gave a key only."""
    with database.read() as connection:
        rows = connection.execute(_earliest().where(interactions.c.user_id.is_(None)))
        return [(f"{row.key_id}/", row.at) for row in rows]


def _earliest() -> sa.Select[Any]:
    i = interactions.c
    return sa.select(i.key_id, i.user_id, sa.func.min(i.created_at).label("at")).group_by(i.key_id, i.user_id)


def load_decisions(database: Database, alias: str) -> dict[str, bool]:
    """Whether reviewers let pairs in, by id, of those they have decided on."""
    r = pair_reviews.c
    query = sa.select(r.pair_id, r.decision).where(r.alias == alias, r.decision.is_not(None))
    with database.read() as connection:
        return {pair_id: decision == Decision.ACCEPTED for pair_id, decision in connection.execute(query)}


def save_quarantine(database: Database, alias: str, reasons: Mapping[str, str], now: float) -> None:
    """Make the queue of an alias these pairs, with the reasons that hold today; decisions stay.

    Args:
        reasons: by pair id.
    """
    r = pair_reviews.c
    waiting = sa.select(r.pair_id, r.reason).where(r.alias == alias, r.decision.is_(None))
    rows = [
        {"pair_id": pair_id, "alias": alias, "reason": reason, "quarantined_at": now}
        for pair_id, reason in reasons.items()
    ]
    with database.write() as connection:
        known: dict[str, str] = {row.pair_id: row.reason for row in connection.execute(waiting)}
        for gone in _batched(sorted(known.keys() - reasons.keys())):
            connection.execute(pair_reviews.delete().where(r.pair_id.in_(gone), r.decision.is_(None)))
        for pair_id in sorted(known.keys() & reasons.keys()):
            if known[pair_id] != reasons[pair_id]:
                connection.execute(pair_reviews.update().where(r.pair_id == pair_id).values(reason=reasons[pair_id]))
        new = [row for row in rows if row["pair_id"] not in known]
        if new:
            database.insert_new(connection, pair_reviews, new)


def list_waiting(database: Database, alias: str | None, reason: str | None, limit: int) -> list[WaitingPair]:
    """What waits for a reviewer, oldest first; of an alias, for a reason, or all."""
    r = pair_reviews.c
    query = sa.select(r.pair_id, r.reason, r.quarantined_at).join(pairs, pairs.c.id == r.pair_id)
    query = query.where(r.decision.is_(None)).order_by(r.quarantined_at, r.pair_id).limit(limit)
    if alias is not None:
        query = query.where(r.alias == alias)
    if reason is not None:
        query = query.where(r.reason == reason)
    with database.read() as connection:
        rows = connection.execute(query).all()
    found = [(row, get_pair(database, row.pair_id)) for row in rows]
    return [
        WaitingPair(pair[0].id, row.reason, pair[0].source, pair[0].principals, row.quarantined_at, pair[0])
        for row, pair in found
        if pair is not None
    ]


def decide(database: Database, pair_ids: Sequence[str], decision: Decision, *, reviewer: str, now: float) -> None:
    """Let quarantined pairs in, or keep them out, for good; a later decision replaces an earlier one.

    All of them or, if one is not in the queue, none.

    Raises:
        NegativeVerdict: the defence never held back such a pair.
    """
    with database.write() as connection:
        for pair_id in pair_ids:
            r = pair_reviews.c
            held = connection.execute(sa.select(r.alias, r.reason).where(r.pair_id == pair_id)).first()
            if held is None:
                raise NegativeVerdict(f"no pair {pair_id} is in quarantine")
            values = {"decision": decision.value, "reviewer": reviewer, "decided_at": now}
            connection.execute(pair_reviews.update().where(r.pair_id == pair_id).values(**values))
            action = "pair.accept" if decision is Decision.ACCEPTED else "pair.reject"
            note(connection, AuditEvent(now, reviewer, action, pair_id, {"alias": held.alias, "reason": held.reason}))


def _batched(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + LOOKED_UP] for start in range(0, len(names), LOOKED_UP))
