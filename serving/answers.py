"""What a client is told when things go wrong: the body, the head, and how it is counted."""

from __future__ import annotations

from monitoring.metrics import Outcome
from serving.client import JSON_TYPE, header_value
from serving.engine_errors import EngineRefused
from serving.errors import ApiError, Overloaded, RateLimited, UpstreamFailed, UpstreamTimeout


def error_body_for(route: str, error: ApiError) -> bytes:
    """OpenAI's error object; for Anthropic's route with what its clients look for beside it."""
    body = error.body()
    return b'{"type":"error",' + body[1:] if route == "messages" else body


def error_lines(request_id: bytes, error: ApiError) -> bytes:
    """The head of an error answer."""
    extra = (b"%b: %b\r\n" % (name.encode(), header_value(value)) for name, value in error.headers.items())
    return b"".join((b"x-request-id: ", request_id, b"\r\n", JSON_TYPE, *extra))


def records_refused() -> Overloaded:
    """The disk refuses, and the configuration wants every answer recorded."""
    return Overloaded("the record cannot be kept at the moment; try again", code="spool_unavailable")


def outcome_of(error: ApiError) -> Outcome:
    """The `outcome` label of an error."""
    if isinstance(error, RateLimited):
        return Outcome.RATE_LIMITED
    if isinstance(error, Overloaded):
        return Outcome.OVERLOADED
    if isinstance(error, UpstreamTimeout):
        return Outcome.TIMEOUT
    if isinstance(error, UpstreamFailed):
        return Outcome.UPSTREAM_ERROR
    return Outcome.CLIENT_ERROR if error.status < 500 or isinstance(error, EngineRefused) else Outcome.SERVER_ERROR
