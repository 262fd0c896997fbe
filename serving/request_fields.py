"""Which fields of a completion request pass, and what each must look like: one readable table, no framework.

Everything not in the table is refused with the field's name. Some fields are known and refused on purpose, since they
reach code in the engine that one request can use to stop it for everybody (chat templates, regular expressions and
grammars, embeddings, cache and scheduling controls).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from serving.errors import BadRequest

Check = Callable[[Any], bool]

MAX_USER_CHARS = 512
MAX_METADATA_PAIRS, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_STOPS, MAX_STOP_CHARS = 4, 256
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Field:
    """A field that may pass: what it must be, in words and as a check."""

    expected: str
    check: Check


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float) -> Field:
    return Field(f"a number from {low:g} to {high:g}", lambda v: _is_number(v) and low <= v <= high)


def _whole(low: int, high: int) -> Field:
    return Field(f"a whole number from {low} to {high}", lambda v: _is_whole(v) and low <= v <= high)


def _is_stop(value: object) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= MAX_STOPS
        and all(isinstance(stop, str) and len(stop) <= MAX_STOP_CHARS for stop in stops)
    )


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA_PAIRS
        and all(
            len(k) <= MAX_METADATA_KEY and isinstance(v, str) and len(v) <= MAX_METADATA_VALUE for k, v in value.items()
        )
    )


def _is_logit_bias(value: object) -> bool:
    return isinstance(value, dict) and all(k.isdigit() and _is_number(v) and -100 <= v <= 100 for k, v in value.items())


def _is_response_format(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") in ("text", "json_object", "json_schema")


TEXT = Field("text", lambda v: isinstance(v, str))
BOOLEAN = Field("true or false", lambda v: isinstance(v, bool))
OBJECT = Field("an object", lambda v: isinstance(v, dict))
NAME = Field(
    f"text of at most {MAX_USER_CHARS} characters without control characters",
    lambda v: isinstance(v, str) and len(v) <= MAX_USER_CHARS and not UNPRINTABLE.search(v),
)
TOKENS = _whole(1, 1_000_000)

COMMON = {
    "model": TEXT,
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 1_000_000),
    "min_p": _number(0, 1),
    "n": _whole(1, 128),
    "stop": Field(f"text, or a list of at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters", _is_stop),
    "max_tokens": TOKENS,
    "min_tokens": _whole(0, 1_000_000),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 10),
    "logit_bias": Field("an object of token ids and biases from -100 to 100", _is_logit_bias),
    "seed": _whole(-(2**63), 2**63 - 1),
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "user": NAME,
    "safety_identifier": NAME,
    "prompt_cache_key": TEXT,
    "metadata": Field(
        f"an object of at most {MAX_METADATA_PAIRS} texts of {MAX_METADATA_VALUE} characters, keys {MAX_METADATA_KEY}",
        _is_metadata,
    ),
    "store": BOOLEAN,
    "service_tier": TEXT,
}
CHAT = COMMON | {
    "messages": Field("a list of messages, at least one", lambda v: isinstance(v, list) and len(v) > 0),
    "max_completion_tokens": TOKENS,
    "logprobs": BOOLEAN,
    "top_logprobs": _whole(0, 20),
    "tools": Field("a list", lambda v: isinstance(v, list)),
    "tool_choice": Field("text or an object", lambda v: isinstance(v, str | dict)),
    "parallel_tool_calls": BOOLEAN,
    "response_format": Field("an object whose type is text, json_object or json_schema", _is_response_format),
    "reasoning_effort": TEXT,
    "include_reasoning": BOOLEAN,
    "modalities": Field('["text"]', lambda v: v == ["text"]),
}
COMPLETIONS = COMMON | {
    "prompt": TEXT,
    "logprobs": _whole(0, 20),
    "echo": BOOLEAN,
    "best_of": _whole(1, 128),
    "suffix": TEXT,
}
FIELDS_BY_ROUTE: Mapping[str, Mapping[str, Field]] = {"chat.completions": CHAT, "completions": COMPLETIONS}
NEVER_FORWARDED = frozenset({"metadata", "store", "user", "safety_identifier", "prompt_cache_key", "service_tier"})
"""For the gateway alone: who asks and what to keep is not the engine's business."""


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request."""

    alias: str
    body: dict[str, Any]
    is_stream: bool
    wants_usage: bool
    """The client asked for the usage chunk itself."""
    is_stored: bool
    regenerate_of: str | None


def parse_completion_request(raw: bytes, route: str, *, max_depth: int, max_choices: int) -> CompletionRequest:
    """Check a request's body against the table of its route.

    Raises:
        BadRequest: what is wrong, with the field's name.
    """
    body = _parse_json(raw, max_depth)
    _check_fields(body, FIELDS_BY_ROUTE[route])
    if route == "chat.completions":
        _check_messages(body)
    elif "prompt" not in body:
        raise BadRequest("prompt is missing", param="prompt", code="missing_required_parameter")
    for name in ("n", "best_of"):
        if (body.get(name) or 1) > max_choices:
            raise BadRequest(f"{name} may be at most {max_choices} (serving.max_choices)", param=name)
    metadata = body.get("metadata") or {}
    options = body.get("stream_options") or {}
    return CompletionRequest(
        alias=body["model"],
        body=body,
        is_stream=bool(body.get("stream")),
        wants_usage=bool(options.get("include_usage")),
        is_stored=body.get("store") is not False,
        regenerate_of=metadata.get("regenerate_of"),
    )


def _parse_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"the body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    if depth_exceeds(body, max_depth):
        raise BadRequest(f"the body nests deeper than {max_depth} levels (serving.max_json_depth)", code="invalid_json")
    return body


def depth_exceeds(value: object, limit: int) -> bool:
    """Whether lists and objects nest deeper than `limit`.

    >>> depth_exceeds([[1]], 2), depth_exceeds([[1]], 1)
    (False, True)
    """
    level: list[object] = [value]
    for _ in range(limit + 1):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values()) or [None]
    if isinstance(node, list):
        return node or [None]
    return []


def _check_fields(body: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            raise BadRequest(
                f"{name[:80]!r} is not accepted by this gateway", param=name[:80], code="unsupported_parameter"
            )
        if value is not None and not field.check(value):
            raise BadRequest(f"{name} must be {field.expected}", param=name, code="invalid_type")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise BadRequest("model is missing", param="model", code="missing_required_parameter")


def _check_messages(body: Mapping[str, Any]) -> None:
    messages = body.get("messages")
    if not messages:
        raise BadRequest("messages is missing or empty", param="messages", code="missing_required_parameter")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{where} must be an object", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(f"{where}.role must be one of {', '.join(sorted(ROLES))}", param=f"{where}.role")
        _check_content(message.get("content"), f"{where}.content")


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be text or a list of parts", param=where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            raise BadRequest(f"{where} may hold text parts only: this gateway fetches no media", param=where)


def upstream_body(request: CompletionRequest, model: str) -> bytes:
    """What the engine gets: the same request for the version chosen, usage always asked for."""
    body = {name: value for name, value in request.body.items() if name not in NEVER_FORWARDED}
    body["model"] = model
    if request.is_stream:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return orjson.dumps(body)
