"""Messages as chat templates read them: what the engine makes of a conversation before it renders it.

A trainer that renders the same messages must make the same of them, or it trains on a prompt that is never served.
vLLM (`renderers/chat_utils.py`) joins text parts with line breaks, reads no content as an empty text, and hands the
arguments of a tool call over as an object, for that is what templates write out as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from feedback.interactions import Message

INT64_BOUND: Final = 2**63
MAX_DEPTH: Final = 32
"""Of a tool call's arguments. JSON readers give up at their own depth, and would take the whole file with them."""


class Unfit(StrEnum):
    """Why no chat template can show a conversation as it was."""

    NOT_TEXT = "not_text"
    """An image, a sound or a file."""
    BROKEN_CALL = "broken_tool_call"
    """A tool call without a name, or one of the answer's whose arguments are no JSON object."""


def unfit(prompt: Iterable[Message], *answers: Message) -> Unfit | None:
    """Why a prompt with these answers cannot be trained on; None if it can."""
    before = tuple(prompt)
    if any(_text(message.get("content")) is None for message in (*before, *answers)):
        return Unfit.NOT_TEXT
    is_readable = all(map(_has_whole_calls, (*before, *answers))) and all(map(_can_be_repeated, answers))
    return None if is_readable else Unfit.BROKEN_CALL


def calls_tools(messages: Iterable[Message]) -> bool:
    """Whether a template must know of tools to show these messages."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def for_templates(message: Message) -> dict[str, Any]:
    """What a chat template reads of a message that is not `unfit`; fields that are not set are not there.

    >>> for_templates({"role": "user", "content": [{"type": "text", "text": "Hello?"}], "name": None})
    {'role': 'user', 'content': 'Hello?'}
    """
    said: dict[str, Any] = {"role": message.get("role", "assistant"), "content": _text(message.get("content")) or ""}
    named = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    plain: dict[str, Any] = loadable({**said, **named, **({"tool_calls": calls} if calls else {})})
    return plain


def loadable(value: Any) -> Any:
    """`value` without what readers of JSON refuse a whole file for: one odd row must not spoil the others.

    Lone surrogates become U+FFFD, numbers that are not finite null, and integers past 64 bits text.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {str(loadable(str(key))): loadable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [loadable(item) for item in value]
    return _loadable_number(value)


def _loadable_number(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -INT64_BOUND <= value < INT64_BOUND:
        return str(value)
    return value


def _text(content: object) -> str | None:
    """The text of a content; None for one that is not text alone."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        return None
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = [text for text in texts if isinstance(text, str)]
    return "\n".join(whole) if len(whole) == len(content) else None


def _has_whole_calls(message: Message) -> bool:
    """Templates know nothing of `function_call`, the field that came before `tool_calls`."""
    calls = message.get("tool_calls") or ()
    is_list = isinstance(calls, Sequence) and not isinstance(calls, str)
    return is_list and all(map(_is_named, calls)) and not message.get("function_call")


def _is_named(call: object) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _can_be_repeated(answer: Message) -> bool:
    """What the engine wrote for broken arguments, a template cannot write."""
    return all(_arguments(call["function"].get("arguments")) is not None for call in answer.get("tool_calls") or ())


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    # In the history the engine reads broken arguments as none.
    known = {"name": function["name"], "arguments": _arguments(function.get("arguments")) or {}}
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**ids, "type": "function", "function": known}


def _arguments(given: object) -> Mapping[str, Any] | None:
    """The arguments of a tool call as an object; None if they are no object."""
    if given is None or given == "":
        return {}
    try:
        read = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, Mapping) and _is_shallow(read, MAX_DEPTH) else None


def _is_shallow(value: object, depth: int) -> bool:
    if not isinstance(value, Mapping | list | tuple):
        return True
    inner = value.values() if isinstance(value, Mapping) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)
