"""What a judge replied: a score for each principle and side, or nothing that can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from feedback.judged.constitution import Constitution
from feedback.judged.question import BEST_SCORE, SIDES

MAX_CHARS = 100_000
"""Of a reply, the end counts: models that think first say what they think before."""
MAX_STARTS = 200
"""Places at which an object is looked for."""

_DECODER = json.JSONDecoder()


class SideScores(NamedTuple):
    """How well each answer does by one principle, 0 to 1, by its place in the question."""

    first: float
    second: float


Scores = Mapping[str, SideScores]
"""By principle."""


def read_scores(reply: str, constitution: Constitution) -> Scores | None:
    """The scores in a reply; None when it has not one for each principle and side.

    Words around the object, a fence and thoughts before it are passed over. The last object that fits counts.
    """
    fitting = (scores for found in _objects(reply[-MAX_CHARS:]) if (scores := _scores(found, constitution)))
    return next(fitting, None)


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """The JSON objects in a text, those that begin last first."""
    start = len(text)
    for _ in range(MAX_STARTS):
        start = text.rfind("{", 0, start)
        if start < 0:
            return
        try:
            found, _ = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _scores(found: Mapping[str, Any], constitution: Constitution) -> Scores | None:
    given = found.get("scores", found)
    if not isinstance(given, dict):
        return None
    scores = {one.id: _sides(given.get(one.id)) for one in constitution.principles}
    whole = {name: sides for name, sides in scores.items() if sides is not None}
    return whole if len(whole) == len(scores) else None


def _sides(given: object) -> SideScores | None:
    if not isinstance(given, dict):
        return None
    first, second = (_score(given.get(side)) for side in SIDES)
    return None if first is None or second is None else SideScores(first, second)


def _score(given: object) -> float | None:
    """A score from 0 to 1, from a number that may have come as text.

    >>> _score(7), _score("7"), _score(11), _score(True), _score(float("nan"))
    (0.7, 0.7, None, None, None)
    """
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        score = float(given)
    except (ValueError, OverflowError):
        return None
    return score / BEST_SCORE if math.isfinite(score) and 0 <= score <= BEST_SCORE else None
