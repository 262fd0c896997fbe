"""Every query on rollouts and their decisions: a decision, its state, its route and its audit go in one transaction."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from ab_testing.canary import Decision
from ab_testing.canary_state import FINAL, CanaryConfig, CanaryState, Status
from ab_testing.experiment import Route
from ab_testing.rollout_events import tell_of_decision, tell_of_start
from ab_testing.route_store import write_route
from ab_testing.watch import Watch
from pawl import registry
from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict, StaleWrite
from pawl.registry import ModelState
from pawl.schema import audit_events, decisions, rollouts

CONTROLLER = "controller"
"""The actor of decisions that nobody ordered."""
STARTED = "rollout.start"
"""What the audit trail calls it."""


@dataclass(frozen=True)
class Reading:
    """How far a rollout's records have been read, apart from the users that were counted."""

    assigned_until: float | None = None
    """First interactions up to this moment are in the counts of assigned users."""
    scored_until: float | None = None
    """Scores up to this moment have been looked through for harmful events, but for those that came late."""
    seen: tuple[str, ...] = ()
    """Interactions found harmful lately, which are told of again and must not count twice."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        return cls(data["assigned_until"], data["scored_until"], tuple(data["seen"]))


@dataclass(frozen=True)
class Rollout:
    """A candidate on its way into service."""

    id: str
    """Also the key of its experiment in the interactions."""
    alias: str
    champion: str
    candidate: str
    config: CanaryConfig
    state: CanaryState
    maturity_s: float
    """How long after a user's first interaction the user's outcome counts."""
    cursor: tuple[float, str] | None
    """First exposure and unit of the last user that was counted; users are counted in this order."""
    created_at: float
    updated_at: float
    reading: Reading = Reading()
    watch: Watch | None = None
    """Of a promoted candidate, as long as the way back is kept open."""


@dataclass(frozen=True)
class DecisionRecord:
    """One line of a rollout's history."""

    id: int
    at: float
    verdict: str
    reason: str
    metric: str | None
    step: int
    weight: float
    evidence: Mapping[str, Any]
    actor: str


def insert_rollout(
    database: Database, rollout: Rollout, route: Route, *, epoch: int, actor: str = CONTROLLER, is_forced: bool = False
) -> None:
    """Open a rollout and send it its first users.

    Raises:
        NegativeVerdict: the alias has a running rollout.
        StaleWrite: the route changed meanwhile.
    """
    with database.write() as connection:
        running = connection.execute(
            sa.select(rollouts.c.id).where(rollouts.c.alias == rollout.alias, rollouts.c.status.not_in(FINAL))
        ).scalar()
        if running:
            raise NegativeVerdict(f"{rollout.alias} has a running rollout: {running}")
        write_route(connection, route, epoch=epoch, at=rollout.created_at)
        connection.execute(rollouts.insert().values(**_row(rollout)))
        _move_candidate(connection, rollout, ModelState.CHALLENGER, actor)
        detail = {"candidate": rollout.candidate, "is_forced": is_forced}
        note(connection, AuditEvent(rollout.created_at, actor, STARTED, rollout.id, detail))
        tell_of_start(connection, rollout, actor)


def running_rollout(database: Database, alias: str) -> Rollout | None:
    """The alias's rollout that is not over, if there is one."""
    query = sa.select(rollouts).where(rollouts.c.alias == alias, rollouts.c.status.not_in(FINAL))
    row = database.first_row(query.order_by(rollouts.c.created_at.desc()))
    return _rollout(row) if row else None


def list_rollouts(database: Database, alias: str | None = None) -> list[Rollout]:
    """The newest first."""
    query = sa.select(rollouts).order_by(rollouts.c.created_at.desc(), rollouts.c.id)
    if alias:
        query = query.where(rollouts.c.alias == alias)
    with database.read() as connection:
        return [_rollout(row) for row in connection.execute(query).mappings()]


def newest_rollout(
    database: Database, alias: str, *, status: Status | None = None, candidate: str | None = None
) -> Rollout | None:
    """The alias's newest rollout, of this status and candidate where they are given."""
    given = {"status": status, "candidate": candidate}
    wanted = [rollouts.c[name] == value for name, value in given.items() if value is not None]
    query = sa.select(rollouts).where(rollouts.c.alias == alias, *wanted)
    row = database.first_row(query.order_by(rollouts.c.created_at.desc(), rollouts.c.id))
    return _rollout(row) if row else None


def is_opened_by(database: Database, rollout_id: str, actor: str) -> bool:
    """Whether the audit trail names somebody as who opened a rollout."""
    a = audit_events.c
    query = sa.select(a.actor).where(a.subject == rollout_id, a.action == STARTED, a.actor == actor)
    return database.first_row(query) is not None


def count_rollbacks(database: Database) -> Counter[str]:
    """How many rollouts were rolled back, by the metric that decided it, `breaker` or `operator`."""
    query = (
        sa.select(decisions.c.metric, decisions.c.actor)
        .join(rollouts, rollouts.c.id == decisions.c.rollout_id)
        .where(rollouts.c.status == "rolled_back", decisions.c.verdict == "roll_back")
    )
    with database.read() as connection:
        rows = connection.execute(query).all()
    # Of the controller's decisions to roll back, only the breaker's has no metric.
    return Counter(row.metric or ("breaker" if row.actor == CONTROLLER else "operator") for row in rows)


def get_rollout(database: Database, rollout_id: str) -> Rollout:
    """One rollout.

    Raises:
        NegativeVerdict: there is none of that id.
    """
    row = database.first_row(sa.select(rollouts).where(rollouts.c.id == rollout_id))
    if row is None:
        raise NegativeVerdict(f"there is no rollout {rollout_id}")
    return _rollout(row)


def save_progress(
    database: Database,
    before: Rollout,
    after: Rollout,
    decision: Decision | None,
    route: Route | None,
    *,
    actor: str,
    epoch: int,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Keep what a tick did: the state, the decision if it is worth a record, and the route if traffic moves.

    Args:
        inputs: What the decision was made from, for `ab_testing.replay`.

    Raises:
        StaleWrite: another process moved this rollout or its route meanwhile; nothing was kept.
    """
    with database.write() as connection:
        changed = connection.execute(
            rollouts.update()
            .where(rollouts.c.id == before.id, rollouts.c.updated_at == before.updated_at)
            .values(**_row(after))
        ).rowcount
        if not changed:
            raise StaleWrite(f"rollout {before.id} moved meanwhile")
        if decision is not None:
            connection.execute(decisions.insert().values(**_decision_row(after, decision, actor, inputs)))
            held = [(state.status, state.held_reason) for state in (before.state, after.state)]
            waits_on = decision.verdict == "hold" and held[0] == held[1] and actor == CONTROLLER
            if decision.verdict != "continue" and not waits_on:
                note(connection, _audit_event(after, decision, actor))
                tell_of_decision(connection, after, decision, actor)
        if route is not None:
            write_route(connection, route, epoch=epoch, at=after.updated_at)
        if after.state.is_final and after.state.status != before.state.status:
            _end(connection, before, after, actor)


def read_history(database: Database, rollout_id: str) -> tuple[Rollout, list[DecisionRecord]]:
    """A rollout and the decisions that led to just this state of it, oldest first, whatever a tick adds meanwhile.

    Raises:
        NegativeVerdict: there is none of that id.
    """
    newest = sa.select(sa.func.max(decisions.c.id)).where(decisions.c.rollout_id == rollout_id).scalar_subquery()
    # One statement, which sees one moment. Decisions of a rollout are added one after the other, and never changed.
    row = database.first_row(sa.select(rollouts, newest.label("newest")).where(rollouts.c.id == rollout_id))
    if row is None:
        raise NegativeVerdict(f"there is no rollout {rollout_id}")
    records = list_decisions(database, rollout_id)
    return _rollout(row), [record for record in records if record.id <= (row["newest"] or 0)]


def newest_reason(database: Database, rollout_id: str) -> str:
    """Why a rollout stands where it does; empty before its first decision."""
    query = sa.select(decisions.c.reason).where(decisions.c.rollout_id == rollout_id).order_by(decisions.c.id.desc())
    with database.read() as connection:
        return connection.execute(query.limit(1)).scalar() or ""


def list_decisions(database: Database, rollout_id: str) -> list[DecisionRecord]:
    """A rollout's history, oldest first."""
    query = sa.select(decisions).where(decisions.c.rollout_id == rollout_id).order_by(decisions.c.id)
    with database.read() as connection:
        return [
            DecisionRecord(
                row["id"], row["at"], row["verdict"], row["reason"], row["metric"], row["step"], row["weight"],
                json.loads(row["evidence"]), row["actor"],
            )
            for row in connection.execute(query).mappings()
        ]  # fmt: skip


def decision_inputs(database: Database, rollout_id: str) -> dict[int, Any]:
    """What each decision was made from, as JSON, by the decision's id; people's orders have none."""
    d = decisions.c
    query = sa.select(d.id, d.inputs).where(d.rollout_id == rollout_id, d.inputs.is_not(None))
    with database.read() as connection:
        return {row.id: json.loads(row.inputs) for row in connection.execute(query)}


def count_of_other_rules(database: Database, rollout: Rollout) -> int:
    """How many of a rollout's decisions were not made by its rules and the statistics of today.

    The rules are frozen, but not how a later version of Pawl writes and weighs them.
    """
    d = decisions.c
    query = sa.select(sa.func.count()).where(d.rollout_id == rollout.id, d.config_hash != rollout.config.config_hash)
    with database.read() as connection:
        return connection.execute(query).scalar_one()


def _end(connection: sa.Connection, before: Rollout, after: Rollout, actor: str) -> None:
    is_promoted = after.state.status == "promoted"
    _move_candidate(connection, after, ModelState.CHAMPION if is_promoted else ModelState.RETIRED, actor)
    if before.state.status == "promoted" and registry.is_registered(connection, after.champion):
        registry.move(connection, after.champion, ModelState.CHAMPION, now=after.updated_at, actor=actor)


def _move_candidate(connection: sa.Connection, rollout: Rollout, state: ModelState, actor: str) -> None:
    """The registry follows in the same transaction. Models that only the engines know are in no registry."""
    if registry.is_registered(connection, rollout.candidate):
        registry.move(connection, rollout.candidate, state, now=rollout.updated_at, actor=actor)


def _audit_event(rollout: Rollout, decision: Decision, actor: str) -> AuditEvent:
    detail = {"reason": decision.reason}
    return AuditEvent(rollout.updated_at, actor, f"rollout.{decision.verdict}", rollout.id, detail)


def _decision_row(rollout: Rollout, decision: Decision, actor: str, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "rollout_id": rollout.id,
        "at": rollout.updated_at,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "metric": decision.metric,
        "step": rollout.state.step,
        "weight": decision.weight,
        "evidence": json.dumps(decision.to_json()["evidence"]),
        "config_hash": rollout.config.config_hash,
        "actor": actor,
        "inputs": None if inputs is None else json.dumps(inputs),
    }


def _row(rollout: Rollout) -> dict[str, Any]:
    state = {
        "canary": rollout.state.to_json(),
        "maturity_s": rollout.maturity_s,
        "cursor": rollout.cursor,
        "reading": asdict(rollout.reading),
        "watch": None if rollout.watch is None else rollout.watch.to_json(),
    }
    return {
        "id": rollout.id,
        "alias": rollout.alias,
        "champion": rollout.champion,
        "candidate": rollout.candidate,
        "status": rollout.state.status,
        "config": json.dumps(rollout.config.to_json()),
        "config_hash": rollout.config.config_hash,
        "state": json.dumps(state),
        "created_at": rollout.created_at,
        "updated_at": rollout.updated_at,
    }


def _rollout(row: sa.RowMapping) -> Rollout:
    state = json.loads(row["state"])
    cursor = state["cursor"]
    return Rollout(
        id=row["id"],
        alias=row["alias"],
        champion=row["champion"],
        candidate=row["candidate"],
        config=CanaryConfig.from_json(json.loads(row["config"])),
        state=CanaryState.from_json(state["canary"]),
        maturity_s=state["maturity_s"],
        cursor=(cursor[0], cursor[1]) if cursor else None,
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        # Of a rollout that an older version began, nothing has been read but users.
        reading=Reading.from_json(state["reading"]) if "reading" in state else Reading(),
        watch=Watch.from_json(state["watch"]) if state.get("watch") else None,
    )
