"""Rollouts over HTTP: what `pawl rollout` does, by the same functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, StringConstraints

from ab_testing.canary import weight_of
from ab_testing.controller import Action
from ab_testing.rollout_orders import carry_out, describe_rollout, explain_rollout, open_rollout
from ab_testing.rollout_store import Rollout, get_rollout, list_rollouts, newest_reason
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict
from pawl.registry import get_model
from serving.admin.answers import TAG, Closed, Name, OfAlias, PathName, actor_of, administered, as_json
from serving.errors import NotFound
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway

ORDERS: dict[str, Action] = {"advance": "advance", "hold": "hold", "resume": "resume", "rollback": "roll_back"}
"""What a person may order of a rollout, and what the controller calls it."""

RolloutId = Annotated[str | None, Query(description="The rollout's id; else the newest.", max_length=64)]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


class RolloutView(BaseModel):
    """A candidate on its way."""

    id: str
    alias: str
    champion: str
    candidate: str
    status: str
    held_reason: str | None
    weight: float
    control: int
    treatment: int
    created_at: float
    updated_at: float


class DecisionView(BaseModel):
    """One line of its history."""

    id: int
    at: float
    verdict: str
    reason: str
    metric: str | None
    step: int
    weight: float
    evidence: dict[str, Any]
    actor: str


class RolloutExplained(RolloutView):
    """A rollout with every decision, oldest first."""

    decisions: list[DecisionView]


class RolloutList(BaseModel):
    """The newest first."""

    data: list[RolloutView]


class NewRollout(Closed):
    """A version to be sent out."""

    candidate: Name
    force: bool = False
    """Even a version that the gate rejected."""


class Order(Closed):
    """Why."""

    reason: Reason


class VerdictView(BaseModel):
    """How a rollout stands, for programs that wait for it."""

    rollout: str
    candidate: str
    status: str
    weight: float
    value: float
    """1 when the candidate has won, -1 when it was rolled back or given up, 0 as long as nobody knows."""
    reason: str
    """Of the newest decision; empty before the first."""


class Started(BaseModel):
    """The rollout that began."""

    rollout: str


def add_rollouts(app: FastAPI, gateway: Gateway) -> None:
    """Start, lead, end and explain."""

    @app.get(f"{ADMIN}/rollouts", tags=[TAG], response_model=RolloutList)
    async def rollouts(model: OfAlias = None) -> Response:
        """All rollouts, the newest first."""
        found = await administered(list_rollouts, gateway.database, model)
        return as_json({"data": [describe_rollout(rollout) for rollout in found]})

    @app.post(f"{ADMIN}/rollouts", tags=[TAG], response_model=Started, status_code=201)
    async def start(body: NewRollout, request: Request) -> Response:
        """Send a registered version out as a canary."""
        return as_json(await administered(start_canary, gateway, body, actor_of(request)), 201)

    @app.get(f"{ADMIN}/rollouts/{{rollout_id}}", tags=[TAG], response_model=RolloutExplained)
    async def explain(rollout_id: PathName) -> Response:
        """One rollout with every decision."""
        return as_json(await administered(explained, gateway.database, rollout_id))

    @app.get(f"{ADMIN}/verdict", tags=[TAG], response_model=VerdictView)
    async def verdict(model: OfAlias = None, rollout: RolloutId = None) -> Response:
        """How a rollout stands, or the newest one of a model: a metric for Argo Rollouts and its like."""
        return as_json(await administered(verdict_of, gateway.database, model, rollout))

    @app.post(f"{ADMIN}/rollouts/{{rollout_id}}/{{action}}", tags=[TAG], response_model=RolloutView)
    async def lead(
        rollout_id: PathName, action: Literal["advance", "hold", "resume", "rollback"], body: Order, request: Request
    ) -> Response:
        """Take the next step now, stay, end a stay, or give all traffic back to the champion."""
        order = ORDERS[action]
        return as_json(await administered(ordered, gateway, rollout_id, order, body.reason, actor_of(request)))


def known_rollout(database: Database, rollout_id: str) -> Rollout:
    """One rollout.

    Raises:
        NotFound: there is none of this id.
    """
    try:
        return get_rollout(database, rollout_id)
    except NegativeVerdict as exc:
        raise NotFound(str(exc), param="rollout_id", code="not_found") from exc


def verdict_of(database: Database, model: str | None, rollout_id: str | None) -> dict[str, Any]:
    """How a rollout stands.

    Raises:
        NotFound: there is no such rollout, or none at all yet.
    """
    rollouts = [known_rollout(database, rollout_id)] if rollout_id else list_rollouts(database, model)[:1]
    if not rollouts:
        raise NotFound("there is no rollout yet", param="model", code="not_found")
    found = rollouts[0]
    return {
        "rollout": found.id,
        "candidate": found.candidate,
        "status": found.state.status,
        "weight": weight_of(found.state, found.config),
        "value": (1.0 if found.state.status == "promoted" else -1.0) if found.state.is_final else 0.0,
        "reason": newest_reason(database, found.id),
    }


def explained(database: Database, rollout_id: str) -> dict[str, Any]:
    """A rollout and its decisions."""
    return explain_rollout(database, known_rollout(database, rollout_id))


def ordered(gateway: Gateway, rollout_id: str, action: Action, reason: str, actor: str) -> dict[str, Any]:
    """Do what a person orders of a running rollout."""
    rollout = known_rollout(gateway.database, rollout_id)
    tick = carry_out(gateway.database, rollout, action, reason, actor=actor, clock=gateway.clock)
    return describe_rollout(tick.rollout)


def start_canary(gateway: Gateway, wanted: NewRollout, actor: str) -> dict[str, str]:
    """Open a rollout for a registered version.

    Raises:
        ConfigurationError: it is a version of a model that is not served here.
    """
    settings = gateway.settings
    alias = get_model(gateway.database, wanted.candidate).alias
    if alias not in settings.serving.models:
        raise ConfigurationError(f"this gateway does not serve {alias}, of which {wanted.candidate} is a version")
    opened = open_rollout(
        gateway.database, settings, alias, wanted.candidate, actor=actor, clock=gateway.clock, is_forced=wanted.force
    )
    return {"rollout": opened}
