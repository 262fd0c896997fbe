"""Conversations as OpenAI's Responses API and Anthropic's Messages API write them, turned into chat messages.

Nothing here trusts a shape: what cannot be read is left out, so that a row comes of any answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from feedback.interactions import Message

FINISH_BY_STOP_REASON = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
FINISH_BY_INCOMPLETE = {"max_output_tokens": "length", "content_filter": "content_filter"}
FINAL_EVENTS = ("response.completed", "response.incomplete", "response.failed")


class Said(NamedTuple):
    """What an answer says, in the words of chat completions."""

    message: dict[str, Any]
    finish_reason: str | None
    usage: Mapping[str, Any]
    """With `prompt_tokens` and `completion_tokens`."""


# Anthropic's Messages API.


def said_in_blocks(answer: Mapping[str, Any]) -> Said:
    """A whole answer of the Messages API."""
    return _said(_of_blocks(_list(answer.get("content"))), answer.get("stop_reason"), _mapping(answer.get("usage")))


def said_in_block_events(events: Iterable[Mapping[str, Any]]) -> Said:
    """A streamed one: blocks that open, grow and close, and a stop reason at the end."""
    blocks: dict[int, dict[str, Any]] = {}
    stop_reason: object = None
    usage: dict[str, Any] = {}
    for event in events:
        delta, index = _mapping(event.get("delta")), event.get("index")
        if isinstance(index, int):
            _grow_block(blocks.setdefault(index, {}), _mapping(event.get("content_block")), delta)
        stop_reason = delta.get("stop_reason") or stop_reason
        for told in (_mapping(event.get("message")).get("usage"), event.get("usage")):
            usage |= {name: n for name, n in _mapping(told).items() if n is not None}
    return _said(_of_blocks([blocks[index] for index in sorted(blocks)]), stop_reason, usage)


def _grow_block(block: dict[str, Any], opened: Mapping[str, Any], delta: Mapping[str, Any]) -> None:
    block.update({name: value for name, value in opened.items() if value is not None})
    for name, target in (("text", "text"), ("thinking", "thinking"), ("partial_json", "arguments")):
        piece = delta.get(name)
        if isinstance(piece, str):
            block[target] = _text(block.get(target)) + piece


def _said(message: dict[str, Any], stop_reason: object, usage: Mapping[str, Any]) -> Said:
    finish = FINISH_BY_STOP_REASON.get(stop_reason, stop_reason) if isinstance(stop_reason, str) else None
    return Said(message, finish, _usage(usage))


def _usage(usage: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")}


def _of_blocks(blocks: Iterable[object]) -> dict[str, Any]:
    """One assistant message from blocks; nothing at all gives an empty one."""
    texts: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    for block in map(_mapping, blocks):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_call(block.get("id"), block.get("name"), block.get("arguments") or _written(block)))
        elif kind == "thinking":
            texts["reasoning"] = texts.get("reasoning", "") + _text(block.get("thinking"))
        elif kind == "text":
            texts["content"] = texts.get("content", "") + _text(block.get("text"))
    return _message(texts, calls)


def _written(block: Mapping[str, Any]) -> str:
    return json.dumps(_mapping(block.get("input")), ensure_ascii=False)


def messages_of_blocks(body: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The conversation of a request to the Messages API."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    system = _joined(body.get("system"))
    opening = [{"role": "system", "content": system}] if system else []
    return (*opening, *(said for message in map(_mapping, messages) for said in _chat_messages(message)))


def _chat_messages(message: Mapping[str, Any]) -> Iterator[Message]:
    """Results of tools are messages of their own in a chat, and come before what the user adds."""
    role, content = _text(message.get("role")), message.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    blocks = [_mapping(block) for block in _list(content)]
    for block in blocks:
        if block.get("type") == "tool_result":
            yield _result(block.get("tool_use_id"), block.get("content"))
    rest = _of_blocks(blocks)
    if rest:
        yield {**rest, "role": role}


# OpenAI's Responses API.


def said_in_items(answer: Mapping[str, Any]) -> Said:
    """A whole answer of the Responses API."""
    message = _of_items(_list(answer.get("output")))
    return Said(message, _finish_of(answer, message), _usage(_mapping(answer.get("usage"))))


def said_in_item_events(events: Iterable[Mapping[str, Any]]) -> Said:
    """A streamed one: the last event repeats the whole answer; without it, what had been said so far."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("type") in FINAL_EVENTS:
            return said_in_items(_mapping(event.get("response")))
        index = event.get("output_index")
        if isinstance(index, int):
            _grow_item(items.setdefault(index, {}), event)
    return Said(_of_items([items[index] for index in sorted(items)]), None, {})


def _grow_item(item: dict[str, Any], event: Mapping[str, Any]) -> None:
    kind, delta = event.get("type"), event.get("delta")
    if kind in ("response.output_item.added", "response.output_item.done"):
        item.update(_mapping(event.get("item")))
    elif kind == "response.function_call_arguments.delta":
        item["arguments"] = _text(item.get("arguments")) + _text(delta)
    elif kind == "response.output_text.delta":
        _grow_part(item, "content", "output_text", _text(delta))
    elif kind == "response.reasoning_text.delta":
        _grow_part(item, "content", "reasoning_text", _text(delta))


def _grow_part(item: dict[str, Any], name: str, kind: str, piece: str) -> None:
    parts = item.setdefault(name, [])
    if isinstance(parts, list):
        parts.append({"type": kind, "text": piece})


def _finish_of(answer: Mapping[str, Any], message: Mapping[str, Any]) -> str | None:
    status = answer.get("status")
    if status == "completed":
        return "tool_calls" if "tool_calls" in message else "stop"
    if status == "incomplete":
        reason = _mapping(answer.get("incomplete_details")).get("reason")
        return FINISH_BY_INCOMPLETE.get(reason, "length") if isinstance(reason, str) else "length"
    return status if isinstance(status, str) else None


def _of_items(items: Iterable[object]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    for item in map(_mapping, items):
        kind = item.get("type")
        if kind == "function_call":
            calls.append(_call(item.get("call_id"), item.get("name"), item.get("arguments")))
        elif kind == "reasoning":
            texts["reasoning"] = texts.get("reasoning", "") + _joined(item.get("content"))
        elif kind in ("message", None):
            texts["content"] = texts.get("content", "") + _joined(item.get("content"))
    return _message(texts, calls)


def messages_of_items(body: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The conversation of a request to the Responses API."""
    asked, instructions = body.get("input"), _text(body.get("instructions"))
    opening = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(asked, str):
        return (*opening, {"role": "user", "content": asked})
    if not isinstance(asked, list):
        return None
    return (*opening, *(said for item in map(_mapping, asked) for said in _chat_message(item)))


def _chat_message(item: Mapping[str, Any]) -> Iterator[Message]:
    kind = item.get("type", "message")
    if kind == "message":
        yield {"role": _text(item.get("role")), "content": _joined(item.get("content"))}
    elif kind == "function_call_output":
        yield _result(item.get("call_id"), item.get("output"))
    elif kind == "function_call":
        yield {"role": "assistant", **_of_items([item])}


# Both.


def _message(texts: Mapping[str, str], calls: list[dict[str, Any]]) -> dict[str, Any]:
    if not texts and not calls:
        return {}
    message: dict[str, Any] = {"role": "assistant", "content": texts.get("content", "")}
    if texts.get("reasoning"):
        message["reasoning"] = texts["reasoning"]
    return message | ({"tool_calls": calls} if calls else {})


def _call(call_id: object, name: object, arguments: object) -> dict[str, Any]:
    return {
        "id": _text(call_id),
        "type": "function",
        "function": {"name": _text(name), "arguments": _text(arguments)},
    }


def _result(call_id: object, content: object) -> Message:
    return {"role": "tool", "tool_call_id": _text(call_id), "content": _joined(content)}


def _joined(content: object) -> str:
    """The texts of parts, one after the other; refusals are texts as well."""
    if isinstance(content, str):
        return content
    parts = map(_mapping, _list(content))
    return "".join(_text(part.get("text")) or _text(part.get("refusal")) for part in parts)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
