"""Interactions, feedback and scores as they come to lie in the shared database, made for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.store import Score, event_row, interaction_row, save_records, save_scores
from pawl.database import Database

SERVED: Mapping[str, Any] = {
    "route": "chat.completions",
    "alias": "assistant",
    "key_id": "",
    "experiment": None,
    "assigned_variant": "control",
    "served_variant": "control",
    "probability": 1.0,
    "is_analysed": False,
    "phase": 0,
    "route_version": 0,
    "model": "base-model",
    "regenerate_of": None,
    "is_stored": True,
}
"""What the gateway knows of a completion by nobody in particular."""


def interaction(suffix: str, **changes: Any) -> Interaction:
    """One question that was answered; `suffix` is its completion's id without the prefix."""
    fields: dict[str, Any] = {
        **SERVED,
        "id": suffix,
        "completion_id": f"chatcmpl-{suffix}",
        "created_at": 1.0,
        "user_id": "ann",
        "unit_id": "ann",
        "prompt": ({"role": "user", "content": "When do I water roses?"},),
        "prompt_sha": "0" * 64,
        "completion": {"role": "assistant", "content": "In the morning."},
        "parameters": {},
        "finish_reason": "stop",
        "status": Status.OK,
        "http_status": 200,
        "is_complete": True,
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "latency_ms": 10.0,
        "first_byte_ms": 5.0,
    }
    return Interaction(**(fields | changes))


def served(number: int, **changes: Any) -> Interaction:
    """Interaction `number`, at second `number`: one question by one user, answered and stored."""
    question = changes.pop("question", "Why is the sky blue?")
    fields: dict[str, Any] = {
        "created_at": float(number),
        "prompt": ({"role": "user", "content": question},),
        "prompt_sha": hashlib.sha256(question.encode()).hexdigest(),
        "completion": {"role": "assistant", "content": f"answer {number}"},
    }
    return interaction(interaction_id(number), **(fields | changes))


def interaction_id(number: int) -> str:
    return f"{number:048x}"


def feedback(suffix: str, kind: str = "thumbs", value: str | float | None = "up", **changes: Any) -> FeedbackEvent:
    """What somebody said of the completion with this id without its prefix; one event for each time and completion."""
    created_at = changes.get("created_at", 1.0)
    fields: dict[str, Any] = {
        "id": hashlib.sha256(f"{suffix} {created_at}".encode()).hexdigest()[:32],
        "feedback_id": f"fb_{kind}_{suffix}",
        "interaction_id": suffix,
        "completion_id": f"chatcmpl-{suffix}",
        "type": kind,
        "value": value,
        "is_retraction": False,
        "reason": None,
        "comment": None,
        "tags": None,
        "key_id": "",
        "user_id": "ann",
        "created_at": created_at,
    }
    return FeedbackEvent(**(fields | changes))


def thumb(about: int, value: str, *, at: float | None = None, is_retraction: bool = False) -> FeedbackEvent:
    """A thumb on interaction `about`, half a second after it unless `at` says otherwise."""
    created_at = about + 0.5 if at is None else at
    return feedback(interaction_id(about), value=value, created_at=created_at, is_retraction=is_retraction)


def harmless(number: int) -> Score:
    """What the scorer says of a polite answer; every third question asked for harm and was refused."""
    is_harmful = number % 3 == 0
    response = "refuse" if is_harmful else "comply"
    return Score(interaction_id(number), 0.01, False, response, is_harmful, "test", float(number))


def save(database: Database, interactions: Sequence[Interaction], events: Sequence[FeedbackEvent] = ()) -> None:
    save_records(database, [interaction_row(one) for one in interactions], [event_row(one) for one in events], [])


def save_with_scores(
    database: Database, interactions: Sequence[Interaction], events: Sequence[FeedbackEvent] = ()
) -> None:
    """As `save`, every answer scored as harmless."""
    save(database, interactions, events)
    save_scores(database, [harmless(int(one.id, 16)) for one in interactions])
