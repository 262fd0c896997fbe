"""What an engine's refusal means to the client: vLLM's error body in the gateway's own shape."""

from __future__ import annotations

import orjson

from serving.errors import ApiError, Overloaded, type_for_status

THE_REQUESTS_FAULT = frozenset({400, 413, 422})
"""What an engine answers to a request that no engine would take."""
CONTEXT_OVERFLOWS = ("context length", "maximum model length")


class EngineRefused(ApiError):
    """The engine answered with an error of its own; told to the client in our shape."""


def engine_refusal(status: int, raw: bytes) -> EngineRefused:
    """vLLM's error body in our shape; a context overflow gets the code that clients match on."""
    try:
        said = orjson.loads(raw)
    except orjson.JSONDecodeError:
        said = {}
    detail = said.get("error", said) if isinstance(said, dict) else {}
    detail = detail if isinstance(detail, dict) else {"message": detail}
    message = str(detail.get("message") or "the engine refused the request")
    param = detail.get("param")
    error = EngineRefused(message, param=param if isinstance(param, str) else None, code=_code(message), status=status)
    error.type = type_for_status(status)
    return error


def is_about_the_model(raw: bytes) -> bool:
    """Whether a 404 says that the model is missing; else it is the route that the engine does not have.

    >>> is_about_the_model(b'{"error": {"message": "The model `a` does not exist.", "param": "model"}}')
    True
    >>> is_about_the_model(b'{"detail": "Not Found"}')
    False
    """
    return b'"model"' in raw or b"does not exist" in raw or b"cannot be found" in raw


def overloaded_engine() -> Overloaded:
    """The engine itself has too much to do."""
    return Overloaded("the engine is overloaded; try again", code="engine_overloaded")


def _code(message: str) -> str | None:
    return "context_length_exceeded" if any(words in message for words in CONTEXT_OVERFLOWS) else None
