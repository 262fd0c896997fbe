"""The tools that a request offers, as chat templates and trainers read them: OpenAI's functions.

Nothing here trusts a shape: what is no function with a name is left out, so that a row comes of any request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.chat_messages import loadable

Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`."""

_FIELDS = ("name", "description", "parameters", "strict")


def offered_tools(body: Mapping[str, Any], route: str) -> tuple[Tool, ...] | None:
    """The functions that a request offers, whichever API it came by; None where there are none.

    >>> offered_tools({"tools": [{"name": "look", "input_schema": {"type": "object"}}]}, "messages")
    ({'type': 'function', 'function': {'name': 'look', 'parameters': {'type': 'object'}}},)
    """
    given = body.get("tools") if isinstance(body.get("tools"), list) else body.get("functions")
    found = tuple(_functions(given if isinstance(given, list) else [], route))
    return found or None


def tools_column(tools: tuple[Tool, ...] | None) -> dict[str, str]:
    """As TRL reads them: JSON in a text, since tables would give every function the parameters of all the others."""
    return {} if tools is None else {"tools": json.dumps(for_templates(tools))}


def for_templates(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As the engine hands them to a chat template: without a description or parameters these are there, and empty."""
    shown: list[dict[str, Any]] = loadable([_shown(tool) for tool in tools])
    return shown


def _shown(tool: Tool) -> Tool:
    function = {"name": None, "description": None, "parameters": None, **tool["function"]}
    return {"type": "function", "function": function}


def read_tools(given: object) -> tuple[Tool, ...] | None:
    """What such a column holds, or a list of tools as they are.

    Raises:
        ValueError: a text is no JSON.
    """
    read = json.loads(given) if isinstance(given, str) else given
    return offered_tools({"tools": read}, "chat.completions")


def _functions(given: list[object], route: str) -> Iterator[Tool]:
    for tool in given:
        if isinstance(tool, Mapping):
            function = _function(tool, route)
            if isinstance(function.get("name"), str):
                yield {"type": "function", "function": function}


def _function(tool: Mapping[str, Any], route: str) -> Mapping[str, Any]:
    """Chat completions wrap a function, the other APIs and the field `functions` do not."""
    if route == "messages":
        return _set_fields({**tool, "parameters": tool.get("input_schema")})
    function = tool.get("function")
    if isinstance(function, Mapping):
        return _set_fields(function)
    return _set_fields(tool) if tool.get("type", "function") == "function" else {}


def _set_fields(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: function[name] for name in _FIELDS if function.get(name) is not None}
