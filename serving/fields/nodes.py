"""The words in which the table of request fields is written: what may stand at one place of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A field that is known and refused on purpose."""

    reason: str
    may_allow: bool = True
    """Whether `serving.allow_fields` can let it pass."""


@dataclass(frozen=True)
class Value:
    """A value that is checked as one: a number, a text, a list of plain values."""

    expected: str
    is_good: Callable[[Any], bool]


@dataclass(frozen=True)
class Object:
    """An object with these fields and no others; a field that is null counts as not given."""

    fields: Mapping[str, Node]
    refused: Mapping[str, Refused] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    expected: str = "an object"


@dataclass(frozen=True)
class Kinds:
    """An object whose fields depend on what its `tag` says."""

    tag: str
    kinds: Mapping[str, Object]
    refused: Mapping[str, Refused] = field(default_factory=dict)
    default: str | None = None
    """The kind of an object without a tag."""
    is_plain: Callable[[dict[str, Any]], bool] | None = None
    """A quick test that only good objects pass; those that fail it are looked at closely."""
    expected: str = "an object"


@dataclass(frozen=True)
class ListOf:
    """A list whose items are all alike."""

    item: Node
    low: int = 0
    high: int = 100_000

    @property
    def expected(self) -> str:
        """In words."""
        return f"a list of {self.low} to {self.high} items" if self.low else f"a list of at most {self.high} items"


@dataclass(frozen=True)
class Either:
    """A choice between JSON types, at most one node for each."""

    expected: str
    text: Value | None = None
    items: ListOf | Value | None = None
    object: Object | Kinds | None = None


@dataclass(frozen=True)
class Schema:
    """A JSON schema that an engine may compile into a grammar."""

    expected: str = "a JSON schema"


Node = Value | Object | Kinds | ListOf | Either | Schema


class Problem(tuple[str, str, str]):
    """What is wrong with a value: the path below it, the rest of the sentence that names it, and the error's code."""

    __slots__ = ()

    def __new__(cls, path: str, message: str, code: str = "invalid_type") -> Problem:
        return super().__new__(cls, (path, message, code))

    def below(self, step: str) -> Problem:
        """The same problem, seen from one level up.

        >>> Problem("[0].role", "must be text").below("messages")[0]
        'messages[0].role'
        """
        path, message, code = self
        return Problem(step + path if not path or path[0] == "[" else f"{step}.{path}", message, code)


Check = Callable[[Any], Problem | None]
"""Finds the first problem of a value, or none."""
