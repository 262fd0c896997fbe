"""What the gateway records: one interaction per completion, and the feedback events that point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
"""One chat message as the OpenAI API writes it: `role`, `content`, and whatever else came with it."""


class Status(StrEnum):
    """How an interaction ended."""

    OK = "ok"
    CLIENT_DISCONNECTED = "client_disconnected"
    UPSTREAM_ERROR = "upstream_error"
    REJECTED = "rejected"
    """The engine answered with an error of its own (4xx)."""
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class Interaction:
    """A prompt, the completion it got, and who served it to whom."""

    id: str
    """The completion id without its prefix: 48 hexadecimal digits."""
    completion_id: str
    route: str
    created_at: float
    alias: str
    """The model name the client asked for."""
    key_id: str
    user_id: str | None
    unit_id: str
    """What was hashed for the assignment; a random one when nobody was named."""
    experiment: str | None
    assigned_variant: str
    served_variant: str
    probability: float
    """Of the assigned variant, among analysed units, when the assignment was made."""
    is_analysed: bool
    phase: int
    route_version: int
    model: str
    """The served model version."""
    regenerate_of: str | None
    prompt: tuple[Message, ...] | None
    """None when the client asked for nothing to be stored."""
    prompt_sha: str | None
    completion: Message | None
    """The assistant message of the first choice."""
    parameters: Mapping[str, Any]
    """Sampling parameters of the request, texts left out."""
    finish_reason: str | None
    status: Status
    http_status: int
    is_complete: bool
    """The engine finished its answer and the finish reason is one a reader would call complete."""
    is_stored: bool
    """False for `store: false`: counted, but no text kept and never mined."""
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_ms: float
    first_byte_ms: float | None
    tools: tuple[Mapping[str, Any], ...] | None = None
    """The functions that the request offered, see `feedback.tools`; kept where the prompt is."""


@dataclass(frozen=True)
class FeedbackEvent:
    """One signal from a user, or the retraction of one. The last event of a `feedback_id` counts; history stays."""

    id: str
    feedback_id: str
    interaction_id: str
    completion_id: str
    type: str
    value: str | float | bool | None
    is_retraction: bool
    reason: str | None
    comment: str | None
    tags: Mapping[str, str] | None
    key_id: str
    user_id: str | None
    created_at: float
