"""The engine's request schema and our table of fields, both as paths such as `messages[].content[].text`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from serving.fields.nodes import Either, Kinds, ListOf, Node, Object, Refused, Schema
from serving.fields.table import ROUTES

DATA = Path(__file__).parent / "vllm_openapi.json"
ENGINE: Mapping[str, Any] = orjson.loads(DATA.read_bytes())
MINIMAL: Mapping[str, Mapping[str, Any]] = {
    "chat.completions": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "completions": {"model": "m", "prompt": "x"},
    "responses": {"model": "m", "input": "x"},
    "embeddings": {"model": "m", "input": "x"},
    "messages": {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
}
SAMPLES = {"string": "x", "integer": 1, "number": 0.5, "boolean": True, "object": {}, "array": []}


class Carrier(NamedTuple):
    """A request that carries one field of the engine's."""

    path: str
    body: dict[str, Any]


class TablePaths(NamedTuple):
    """What a table lists and what it refuses by name."""

    listed: set[str]
    refused: dict[str, Refused]
    closed: set[str]
    """Listed values that are checked whole: an object below them cannot pass."""


def table_paths(route: str) -> TablePaths:
    """Every path of our table."""
    paths = TablePaths(set(), {}, set())
    _walk_table(ROUTES[route], "", paths)
    return paths


def _walk_table(node: Node | None, path: str, paths: TablePaths) -> None:
    match node:
        case Object():
            paths.refused.update({_below(path, name): refused for name, refused in node.refused.items()})
            for name, child in node.fields.items():
                paths.listed.add(_below(path, name))
                _walk_table(child, _below(path, name), paths)
        case Kinds():
            paths.refused.update({_below(path, kind): refused for kind, refused in node.refused.items()})
            for child in node.kinds.values():
                _walk_table(child, path, paths)
        case ListOf():
            _walk_table(node.item, path + "[]", paths)
        case Either():
            for choice in (node.text, node.items, node.object):
                _walk_table(choice, path, paths)
        case Schema():
            paths.closed.add(path)
        case None:
            pass
        case _:
            paths.closed.add(path)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def engine_paths(route: str) -> set[str]:
    """Every path that the engine's schema has for a route."""
    return {path for path, _, _ in _fields(ENGINE["routes"][route], route, "", ())}


def carriers(route: str) -> Iterator[Carrier]:
    """For every field of the engine's schema, and every kind of object it can stand in, a request that carries it."""
    for path, steps, value in _fields(ENGINE["routes"][route], route, "", ()):
        body = copy.deepcopy(dict(MINIMAL[route]))
        _put(body, steps, value)
        yield Carrier(path, body)


Step = tuple[str | None, dict[str, Any]]
"""A field's name, or None for a list's item, and what else must stand beside it."""


def _fields(
    schema: Mapping[str, Any], route: str, path: str, steps: tuple[Step, ...], seen: frozenset[str] = frozenset()
) -> Iterator[tuple[str, tuple[Step, ...], Any]]:
    if "$ref" in schema:
        if schema["$ref"] in seen:
            return
        seen |= {schema["$ref"]}
        schema = ENGINE["definitions"][f"{route}:{schema['$ref']}"]
    for part in schema.get("anyOf", ()):
        yield from _fields(part, route, path, steps, seen)
    if "items" in schema:
        yield from _fields(schema["items"], route, path + "[]", (*steps, (None, {})), seen)
    for name, part in schema.get("properties", {}).items():
        beside = {other: _sample(schema["properties"][other], route, 1) for other in schema.get("required", ())}
        beside |= {tag: _sample(schema["properties"][tag], route) for tag in _tags(schema)}
        inner = (*steps, (name, beside))
        yield _below(path, name), inner, _sample(part, route)
        yield from _fields(part, route, _below(path, name), inner, seen)


def _tags(schema: Mapping[str, Any]) -> list[str]:
    return [name for name in ("type", "role") if name in schema.get("properties", {})]


def _sample(schema: Mapping[str, Any], route: str, depth: int = 0) -> Any:
    """Some value of the shape the schema asks for."""
    if "$ref" in schema:
        return _sample(ENGINE["definitions"][f"{route}:{schema['$ref']}"], route, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _sample(schema["anyOf"][0], route, depth)
    if schema.get("type") == "object" and depth < 4:
        properties = schema.get("properties", {})
        return {name: _sample(properties[name], route, depth + 1) for name in schema.get("required", ())}
    if schema.get("type") == "array" and depth == 0:
        return [_sample(schema.get("items", {}), route, depth + 1)]
    return SAMPLES.get(schema.get("type", "string"), "x")


def _put(body: dict[str, Any], steps: tuple[Step, ...], value: Any) -> None:
    """Make the place that `steps` lead to, and put the value there. What stands at the root stays."""
    (name, _), *rest = steps
    assert name is not None
    body[name] = _built(rest, value) if rest else value


def _built(steps: list[Step], value: Any) -> Any:
    for name, beside in reversed(steps):
        value = [value] if name is None else {**beside, name: value}
    return value


def without_indices(path: str) -> str:
    """`messages[2].role` as `messages[].role`."""
    return re.sub(r"\[\d+\]", "[]", path)


def paths_of(value: Any, path: str = "") -> Iterator[str]:
    """Every path that a request's body has."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield _below(path, name)
            yield from paths_of(child, _below(path, name))
    elif isinstance(value, list):
        for child in value:
            yield from paths_of(child, path + "[]")
