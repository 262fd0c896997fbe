"""What may be told to others as it happens. No event holds a user's words, or anybody's name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from pawl import ids
from pawl.schema import webhook_events

ROLLOUT: Final = "rollout"
RETRAIN: Final = "retrain"
SHADOW: Final = "shadow"
TEST: Final = "webhook.test"
TYPES: Final = (
    *(f"{ROLLOUT}.{verdict}" for verdict in ("start", "advance", "hold", "resume", "promote", "roll_back", "abort")),
    *(f"{RETRAIN}.{status}" for status in ("passed", "failed", "cannot_tell", "skipped", "error", "given_up")),
    *(f"{SHADOW}.{status}" for status in ("start", "passed", "failed", "held", "stopped")),
)
"""All that endpoints can ask for; a test is sent whatever they ask for."""


class Event(NamedTuple):
    """Something that happened. Its id is the same however often it is sent."""

    id: str
    type: str
    at: float
    payload: str
    """The body as it is signed and sent: JSON in ASCII."""


def event_of(kind: str, data: Mapping[str, Any], at: float) -> Event:
    """An event that just happened."""
    body = {"type": kind, "timestamp": datetime.fromtimestamp(at, UTC).isoformat(), "data": dict(data)}
    payload = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return Event(f"evt_{ids.uuid7(at, os.urandom(ids.RANDOM_BYTES))}", kind, at, payload)


def announce(connection: sa.Connection, kind: str, data: Mapping[str, Any], at: float) -> None:
    """Write an event down inside the transaction that makes it true, so that there is never one without the other."""
    connection.execute(webhook_events.insert().values(**event_of(kind, data, at)._asdict()))


def is_wanted(kind: str, patterns: Sequence[str]) -> bool:
    """Whether an endpoint asks for events of a type.

    >>> is_wanted("rollout.hold", ["rollout.*"]), is_wanted("retrain.failed", ["rollout.*", "retrain.passed"])
    (True, False)
    """
    return any(one in ("*", kind, f"{kind.partition('.')[0]}.*") for one in patterns)


def unknown_patterns(patterns: Sequence[str]) -> list[str]:
    """Those that no event will ever match.

    >>> unknown_patterns(["*", "shadow.*", "rollout.hold", "rollout.paused"])
    ['rollout.paused']
    """
    return [one for one in patterns if not any(is_wanted(kind, [one]) for kind in TYPES)]
