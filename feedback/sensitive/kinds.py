"""What a kind of secret or personal data looks like, and where one stands in a text. Pure.

Every pattern is linear in the length of the text: runs are bounded or possessive, and a match that is none in the end
is at most a few hundred characters long. What has a check digit must pass it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Span = Callable[[str], int]
"""How many characters of what a pattern found are really one; 0 where it only looks like one."""


class Kind(NamedTuple):
    """One kind of thing that no model should learn by heart."""

    name: str
    """What a placeholder calls it."""
    pattern: re.Pattern[str]
    span_of: Callable[[re.Match[str]], int]
    gate: str = ""
    """A text without this has none."""
    group: int = 0
    """Where in a match it lies; the rest stands around it."""
    is_costly: bool = False
    """To check a match takes much longer than to find it."""


class Place(NamedTuple):
    """Where a match stands in its text, and how much of it is real: `end == start` for a look-alike."""

    start: int
    end: int


def kind(name: str, pattern: str, *, gate: str = "", span: Span = len, flags: int = 0, is_costly: bool = False) -> Kind:
    """A kind whose pattern is still text, and whose check needs nothing but what was found: group 1 if there is one."""
    compiled = re.compile(pattern, flags)
    group = min(compiled.groups, 1)
    return Kind(name, compiled, lambda match: span(match.group(group)), gate, group, is_costly)


def whole_if(test: Callable[[str], bool]) -> Span:
    """All of it, or nothing."""
    return lambda found: len(found) if test(found) else 0


def places(each: Kind, text: str) -> Iterator[Place]:
    """Every match of a kind, real or not. What follows within a match may be another one, so the search goes on there.

    >>> list(places(kind("NUMBER", "[0-9]{1,3}", span=whole_if("42".__eq__)), "7 and 42"))
    [Place(start=0, end=0), Place(start=6, end=8)]
    """
    at = 0
    while (match := each.pattern.search(text, at)) is not None:
        start = match.start(each.group)
        end = start + each.span_of(match)
        yield Place(start, end)
        at = max(end, match.start() + 1)
