"""Sides that are whole, neither too short nor too long, and different from each other."""

from __future__ import annotations

from typing import Final

from feedback.filters.evidence import Evidence
from feedback.filters.message_texts import opening, plain, said
from feedback.interactions import Message
from feedback.messages import is_nothing, substance
from feedback.pairs import PreferencePair

OPENING_WORDS: Final = 8


def is_incomplete(pair: PreferencePair, evidence: Evidence) -> bool:
    """Whether there is no prompt, or a side says and does nothing or is known not to have been finished."""
    if not pair.prompt or any(_is_nothing(side) for side in (pair.chosen, pair.rejected)):
        return True
    return not all(side.is_complete for side in evidence.sides(pair))


def has_odd_length(pair: PreferencePair, min_chars: int, max_chars: int | None) -> bool:
    """Whether a side is shorter than `min_chars`, or the prompt with its longer side than `max_chars`.

    A side that calls a tool may say as little as it likes.
    """
    sides = (pair.chosen, pair.rejected)
    if any(len(said(side).strip()) < min_chars and not side.get("tool_calls") for side in sides):
        return True
    whole = sum(len(said(message)) for message in pair.prompt) + max(len(said(side)) for side in sides)
    return max_chars is not None and whole > max_chars


def is_identical(pair: PreferencePair) -> bool:
    """Whether both sides say and do the same but for case and spaces."""
    if _differ_at_once(pair.chosen.get("content"), pair.rejected.get("content")):
        return False
    return essence(pair.chosen) == essence(pair.rejected)


def _is_nothing(message: Message) -> bool:
    content = message.get("content")
    says_something = isinstance(content, str) and bool(content) and not content.isspace()
    return not says_something and is_nothing(substance(message))


def _differ_at_once(one: object, other: object) -> bool:
    """Whether the first words of two texts tell them apart: that spares nearly all pairs the whole comparison."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    first, second = opening(one, OPENING_WORDS), opening(other, OPENING_WORDS)
    return first is not None and second is not None and first != second


def essence(message: Message) -> bytes:
    """What a message says and does, but for case and spaces."""
    content = message.get("content")
    return substance({**message, "content": plain(content) if isinstance(content, str) else content})
