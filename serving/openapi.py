"""The completion routes in OpenAPI's words, made from the same table that checks them."""

from __future__ import annotations

from typing import Any

from serving.request_fields import FIELDS_BY_ROUTE
from serving.upstream import PATHS

ERRORS = {
    "400": "The request is wrong; `error.param` names the field.",
    "404": "No such model, or no such completion to regenerate.",
    "413": "The body is too large.",
    "502": "The engine failed.",
    "503": "Overloaded, or no engine answers; `Retry-After` says when to try again.",
    "504": "The engine took too long.",
}
HEADERS = {
    "x-pawl-variant": "The variant that answered.",
    "x-pawl-model": "The model version that answered.",
    "x-pawl-feedback-token": "A short-lived pass to rate this completion.",
}


def completion_paths() -> dict[str, Any]:
    """OpenAPI path items of the hot routes."""
    return {path: {"post": _operation(route)} for route, path in PATHS.items()}


def _operation(route: str) -> dict[str, Any]:
    return {
        "tags": ["completions"],
        "summary": f"Create ({route})",
        "operationId": f"create_{route.replace('.', '_')}",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _schema(route)}}},
        "responses": {"200": _success(), **{status: {"description": text} for status, text in ERRORS.items()}},
    }


def _schema(route: str) -> dict[str, Any]:
    needed = "messages" if route == "chat.completions" else "prompt"
    properties = {name: {"description": field.expected} for name, field in FIELDS_BY_ROUTE[route].items()}
    return {"type": "object", "required": ["model", needed], "properties": properties, "additionalProperties": False}


def _success() -> dict[str, Any]:
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()}
    content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {"description": "The engine's answer, unchanged.", "headers": headers, "content": content}
