"""The record of checks whether a round was due; every query on that table is here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa

from pawl.database import Database
from pawl.round_due import Code, Decision
from pawl.schema import retrain_checks


@dataclass(frozen=True)
class Check:
    """Somebody asked whether a round was due."""

    alias: str
    at: float
    moment: float | None
    """The moment of the schedule that this was the answer to; None when a person or a CronJob asked."""
    is_due: bool
    code: str
    reason: str


def add_check(database: Database, alias: str, decision: Decision, *, at: float, moment: float | None) -> None:
    """Write down what became of the question."""
    row = {"alias": alias, "at": at, "moment": moment, "is_due": decision.is_due}
    with database.write() as connection:
        said = {"code": str(decision.code), "reason": decision.reason}
        database.insert_new(connection, retrain_checks, [row | said])


def newest_check(database: Database, alias: str) -> Check | None:
    """What was said last."""
    return _first(database, sa.select(retrain_checks).where(retrain_checks.c.alias == alias))


def newest_answer(database: Database, alias: str) -> Check | None:
    """What was said last to the schedule."""
    is_answer = retrain_checks.c.moment.is_not(None)
    query = sa.select(retrain_checks).where(retrain_checks.c.alias == alias, is_answer)
    return _first(database, query.order_by(retrain_checks.c.moment.desc()))


def count_answers(database: Database, alias: str, moment: float) -> int:
    """How often a round was begun or resumed for one moment of the schedule."""
    mine = sa.and_(retrain_checks.c.alias == alias, retrain_checks.c.moment == moment, retrain_checks.c.is_due)
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one())


def count_skips(database: Database, alias: str | None = None) -> Counter[str]:
    """How often no round was due, by code."""
    code = retrain_checks.c.code
    query = sa.select(code, sa.func.count()).where(retrain_checks.c.is_due.is_(False)).group_by(code)
    if alias is not None:
        query = query.where(retrain_checks.c.alias == alias)
    with database.read() as connection:
        skips = Counter({str(code): int(n) for code, n in connection.execute(query)})
    del skips[str(Code.NEW_SCHEDULE)]  # Nothing was skipped then.
    return skips


def _first(database: Database, query: sa.Select[tuple[object, ...]]) -> Check | None:
    row = database.first_row(query.order_by(retrain_checks.c.at.desc()))
    return Check(**{str(name): value for name, value in row.items()}) if row else None
