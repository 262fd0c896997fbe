"""What a client gets in place of an answer that a guard withholds, in the shape of the route it asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

REFUSAL = "I'm sorry, but I can't help with that."
FILTERED = "content_filter"
DONE = b"data: [DONE]\n\n"
CHARS_PER_TOKEN = 4
"""Of a stream that was cut before the engine had counted, roughly."""
NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
CHAT_OBJECTS = ("chat.completion", "chat.completion.chunk")
TEXT_OBJECTS = ("text_completion", "text_completion")


class About(NamedTuple):
    """What every answer says about itself."""

    route: str
    id: str
    model: str
    created: int


def refused_request(about: About, n_choices: int = 1) -> bytes:
    """A whole answer to a request that no engine has seen."""
    if about.route == "responses":
        return orjson.dumps(_response(about, [_refusal_item(about)]))
    if about.route == "messages":
        return orjson.dumps(_message(about, [{"type": "text", "text": REFUSAL}], "refusal"))
    name = _objects(about)[0]
    choices = [{"index": index, **_refused_choice(about.route)} for index in range(n_choices)]
    return orjson.dumps({**_head(about, name), "choices": choices, "usage": NO_TOKENS})


def refused_stream(about: About, n_choices: int = 1, *, wants_usage: bool = False, n_tokens: int = 0) -> bytes:
    """The same as a stream: who speaks, the refusal, why it ends, and the end.

    Args:
        n_tokens: what the engine has written all the same.
    """
    if about.route == "responses":
        return _named_events(_response_events(about, n_tokens))
    if about.route == "messages":
        return _named_events(_message_events(about, n_tokens))
    usage = {"prompt_tokens": 0, "completion_tokens": n_tokens, "total_tokens": n_tokens}
    name, places = _objects(about)[1], range(n_choices)
    if about.route == "chat.completions":
        said = [{"role": "assistant", "content": ""}, {"content": REFUSAL, "refusal": REFUSAL}]
        pieces: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in said]
        last: dict[str, Any] = {"delta": {}, "finish_reason": FILTERED}
    else:
        pieces = [{"text": REFUSAL, "finish_reason": None}]
        last = {"text": "", "finish_reason": FILTERED}
    chunks = [_chunk(about, name, [{"index": place, **piece} for place in places]) for piece in pieces]
    chunks.append(_chunk(about, name, [{"index": place, **last} for place in places], usage))
    if wants_usage:
        chunks.append(_chunk(about, name, [], usage))
    return b"".join(chunks) + DONE


def refused_answer(answer: Mapping[str, Any], route: str, places: Sequence[int]) -> bytes:
    """An engine's answer without what it said; all else, such as what it cost, stays.

    Args:
        places: which choices are withheld, where the route has choices.
    """
    if route == "responses":
        item = _refusal_item(About(route, str(answer.get("id", "")), "", 0))
        cut = {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": [item]}
        return orjson.dumps({**answer, **cut})
    if route == "messages":
        content = [{"type": "text", "text": REFUSAL}]
        return orjson.dumps({**answer, "content": content, "stop_reason": "refusal", "stop_sequence": None})
    choices = [
        {"index": choice.get("index", place), **_refused_choice(route)} if place in places else choice
        for place, choice in enumerate(answer["choices"])
    ]
    return orjson.dumps({**answer, "choices": choices})


def cut_stream(about: About, places: Sequence[int], told: Sequence[Mapping[str, Any]]) -> bytes:
    """How a stream ends that a guard cuts off: cleanly, with the reason.

    Args:
        places: the choices that were being written.
        told: the events that have reached the client; at least one.
    """
    if about.route == "responses":
        return _cut_response(about, told)
    if about.route == "messages":
        return _cut_message(told)
    piece: dict[str, Any] = {"delta": {}} if about.route == "chat.completions" else {"text": ""}
    choices = [{"index": place, **piece, "finish_reason": FILTERED} for place in places or (0,)]
    return _chunk(about, _objects(about)[1], choices) + DONE


def _objects(about: About) -> tuple[str, str]:
    return CHAT_OBJECTS if about.route == "chat.completions" else TEXT_OBJECTS


def _head(about: About, name: str) -> dict[str, Any]:
    return {"id": about.id, "object": name, "created": about.created, "model": about.model}


def _refused_choice(route: str) -> dict[str, Any]:
    said: Mapping[str, Any] = {"text": REFUSAL}
    if route == "chat.completions":
        said = {"message": {"role": "assistant", "content": REFUSAL, "refusal": REFUSAL}}
    return {**said, "logprobs": None, "finish_reason": FILTERED}


def _chunk(
    about: About, name: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None
) -> bytes:
    counted = {"usage": usage} if usage else {}
    return b"data: " + orjson.dumps({**_head(about, name), "choices": choices, **counted}) + b"\n\n"


def _named_events(events: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


# OpenAI's Responses API.


def _response(about: About, output: Sequence[Mapping[str, Any]], n_tokens: int = 0) -> dict[str, Any]:
    return {
        "id": about.id,
        "object": "response",
        "created_at": about.created,
        "status": "incomplete",
        "error": None,
        "incomplete_details": {"reason": FILTERED},
        "instructions": None,
        "metadata": {},
        "model": about.model,
        "output": output,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": n_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": n_tokens,
        },
    }


def _refusal_item(about: About) -> dict[str, Any]:
    part = {"type": "refusal", "refusal": REFUSAL}
    return {"id": f"msg_{about.id}", "type": "message", "role": "assistant", "status": "incomplete", "content": [part]}


def _response_events(about: About, n_tokens: int) -> list[dict[str, Any]]:
    item = _refusal_item(about)
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    begun = {**_response(about, []), "status": "in_progress", "incomplete_details": None, "usage": None}
    empty = {"type": "refusal", "refusal": ""}
    opened = {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", **opened},
        {"type": "response.content_part.added", **place, "part": empty},
        {"type": "response.refusal.delta", **place, "delta": REFUSAL},
        {"type": "response.refusal.done", **place, "refusal": REFUSAL},
        {"type": "response.content_part.done", **place, "part": item["content"][0]},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.incomplete", "response": _response(about, [item], n_tokens)},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _cut_response(about: About, told: Sequence[Mapping[str, Any]]) -> bytes:
    begun = next((event["response"] for event in told if "response" in event), _response(about, []))
    said = "".join(event["delta"] for event in told if event.get("type") == "response.output_text.delta")
    part = {"type": "output_text", "text": said, "annotations": []}
    item = {**_refusal_item(about), "content": [part]}
    cut = {"status": "incomplete", "incomplete_details": {"reason": FILTERED}, "output": [item] if said else []}
    number = max((event.get("sequence_number", 0) for event in told), default=-1) + 1
    last = {"type": "response.incomplete", "response": {**begun, **cut}, "sequence_number": number}
    return _named_events([last])


# Anthropic's Messages API.


def _message(about: About, content: Sequence[Mapping[str, Any]], stop_reason: str | None) -> dict[str, Any]:
    return {
        "id": about.id,
        "type": "message",
        "role": "assistant",
        "model": about.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _message_events(about: About, n_tokens: int) -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": _message(about, [], None)},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": REFUSAL}},
        {"type": "content_block_stop", "index": 0},
        *_message_end(n_tokens),
    ]


def _cut_message(told: Sequence[Mapping[str, Any]]) -> bytes:
    open_blocks: list[int] = []
    n_chars = 0
    for event in told:
        if event.get("type") == "content_block_start":
            open_blocks.append(event["index"])
        elif event.get("type") == "content_block_stop":
            open_blocks.remove(event["index"])
        elif event.get("type") == "content_block_delta":
            n_chars += len(event["delta"].get("text", ""))
    closed = [{"type": "content_block_stop", "index": index} for index in open_blocks]
    return _named_events([*closed, *_message_end(1 + n_chars // CHARS_PER_TOKEN)])


def _message_end(n_tokens: int) -> list[dict[str, Any]]:
    ended = {"stop_reason": "refusal", "stop_sequence": None}
    return [{"type": "message_delta", "delta": ended, "usage": {"output_tokens": n_tokens}}, {"type": "message_stop"}]
