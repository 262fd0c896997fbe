"""What is kept of a call: the facts, and the bytes of its request and answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import orjson

from ab_testing.assignment import Assignment
from feedback.recording import parse_answer
from serving.call import Call
from serving.identity import unit_of
from serving.sse import EVENT_END

seconds: Final = time.perf_counter

ID_PREFIXES: Final[Mapping[str, str]] = {
    "chat.completions": "chatcmpl-",
    "completions": "cmpl-",
    "responses": "resp_",
    "embeddings": "embd-",
    "messages": "chatcmpl-",
}
"""How the ids of each route's answers begin, as the engine makes them."""
MAX_SHARED: Final = 1_000
"""Of what calls have in common; when there is more, all of it is written anew."""

_shared: Final[dict[tuple[str, str, int, Assignment, str, str], bytes]] = {}


def meta_of(call: Call) -> bytes:
    """The fields of `feedback.recording.Exchange`, as JSON."""
    now = seconds()
    request, principal, error = call.request, call.principal, call.error
    own = orjson.dumps(
        {
            "id": call.suffix,
            "completion_id": ID_PREFIXES[call.route] + call.suffix,
            "created_at": call.created_at,
            "key_id": principal.key_id,
            "user_id": principal.user or None,
            "unit_id": unit_of(principal) or call.unique,
            "regenerate_of": call.regenerate_of,
            "is_stream": request.is_stream,
            "is_stored": request.is_stored,
            "status": call.status,
            "http_status": error.status if error is not None else 200,
            "latency_ms": (now - call.started) * 1000,
            "first_byte_ms": (call.first_byte_at - call.started) * 1000 if call.first_byte_at else None,
        }
    )
    return own[:-1] + _shared_facts(call)


def _shared_facts(call: Call) -> bytes:
    """Of the way that a call took, written once for all calls that took it: the rest of an object."""
    assignment, version = call.assignment, call.known.version
    way = (call.route, call.request.alias, version, assignment, call.variant, call.model)
    facts = _shared.get(way)
    if facts is None:
        fields = {
            "route": call.route,
            "alias": call.request.alias,
            "experiment": assignment.experiment,
            "assigned_variant": assignment.variant,
            "served_variant": call.variant,
            "probability": assignment.probability,
            "is_analysed": assignment.is_analysed,
            "phase": assignment.phase,
            "route_version": version,
            "model": call.model,
        }
        if len(_shared) >= MAX_SHARED:
            _shared.clear()
        facts = _shared[way] = b"," + orjson.dumps(fields)[1:]
    return facts


def texts_of(call: Call) -> tuple[bytes, bytes]:
    """Request and answer as they were; without consent to store, only counts: the texts never reach the disk."""
    response = b"".join(call.parts)
    if call.request.is_stored:
        return call.raw, response
    return b"", without_text(response, call.route, is_stream=call.request.is_stream)


def without_text(response: bytes, route: str, *, is_stream: bool) -> bytes:
    """An answer reduced to its counts, in the shape of its route."""
    answer = parse_answer(response, is_stream, route)
    prompt, completion, reason = answer.prompt_tokens, answer.completion_tokens, answer.finish_reason
    usage: dict[str, int | None]
    if route == "messages":
        usage = {"input_tokens": prompt, "output_tokens": completion}
        stop = {"end_turn": "end_turn", "stop": "end_turn", "length": "max_tokens"}.get(reason or "", reason)
        event = {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}
        return _event(event) if is_stream else orjson.dumps({"stop_reason": stop, "usage": usage})
    if route == "responses":
        usage = {"input_tokens": prompt, "output_tokens": completion}
        done = {"status": "incomplete" if reason == "length" else "completed", "usage": usage}
        return _event({"type": "response.completed", "response": done}) if is_stream else orjson.dumps(done)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    counted = {"choices": [{"finish_reason": reason}], "usage": usage}
    return _event(counted) if is_stream else orjson.dumps(counted)


def _event(data: object) -> bytes:
    return b"data: " + orjson.dumps(data) + EVENT_END
