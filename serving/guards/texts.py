"""Which words of a request others may have written, and which words of an answer the model did; by route."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

UNTRUSTED_ROLES = frozenset({"user", "tool", "function"})
"""Who speaks for themselves or for a tool; the system and developer messages are the operator's own."""
SPOKEN = frozenset(
    {"content", "text", "reasoning", "reasoning_content", "refusal", "thinking", "arguments", "partial_json"}
    | {"message", "delta", "tool_calls", "function", "function_call"}
)
"""Keys under which an answer says something, at any depth."""
EVENT_END = b"\n\n"
DATA = b"data: "


def untrusted_texts(body: Mapping[str, Any], route: str) -> Iterator[str]:
    """The texts of a request that come from its user or from tools, newest last. Embeddings have none: nothing obeys.

    >>> messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    >>> list(untrusted_texts({"messages": messages}, "chat.completions"))
    ['b']
    """
    if route in ("chat.completions", "messages"):
        for message in body.get("messages") or ():
            if message.get("role") in UNTRUSTED_ROLES:
                yield from _texts(message.get("content"))
    elif route == "completions":
        yield from _texts(body.get("prompt"))
    elif route == "responses":
        yield from _input_texts(body.get("input"))


def _input_texts(given: object) -> Iterator[str]:
    if isinstance(given, str):
        yield given
        return
    for item in given if isinstance(given, list) else ():
        if "output" in item:
            yield from _texts(item["output"])
        elif item.get("role", "user") in UNTRUSTED_ROLES:
            yield from _texts(item.get("content"))


def _texts(content: object) -> Iterator[str]:
    """A text, or the texts of parts, of results within parts, and of several prompts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, dict):
        yield from _texts(content.get("text"))
        yield from _texts(content.get("content"))


def answer_texts(answer: Mapping[str, Any], route: str) -> dict[int, str]:
    """What a whole answer says, by choice; routes without choices have one, numbered 0."""
    if route in ("chat.completions", "completions"):
        return {
            place: said
            for place, choice in enumerate(answer.get("choices") or ())
            if (said := "\n".join(_spoken(choice)))
        }
    said = "\n".join(_spoken(answer.get("output" if route == "responses" else "content")))
    return {0: said} if said else {}


def _spoken(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _spoken(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "input" and isinstance(item, dict):  # What Anthropic's tools are called with.
                yield orjson.dumps(item).decode()
            elif key in SPOKEN and not (isinstance(item, str) and value.get("type") == item):
                yield from _spoken(item)


def stream_texts(events: bytes, route: str) -> dict[int, str]:
    """What whole events of a stream add, by choice. Events that repeat what was said before add nothing."""
    said: dict[int, str] = {}
    for event in parsed_events(events):
        for place, piece in _said_in(event, route):
            if piece:
                said[place] = said.get(place, "") + piece
    return said


def parsed_events(events: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream's events; what is none, such as comments and `[DONE]`, is left out."""
    for event in events.split(EVENT_END):
        start = event.find(DATA)
        if start < 0:
            continue
        try:
            parsed = orjson.loads(event[start + len(DATA) :])
        except orjson.JSONDecodeError:
            continue
        if isinstance(parsed, dict):
            yield parsed


def _said_in(event: Mapping[str, Any], route: str) -> Iterator[tuple[int, str]]:
    if route in ("chat.completions", "completions"):
        for choice in event.get("choices") or ():
            yield choice.get("index", 0), "".join(_spoken({**choice, "logprobs": None}))
    elif route == "messages":
        yield 0, "".join(_spoken(event.get("delta") or event.get("content_block")))
    elif isinstance(event.get("delta"), str):
        yield 0, event["delta"]
