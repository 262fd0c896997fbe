"""Every query on shadow runs and what their candidates said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from ab_testing.shadow import Answered, Pair, ShadowRules
from ab_testing.shadow_sampling import ROUTE
from feedback.interactions import Interaction, Message, Status
from feedback.store import Score, get_interaction
from pawl import registry
from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.registry import ModelState
from pawl.schema import interactions, scores, shadow_answers, shadow_runs
from pawl.webhook_events import SHADOW, announce

ShadowStatus = Literal["running", "passed", "failed", "held", "stopped"]
RUNNING: ShadowStatus = "running"
_ended = interactions.c.created_at + interactions.c.latency_ms / 1000


@dataclass(frozen=True)
class ShadowRun:
    """A candidate that answers in the dark."""

    id: str
    alias: str
    champion: str
    candidate: str
    status: ShadowStatus
    reason: str
    rules: ShadowRules
    actor: str
    rollout_id: str | None
    """The canary that it went on to."""
    created_at: float
    updated_at: float


class ShadowAnswer(NamedTuple):
    """What a candidate said, or why it said nothing."""

    interaction_id: str
    answer: Message | None
    finish_reason: str | None
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_ms: float
    created_at: float


class Place(NamedTuple):
    """Where a walk through the interactions is, in the order in which they ended."""

    at: float
    id: str


class Unscored(NamedTuple):
    """A candidate's answer to an interaction, put into the interaction in the place of the champion's."""

    run_id: str
    interaction: Interaction


def insert_run(database: Database, run: ShadowRun) -> None:
    """Begin a run.

    Raises:
        NegativeVerdict: the alias has one that runs.
    """
    data = {"candidate": run.candidate, "share": run.rules.share, "goes_on": run.rules.is_ramp}
    with database.write() as connection:
        if not database.insert_new(connection, shadow_runs, [_row(run)]):
            raise NegativeVerdict(f"{run.alias} has a shadow run already")
        note(connection, AuditEvent(run.created_at, run.actor, "shadow.start", run.id, data))
        announce(connection, f"{SHADOW}.start", _facts(run), run.created_at)


def end_run(
    database: Database,
    run: ShadowRun,
    status: ShadowStatus,
    reason: str,
    *,
    actor: str,
    now: float,
    rollout_id: str | None = None,
) -> bool:
    """End a run, and tell of it; False if it was over already.

    A candidate that was to go on and is worse is retired, unless somebody has done something else with it.
    """
    values = {"status": status, "reason": reason, "rollout_id": rollout_id, "updated_at": now}
    this = sa.and_(shadow_runs.c.id == run.id, shadow_runs.c.status == RUNNING)
    with database.write() as connection:
        if not connection.execute(shadow_runs.update().where(this).values(**values)).rowcount:
            return False
        note(connection, AuditEvent(now, actor, f"shadow.{status}", run.id, {"reason": reason, "rollout": rollout_id}))
        ended = replace(run, status=status, reason=reason, rollout_id=rollout_id)
        announce(connection, f"{SHADOW}.{status}", _facts(ended) | {"reason": _told(ended)}, now)
        if status == "failed" and run.rules.is_ramp and registry.is_registered(connection, run.candidate):
            still = (ModelState.CANDIDATE,)
            registry.move(connection, run.candidate, ModelState.RETIRED, now=now, actor=actor, expected=still)
    return True


def _told(run: ShadowRun) -> str | None:
    """What a person gives as a reason stays here."""
    return None if run.status == "stopped" else run.reason


def _facts(run: ShadowRun) -> dict[str, Any]:
    return {
        "shadow": run.id,
        "model": run.alias,
        "champion": run.champion,
        "candidate": run.candidate,
        "status": run.status,
        "rollout": run.rollout_id,
    }


def running_shadow(database: Database, alias: str) -> ShadowRun | None:
    """The alias's run that is not over, if there is one."""
    row = database.first_row(
        sa.select(shadow_runs).where(shadow_runs.c.alias == alias, shadow_runs.c.status == RUNNING)
    )
    return _run(row) if row else None


def newest_shadow(database: Database, alias: str | None = None, *, candidate: str | None = None) -> ShadowRun | None:
    """The newest run, of an alias and a candidate where they are given."""
    given = {"alias": alias, "candidate": candidate}
    wanted = [shadow_runs.c[name] == value for name, value in given.items() if value is not None]
    query = sa.select(shadow_runs).where(*wanted).order_by(shadow_runs.c.created_at.desc(), shadow_runs.c.id)
    row = database.first_row(query)
    return _run(row) if row else None


def get_shadow(database: Database, run_id: str) -> ShadowRun:
    """One run.

    Raises:
        NegativeVerdict: there is none of that id.
    """
    row = database.first_row(sa.select(shadow_runs).where(shadow_runs.c.id == run_id))
    if row is None:
        raise NegativeVerdict(f"there is no shadow run {run_id}")
    return _run(row)


def answers_of_champion(
    database: Database, run: ShadowRun, after: Place, until: float, limit: int, *, longest_s: float
) -> list[Place]:
    """The next answers that the champion gave to users and that were kept, in the order in which they ended.

    Records say when a request came, and come when it is over: in the order of their beginnings, whoever has gone on to
    a short answer would never see the longer one that began before it.

    Args:
        longest_s: what one request may take.
    """
    i = interactions.c
    query = (
        sa.select(_ended, i.id)
        .where(
            i.created_at >= after.at - longest_s,
            i.created_at < until,
            _ended >= after.at,
            _ended < until,
            sa.or_(_ended > after.at, i.id > after.id),
            i.alias == run.alias,
            i.model == run.champion,
            i.route == ROUTE,
            i.is_stored,
            i.is_complete,
            i.status == Status.OK.value,
        )
        .order_by(_ended, i.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [Place(*row) for row in connection.execute(query)]


def unanswered(database: Database, run_id: str, ids: Sequence[str]) -> list[str]:
    """Those of the interactions that the candidate has not been asked, in their order."""
    a = shadow_answers.c
    with database.read() as connection:
        found = connection.execute(sa.select(a.interaction_id).where(a.run_id == run_id, a.interaction_id.in_(ids)))
        known = set(found.scalars())
    return [one for one in ids if one not in known]


def count_failures(database: Database, alias: str, since: float, *, longest_s: float) -> int:
    """Requests of users that engines of this alias have failed since, however long ago they came."""
    i = interactions.c
    is_recent = sa.and_(i.created_at >= since - longest_s, since <= _ended)
    failed = sa.and_(is_recent, i.alias == alias, i.status == Status.UPSTREAM_ERROR.value)
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(interactions).where(failed)).scalar_one())


def save_answer(database: Database, run: ShadowRun, said: ShadowAnswer) -> bool:
    """Keep what the candidate said; False if the question is gone, or the run over.

    Nobody can erase the question between this look at it and the transaction's end; who wants to then finds the answer.
    """
    i, r = interactions.c, shadow_runs.c
    kept = sa.select(i.id).where(i.id == said.interaction_id, i.is_stored, i.completion.is_not(None))
    row = {**said._asdict(), "answer": None if said.answer is None else json.dumps(said.answer)}
    with database.write() as connection:
        is_running = connection.execute(sa.select(r.id).where(r.id == run.id, r.status == RUNNING)).first()
        if is_running is None or connection.execute(kept.with_for_update(read=True)).first() is None:
            return False
        added = database.insert_new(connection, shadow_answers, [{**row, "run_id": run.id, "model": run.candidate}])
    return bool(added)


def unscored_answers(database: Database, limit: int) -> list[Unscored]:
    """Answers that no scorer has seen, oldest first."""
    a = shadow_answers.c
    query = sa.select(a.run_id, a.interaction_id, a.answer, a.finish_reason, a.completion_tokens)
    waiting = query.where(a.scored_at.is_(None), a.error.is_(None)).order_by(a.created_at).limit(limit)
    with database.read() as connection:
        rows = connection.execute(waiting).all()
    found = ((row, get_interaction(database, row.interaction_id)) for row in rows)
    return [Unscored(row.run_id, _in_its_place(one, row)) for row, one in found if one is not None]


def _in_its_place(one: Interaction, row: Any) -> Interaction:
    return replace(
        one,
        completion=json.loads(row.answer),
        finish_reason=row.finish_reason,
        completion_tokens=row.completion_tokens,
    )


def save_answer_scores(database: Database, run_ids: Sequence[str], found: Sequence[Score]) -> None:
    """Keep the scores of candidates' answers."""
    a = shadow_answers.c
    with database.write() as connection:
        for run_id, score in zip(run_ids, found, strict=True):
            values = {name: value for name, value in score._asdict().items() if name != "interaction_id"}
            this = sa.and_(a.run_id == run_id, a.interaction_id == score.interaction_id)
            connection.execute(shadow_answers.update().where(this).values(**values))


def count_answers(database: Database, run_id: str) -> Counter[str]:
    """How many answers there are: `scored`, `unscored` and, each by its name, those that failed."""
    a = shadow_answers.c
    kind = sa.func.coalesce(a.error, sa.case((a.scored_at.is_(None), "unscored"), else_="scored"))
    query = sa.select(kind, sa.func.count()).where(a.run_id == run_id).group_by(kind)
    with database.read() as connection:
        return Counter({str(name): int(n) for name, n in connection.execute(query)})


def read_joined(database: Database, run_id: str) -> list[Pair]:
    """A run's pairs in the order they came, each with both scores as far as there are any."""
    a, i, s = shadow_answers.c, interactions.c, scores.c
    query = (
        sa.select(
            i.unit_id, a.is_harmful_prompt, a.error,
            s.is_toxic, s.response, i.completion_tokens, i.latency_ms,
            a.is_toxic, a.response, a.completion_tokens, a.latency_ms,
        )
        .select_from(shadow_answers)
        .join(interactions, i.id == a.interaction_id)
        .outerjoin(scores, s.interaction_id == a.interaction_id)
        .where(a.run_id == run_id)
        .order_by(a.created_at, a.interaction_id)
    )  # fmt: skip
    with database.read() as connection:
        rows = connection.execute(query).all()
    return [Pair(unit, harm, Answered(*rest[:4]), Answered(*rest[4:]), error) for unit, harm, error, *rest in rows]


def _row(run: ShadowRun) -> dict[str, Any]:
    return {**vars(run), "rules": json.dumps(run.rules.to_json(), sort_keys=True)}


def _run(row: sa.RowMapping) -> ShadowRun:
    values = {str(name): value for name, value in row.items()}
    return ShadowRun(**values | {"rules": ShadowRules(**json.loads(row["rules"]))})
