"""From what the gateway saw on the wire to a record: the engine's answer, streamed or not, becomes one `Interaction`.

The gateway keeps the raw bytes and a few facts (`Exchange`); parsing happens here, off the hot path, when the spool is
drained. A body that cannot be parsed gives an incomplete interaction, never an error and never a lost row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import orjson

from feedback.dialects import (
    Said,
    messages_of_blocks,
    messages_of_items,
    said_in_block_events,
    said_in_blocks,
    said_in_item_events,
    said_in_items,
)
from feedback.interactions import FeedbackEvent, Interaction, Message, Status
from feedback.tools import offered_tools

COMPLETE_REASONS = frozenset({"stop", "tool_calls", "function_call"})
"""Finish reasons of an answer that ended because it was done; `length` and `content_filter` cut it short."""
TEXT_FIELDS = frozenset(
    {"messages", "prompt", "suffix", "input", "instructions", "system", "tools", "functions"}
    | {"metadata", "user", "safety_identifier", "prompt_cache_key"}
)
MAX_PARAMETERS_CHARS = 4000


@dataclass
class Exchange:
    """What the gateway knows of one completion besides the bytes. Times are seconds; latencies milliseconds."""

    id: str
    completion_id: str
    route: str
    created_at: float
    alias: str
    key_id: str
    user_id: str | None
    unit_id: str
    experiment: str | None
    assigned_variant: str
    served_variant: str
    probability: float
    is_analysed: bool
    phase: int
    route_version: int
    model: str
    regenerate_of: str | None
    is_stream: bool
    is_stored: bool
    status: str = Status.OK
    http_status: int = 200
    latency_ms: float = 0.0
    first_byte_ms: float | None = None


class Answer(NamedTuple):
    """What an engine's response says."""

    message: Message | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def parse_interaction(exchange: Exchange, request: bytes, response: bytes) -> Interaction:
    """The record of one completion from its raw request and response bodies."""
    body = _json_object(request)
    answer = parse_answer(response, exchange.is_stream, exchange.route)
    prompt = prompt_messages(body, exchange.route) if exchange.is_stored else None
    is_complete = (
        exchange.status == Status.OK and answer.message is not None and answer.finish_reason in COMPLETE_REASONS
    )
    facts = {field.name: getattr(exchange, field.name) for field in fields(Exchange) if field.name != "is_stream"}
    return Interaction(
        **(facts | {"status": Status(exchange.status)}),
        prompt=prompt,
        prompt_sha=conversation_sha(exchange.alias, prompt, body) if prompt else None,
        completion=answer.message if exchange.is_stored else None,
        parameters=_parameters(body, is_stored=exchange.is_stored),
        finish_reason=answer.finish_reason,
        is_complete=is_complete,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        tools=offered_tools(body, exchange.route) if prompt else None,
    )


def parse_answer(response: bytes, is_stream: bool, route: str = "chat.completions") -> Answer:
    """The first choice of a response, streamed (SSE) or whole. Embeddings have no choices, only their usage."""
    chunks = list(_sse_objects(response)) if is_stream else [_json_object(response)]
    if route == "responses":
        return _answer(said_in_item_events(chunks) if is_stream else said_in_items(chunks[0]))
    if route == "messages":
        return _answer(said_in_block_events(chunks) if is_stream else said_in_blocks(chunks[0]))
    return _join(chunks)


def _answer(said: Said) -> Answer:
    return Answer(
        _normal_message(said.message) if said.message else None,
        ascii(said.finish_reason)[1:-1][:32] if said.finish_reason else None,  # A column, not JSON: plain only.
        _count(said.usage.get("prompt_tokens")),
        _count(said.usage.get("completion_tokens")),
    )


def _join(chunks: Iterable[Mapping[str, Any]]) -> Answer:
    """Fold chunks into one answer; a whole response is one chunk that carries `message` in place of `delta`."""
    message: dict[str, Any] = {}
    finish_reason: str | None = None
    usage: Mapping[str, Any] = {}
    for chunk in chunks:
        usage = _mapping(chunk.get("usage")) or usage
        choice = _first_choice(chunk)
        if choice is None:
            continue
        _merge_delta(message, _choice_content(choice))
        finish_reason = choice.get("finish_reason") or finish_reason
    return _answer(Said(message, finish_reason if isinstance(finish_reason, str) else None, usage))


def _first_choice(chunk: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return None
    return next((c for c in choices if isinstance(c, dict) and c.get("index", 0) == 0), None)


def _choice_content(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    if "text" in choice:  # the older completions API
        return {"role": "assistant", "content": choice["text"]}
    return _mapping(choice.get("message")) or _mapping(choice.get("delta")) or {}


def _merge_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and isinstance(value, list):
            _merge_tool_calls(message.setdefault("tool_calls", []), value)
        elif key != "role" and isinstance(value, str) and isinstance(message.get(key), str):
            message[key] += value
        elif value is not None or key not in message:
            message[key] = value


def _merge_tool_calls(calls: list[dict[str, Any]], deltas: Iterable[Any]) -> None:
    """Streamed tool calls come in pieces: the name once, the arguments as text to be joined."""
    for position, delta in enumerate(deltas):
        piece = dict(_mapping(delta) or {})
        index = piece.pop("index", position)
        index = index if isinstance(index, int) and 0 <= index <= len(calls) else len(calls)
        if index == len(calls):
            calls.append({})
        function = {**calls[index].get("function", {})}
        _merge_delta(function, _mapping(piece.pop("function", None)) or {})
        calls[index] |= {key: value for key, value in piece.items() if value is not None}
        if function:
            calls[index]["function"] = function


def _normal_message(message: dict[str, Any]) -> Message:
    kept = {key: value for key, value in message.items() if value is not None and value != []}
    return {
        "role": "assistant",
        "content": message.get("content") or "",
        **{k: v for k, v in kept.items() if k not in ("role", "content")},
    }


def prompt_messages(body: Mapping[str, Any], route: str = "chat.completions") -> tuple[Message, ...] | None:
    """The conversation of a request: its messages, or a plain prompt as one user message.

    Of several prompts the first is meant, as of several choices. Prompts of token ids have no text, and embeddings are
    no conversations.
    """
    if route == "responses":
        return messages_of_items(body)
    if route == "messages":
        return messages_of_blocks(body)
    messages = body.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return tuple(messages)
    prompt = body.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else None


def conversation_sha(alias: str, prompt: tuple[Message, ...], body: Mapping[str, Any]) -> str:
    """A hash that is equal exactly when the same conversation (and tools) was put to the same alias."""
    canonical = json.dumps([alias, prompt, body.get("tools")], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parameters(body: Mapping[str, Any], *, is_stored: bool) -> Mapping[str, Any]:
    """How the answer was sampled, and what the caller attached to it."""
    metadata = body.get("metadata")
    attached = {"metadata": metadata} if is_stored and metadata and isinstance(metadata, dict) else {}
    return {**_sampling_parameters(body), **attached}


def _sampling_parameters(body: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = {key: value for key, value in body.items() if key not in TEXT_FIELDS}
    return parameters if len(json.dumps(parameters)) <= MAX_PARAMETERS_CHARS else {}


def _sse_objects(stream: bytes) -> Iterator[Mapping[str, Any]]:
    for line in stream.split(b"\n"):
        data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if data and data != b"[DONE]":
            yield _json_object(data)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = _lenient_json(data)
    return value if isinstance(value, dict) else {}


def _lenient_json(data: bytes) -> object:
    """What only the standard library reads: lone surrogates, as a model may write them token by token."""
    try:
        return json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def exchange_to_json(exchange: Exchange) -> bytes:
    """For the spool."""
    return orjson.dumps(asdict(exchange))


def exchange_from_json(data: bytes) -> Exchange:
    """From the spool."""
    return Exchange(**orjson.loads(data))


def event_to_json(event: FeedbackEvent) -> bytes:
    """For the spool. Through the standard library, which keeps lone surrogates; not `asdict`, which copies deeply."""
    return json.dumps(vars(event)).encode()


def event_from_json(data: bytes) -> FeedbackEvent:
    """From the spool."""
    return FeedbackEvent(**json.loads(data))
