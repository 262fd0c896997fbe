"""JSON schemas that clients send: engines compile them into grammars, so size, depth and keywords have bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import orjson

from serving.fields.json_input import nests_too_deep
from serving.fields.nodes import Problem

MAX_SCHEMA_BYTES = 16 * 1024
MAX_SCHEMA_DEPTH = 16
MAX_COUNT = 10_000
"""For `minItems` and its kin: a grammar may be unrolled that many times."""
TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
NAMED_SCHEMAS = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value maps names to schemas: there, `pattern` is the name of a property and no keyword."""
SCHEMAS = frozenset(
    {"items", "prefixItems", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}
    | {"contains", "propertyNames", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"}
)
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
LITERALS = frozenset({"enum", "const", "default", "examples", "example", "required", "dependentRequired"})
OBJECTS = frozenset({"discriminator"})
"""Says which of several schemas an object follows; engines ignore it."""
DYNAMIC = frozenset({"$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "$anchor"})
PATTERNS = frozenset({"pattern", "patternProperties"})
LOCAL_REFERENCE = re.compile(r"#(/(\$defs|definitions)/[^/]+|(/properties/[^/]+|/items)+)?")
"""Points at a schema that is looked at anyway, never into a literal that only a reference would make one."""


def check_json_schema(schema: object, *, may_match_patterns: bool = False) -> Problem | None:
    """The first thing about a schema that an engine should not see."""
    if not isinstance(schema, dict):
        return Problem("", "must be a JSON schema: an object")
    written = orjson.dumps(schema)
    if len(written) > MAX_SCHEMA_BYTES:
        return Problem("", f"must be a JSON schema of at most {MAX_SCHEMA_BYTES} bytes")
    if nests_too_deep(written, MAX_SCHEMA_DEPTH):
        return Problem("", f"must be a JSON schema that nests at most {MAX_SCHEMA_DEPTH} deep")
    return _check_schema(schema, may_match_patterns)


def _check_schema(schema: object, may_match_patterns: bool) -> Problem | None:
    if isinstance(schema, bool):
        return None
    if isinstance(schema, list):
        return _first(((f"[{i}]", part) for i, part in enumerate(schema)), may_match_patterns)
    if not isinstance(schema, dict):
        return Problem("", "must be a JSON schema")
    for keyword, value in schema.items():
        problem = _check_keyword(keyword, value, may_match_patterns)
        if problem is not None:
            return problem.below(keyword[:80])
    return None


def _first(parts: Any, may_match_patterns: bool) -> Problem | None:
    for step, part in parts:
        problem = _check_schema(part, may_match_patterns)
        if problem is not None:
            return problem.below(step)
    return None


def _check_keyword(keyword: str, value: object, may_match_patterns: bool) -> Problem | None:
    if keyword in SCHEMAS:
        return _check_schema(value, may_match_patterns)
    if keyword in NAMED_SCHEMAS or (keyword == "patternProperties" and may_match_patterns):
        if not isinstance(value, dict):
            return Problem("", "must be an object of JSON schemas")
        return _first(((name[:80], part) for name, part in value.items()), may_match_patterns)
    check = KEYWORDS.get(keyword)
    if check is not None:
        return check(value)
    if keyword in PATTERNS and may_match_patterns:
        return None
    return None if keyword in LITERALS or keyword in OBJECTS else _check_other(keyword, value)


def _check_type(value: object) -> Problem | None:
    types = value if isinstance(value, list) else [value]
    if all(isinstance(kind, str) and kind in TYPES for kind in types):
        return None
    return Problem("", f"must be one of {', '.join(sorted(TYPES))}, or a list of them")


def _check_count(value: object) -> Problem | None:
    if value is None or (type(value) in (int, float) and 0 <= value <= MAX_COUNT):  # type: ignore[operator]
        return None
    return Problem("", f"must be a number from 0 to {MAX_COUNT}")


def _check_reference(value: object) -> Problem | None:
    if isinstance(value, str) and LOCAL_REFERENCE.fullmatch(value):
        return None
    return Problem("", "may only point into this schema: #, #/$defs/NAME, #/definitions/NAME or #/properties/NAME")


def _check_format(value: object) -> Problem | None:
    if isinstance(value, str) and value != "regex":
        return None
    return Problem("", "must be the name of a format other than regex")


def _check_other(keyword: str, value: object) -> Problem | None:
    """Notes that schemas carry; engines ignore them, unless they are an engine's own way in."""
    known_danger = keyword in PATTERNS or keyword in DYNAMIC or "regex" in keyword.lower() or "guidance" in keyword
    is_plain = not isinstance(value, dict | list) or (
        isinstance(value, list) and not any(isinstance(part, dict | list) for part in value)
    )
    if known_danger or not is_plain or keyword.startswith("%"):
        return Problem(
            "", "is not accepted in a JSON schema: the engine would compile or follow it", "unsupported_parameter"
        )
    return None


KEYWORDS: dict[str, Callable[[object], Problem | None]] = {
    "type": _check_type,
    "$ref": _check_reference,
    "format": _check_format,
    **dict.fromkeys(COUNTS, _check_count),
}
