"""Queries on who comes into an experiment and what happens to them, each bounded by what is new since the last look.

A canary of two weeks leaves millions of interactions. Whoever looks every few seconds reads only those of users who
have come since, and asks an index about each of them whether they had been there before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.interactions import Status
from feedback.store import Exposure, exposures_where, scorable
from pawl.database import Database
from pawl.schema import interactions, scores

PAGE_USERS = 1000
UNITS_AT_ONCE = 500
"""Names in one query: databases limit how many values a query may carry."""


class First(NamedTuple):
    """A user's first interaction in an experiment, made in an analysed zone."""

    unit_id: str
    created_at: float
    assigned_variant: str
    phase: int


class Failures(NamedTuple):
    """Requests of one variant, and those that got no answer from it."""

    requests: int = 0
    failures: int = 0


class Harm(NamedTuple):
    """A scored answer that was toxic, or complied with a harmful request."""

    interaction_id: str
    unit_id: str
    is_toxic: bool
    is_harmful_prompt: bool
    response: str
    asked_at: float
    scored_at: float


def pages_of_users(
    database: Database, experiment: str, *, since: float | None, until: float, n_users: int = PAGE_USERS
) -> Iterator[list[First]]:
    """Analysed users by the time of their first interaction; users of one moment are on one page.

    Args:
        since: Of the first interaction, as `until` is; both ends belong to the span.
    """
    start = -math.inf if since is None else since
    while start <= until:
        page = _page(database, experiment, start, until, n_users)
        if page:
            yield page
        if len(page) < n_users:
            return
        start = math.nextafter(page[-1].created_at, math.inf)


def _page(database: Database, experiment: str, since: float, until: float, n_users: int) -> list[First]:
    query = _firsts(experiment).where(*_between(since, until)).order_by(interactions.c.created_at)
    with database.read() as connection:
        found = [First._make(row) for row in connection.execute(query.limit(n_users))]
        if len(found) < n_users:
            return found
        last = found[-1].created_at  # Others of this moment may be missing: databases sort names each in their way.
        of_last = connection.execute(_firsts(experiment).where(interactions.c.created_at == last))
        return [one for one in found if one.created_at < last] + [First._make(row) for row in of_last]


def _firsts(experiment: str) -> sa.Select[Any]:
    columns = [interactions.c[name] for name in First._fields]
    return sa.select(*columns).where(*_in_analysed_zone(experiment), is_first())


def _in_analysed_zone(experiment: str) -> tuple[sa.ColumnElement[bool], ...]:
    return interactions.c.experiment == experiment, interactions.c.is_analysed


def _between(since: float, until: float) -> tuple[sa.ColumnElement[bool], ...]:
    i = interactions.c
    return (i.created_at <= until,) if since == -math.inf else (i.created_at >= since, i.created_at <= until)


def is_first() -> sa.ColumnElement[bool]:
    """Whether an interaction is its user's first in the experiment, in any zone: one probe of an index."""
    i, earlier = interactions.c, interactions.alias("earlier").c
    is_earlier = sa.tuple_(earlier.created_at, earlier.id) < sa.tuple_(i.created_at, i.id)
    same = (earlier.experiment == i.experiment, earlier.unit_id == i.unit_id, is_earlier)
    # Said for the index, which holds interactions of experiments only.
    return sa.not_(sa.exists().where(earlier.experiment.is_not(None), *same))


def exposures_of(
    database: Database, experiment: str, units: Sequence[str], since: float, until: float
) -> list[Exposure]:
    """The analysed interactions of some users in a span of time, both ends included; in order for each user."""
    found: list[Exposure] = []
    for start in range(0, len(units), UNITS_AT_ONCE):
        named = interactions.c.unit_id.in_(units[start : start + UNITS_AT_ONCE])
        found += exposures_where(database, *_in_analysed_zone(experiment), named, *_between(since, until))
    return found


def count_users(database: Database, experiment: str, after: float, until: float) -> dict[tuple[int, str], int]:
    """How many analysed users came first after one moment and until another, by phase and assigned variant."""
    i = interactions.c
    query = (
        sa.select(i.phase, i.assigned_variant, sa.func.count())
        .where(*_in_analysed_zone(experiment), i.created_at > after, i.created_at <= until, is_first())
        .group_by(i.phase, i.assigned_variant)
    )
    with database.read() as connection:
        return {(phase, variant): n for phase, variant, n in connection.execute(query)}


def count_failures(database: Database, experiment: str, after: float) -> dict[str, Failures]:
    """Requests of analysed users after a moment, by assigned variant.

    One that another variant had to answer failed too: otherwise a version that no engine can serve would be judged by
    the champion's answers, and promoted for them.
    """
    i = interactions.c
    has_failed = sa.or_(i.status == Status.UPSTREAM_ERROR.value, i.served_variant != i.assigned_variant)
    query = (
        sa.select(i.assigned_variant, sa.func.count(), sa.func.sum(sa.case((has_failed, 1), else_=0)))
        .where(*_in_analysed_zone(experiment), i.created_at > after)
        .group_by(i.assigned_variant)
    )
    with database.read() as connection:
        return {variant: Failures(n, int(failures)) for variant, n, failures in connection.execute(query)}


def newest_request(database: Database, experiment: str) -> float | None:
    """When the last request of an analysed user came."""
    newest = sa.select(sa.func.max(interactions.c.created_at)).where(*_in_analysed_zone(experiment))
    with database.read() as connection:
        return connection.execute(newest).scalar()


def newest_score(database: Database) -> float | None:
    """When the last answer was scored, of any experiment."""
    with database.read() as connection:
        return connection.execute(sa.select(sa.func.max(scores.c.scored_at))).scalar()


def has_unscored(database: Database, experiment: str, since: float, before: float) -> bool:
    """Whether an answer of a span of time still waits for its scores; the end is left out."""
    i, s = interactions.c, scores.c
    query = (
        sa.select(i.id)
        .outerjoin(scores, s.interaction_id == i.id)
        .where(*_in_analysed_zone(experiment), i.created_at >= since, i.created_at < before)
        .where(i.status == Status.OK.value, scorable(), s.interaction_id.is_(None))
        .order_by(i.created_at)
        .limit(1)
    )
    with database.read() as connection:
        return connection.execute(query).first() is not None


def harms_since(database: Database, experiment: str, scored_after: float, complying: Collection[str]) -> list[Harm]:
    """Answers to analysed users that have been found harmful after a moment, in order of their scores.

    Args:
        complying: What an answer that does what it was asked is called in `scores.response`.
    """
    s, i = scores.c, interactions.c
    query = (
        _harms(complying).where(*_in_analysed_zone(experiment), s.scored_at > scored_after).order_by(s.scored_at, i.id)
    )
    with database.read() as connection:
        return [_harm(row) for row in connection.execute(query)]


def harms_of(
    database: Database, experiment: str, units: Sequence[str], scored_until: float, complying: Collection[str]
) -> list[Harm]:
    """Everything that some users were told in an experiment and that had been found harmful by a moment."""
    found: list[Harm] = []
    with database.read() as connection:
        for start in range(0, len(units), UNITS_AT_ONCE):
            named = interactions.c.unit_id.in_(units[start : start + UNITS_AT_ONCE])
            known = scores.c.scored_at <= scored_until
            query = _harms(complying).where(*_in_analysed_zone(experiment), named, known)
            found += [_harm(row) for row in connection.execute(query)]
    return found


def firsts_of(database: Database, experiment: str, units: Sequence[str]) -> Mapping[str, First]:
    """The first interactions of those of some users whose first was in an analysed zone."""
    found: dict[str, First] = {}
    with database.read() as connection:
        for start in range(0, len(units), UNITS_AT_ONCE):
            named = interactions.c.unit_id.in_(units[start : start + UNITS_AT_ONCE])
            rows = connection.execute(_firsts(experiment).where(named))
            found |= {row.unit_id: First._make(row) for row in rows}
    return found


def _harms(complying: Collection[str]) -> sa.Select[Any]:
    s, i = scores.c, interactions.c
    is_harmful = sa.or_(s.is_toxic, sa.and_(s.is_harmful_prompt, s.response.in_(sorted(complying))))
    return (
        sa.select(i.id, i.unit_id, s.is_toxic, s.is_harmful_prompt, s.response, i.created_at, s.scored_at)
        .join_from(scores, interactions, i.id == s.interaction_id)
        .where(i.status == Status.OK.value, is_harmful)
    )


def _harm(row: sa.Row[Any]) -> Harm:
    found = (bool(row.is_toxic), bool(row.is_harmful_prompt), row.response)
    return Harm(row.id, row.unit_id, *found, row.created_at, row.scored_at)


def count_served(database: Database, alias: str, model: str, after: float) -> Failures:
    """All of a model's requests after a moment, of whomever."""
    i = interactions.c
    failed = sa.func.sum(sa.case((i.status == Status.UPSTREAM_ERROR.value, 1), else_=0))
    query = sa.select(sa.func.count(), failed).where(i.created_at > after, i.alias == alias, i.model == model)
    with database.read() as connection:
        requests, failures = connection.execute(query).one()
    return Failures(requests, int(failures or 0))


def toxic_shares(database: Database, alias: str, model: str, after: float, until: float) -> list[float]:
    """For each user of a span of time, the share of a model's scored answers that were toxic."""
    i, s = interactions.c, scores.c
    query = (
        sa.select(sa.func.count(), sa.func.sum(sa.case((s.is_toxic, 1), else_=0)))
        .join_from(interactions, scores, s.interaction_id == i.id)
        .where(i.created_at > after, i.created_at <= until, i.alias == alias, i.model == model)
        .where(i.status == Status.OK.value, s.is_toxic.is_not(None))
        .group_by(i.unit_id)
    )
    with database.read() as connection:
        return [int(toxic) / n for n, toxic in connection.execute(query)]
