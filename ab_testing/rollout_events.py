"""What others are told of rollouts, in the transaction that decides: facts of Pawl's own, and no words of anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ab_testing.canary import Decision
from pawl.webhook_events import ROLLOUT, announce

if TYPE_CHECKING:
    from ab_testing.rollout_store import Rollout

UNORDERED = frozenset({"controller", "retrain", "shadow"})
"""Actors that are no people. What people give as a reason, and what they are called, is nobody else's business."""


def tell_of_start(connection: sa.Connection, rollout: Rollout, actor: str) -> None:
    announce(connection, f"{ROLLOUT}.start", _facts(rollout, actor), rollout.created_at)


def tell_of_decision(connection: sa.Connection, rollout: Rollout, decision: Decision, actor: str) -> None:
    reason = decision.reason if actor in UNORDERED else None
    data = {"verdict": decision.verdict, "weight": decision.weight, "metric": decision.metric, "reason": reason}
    announce(connection, f"{ROLLOUT}.{decision.verdict}", _facts(rollout, actor) | data, rollout.updated_at)


def _facts(rollout: Rollout, actor: str) -> dict[str, Any]:
    return {
        "rollout": rollout.id,
        "model": rollout.alias,
        "champion": rollout.champion,
        "candidate": rollout.candidate,
        "status": rollout.state.status,
        "step": rollout.state.step,
        "ordered_by": "pawl" if actor in UNORDERED else "person",
    }
