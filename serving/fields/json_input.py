"""Bytes to JSON, for bytes that may be hostile.

The parser itself refuses invalid UTF-8, lone surrogates, NaN and infinities. It does not mind what is refused here:
nesting, bodies made of millions of tiny values (`[[],[],...]` takes 22 to 29 times its size in memory), and keys that
appear twice. Everything runs over the bytes in C, and before any object is built where memory is at stake.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

import orjson

from serving.errors import BadRequest

MAX_CONTAINERS: Final = 50_000
"""Lists and objects in one body: 10,000 messages that are lists of parts are 30,000."""
MAX_VALUES: Final = 500_000
"""Commas in one body: every value but the first of its list or object has one."""
MAX_TEXTS: Final = 300_000
"""Texts in one body, keys among them."""
LONG_BYTES: Final = 16 * 1024
NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'[]{}",'))
NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
SPACE: Final = b" \t\n\r"
STEPS: Final = bytes(1 if chr(code) in "[{" else 0 for code in range(256))


def parse_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """A JSON object, nested at most `max_depth` deep, none of whose keys appears twice.

    Raises:
        BadRequest: what is wrong with it.
    """
    # Brackets inside texts are counted too, so this only ever looks closer than it must.
    if _count(raw, b"[") + _count(raw, b"{") > max_depth or len(raw) > MAX_VALUES:
        _check_structure(raw, max_depth)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"the body is not valid JSON: {exc}", code="invalid_json") from exc
    if type(body) is not dict:
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    if has_twice(raw, body):
        raise BadRequest("a key appears twice in one object", code="invalid_json")
    return body


def _check_structure(raw: bytes, max_depth: int) -> None:
    marks = _marks(raw)
    if marks.count(b'"') > 2 * MAX_TEXTS:
        raise _too_many()
    structure = _outside_texts(marks)
    if structure.count(b"[") + structure.count(b"{") > MAX_CONTAINERS or structure.count(b",") > MAX_VALUES:
        raise _too_many()
    if _depth(structure) > max_depth:
        raise BadRequest(f"the body nests deeper than {max_depth} levels (serving.max_json_depth)", code="invalid_json")


def _too_many() -> BadRequest:
    return BadRequest(
        f"the body holds more than {MAX_CONTAINERS} lists and objects, {MAX_TEXTS} texts or {MAX_VALUES} values",
        code="invalid_json",
    )


def _marks(raw: bytes) -> bytes:
    r"""The brackets, commas and quotes of JSON, without quotes that are escaped.

    From left to right, since a backslash that is itself escaped escapes nothing; and before anything is taken out that
    may stand between a backslash and a quote.

    >>> _marks(rb'["a\n", "[\"\\"]')
    b'["","["]'
    """
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, NOT_STRUCTURE)


def _outside_texts(marks: bytes) -> bytes:
    """The brackets and commas that are not inside a text, given JSON without its other characters.

    >>> _outside_texts(b'{"","["[{},""]}')
    b'{,[{},]}'
    """
    return b"".join(marks.split(b'"')[::2])


def _depth(structure: bytes) -> int:
    """How deep brackets nest.

    >>> _depth(b"[{},[]]"), _depth(b"")
    (2, 0)
    """
    opened = structure.translate(STEPS, b",")
    return max(accumulate(opened, lambda depth, step: depth + (step or -1), initial=0), default=0)


def nests_too_deep(text: bytes, limit: int) -> bool:
    """Whether text, if it is JSON, nests deeper than `limit`; without parsing it.

    >>> nests_too_deep(b"[[1]]", 1), nests_too_deep(b'{"a": "[["}', 1)
    (True, False)
    """
    if _count(text, b"[") + _count(text, b"{") <= limit:
        return False
    return _depth(_outside_texts(_marks(text))) > limit


def has_twice(raw: bytes, parsed: object) -> bool:
    """Whether an object of `raw` has a key twice.

    A parser keeps one of the two, so what it parsed has fewer texts than the source, and texts are counted by their
    quotes. Nothing is counted where the source is what we would write, but for white space: equal bytes without it have
    equally many keys.

    >>> has_twice(b'{"a": 1, "a" :2}', {"a": 2}), has_twice(b'{ "a": "\\\\\\"" }', {"a": '\\"'})
    (True, False)
    """
    written = orjson.dumps(parsed)
    if written == raw:
        return False
    if b"\\" not in raw:
        return _count(raw, b'"') != _quotes(written)
    return raw.translate(None, SPACE) != written.translate(None, SPACE) and _quotes(raw) != _quotes(written)


def _quotes(text: bytes) -> int:
    """Quotes that begin or end a text.

    >>> _quotes(b'["a\\\\\\\\", "\\\\""]')
    4
    """
    if b"\\" not in text:
        return _count(text, b'"')
    if b"\\\\" in text:
        text = text.replace(b"\\\\", b"")
    return text.count(b'"') - text.count(b'\\"')


def _count(text: bytes, character: bytes) -> int:
    """How often a character occurs.

    Python's own count looks at one byte after the other. Taking a character out jumps from each to the next: far
    faster in a usual request, slower in a text of nothing else, which long ones of bad will are.

    >>> _count(b"[[]", b"["), _count(b"", b"["), _count(b"[" * 100_000, b"[")
    (2, 0, 100000)
    """
    if len(text) > LONG_BYTES:
        return text.count(character)
    return len(text) - len(text.replace(character, b""))
