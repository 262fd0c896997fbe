"""How good answers are, as numbers: what a reward model, a reward function and whoever ranks by them have in common."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from feedback.interactions import Message
from retrain.errors import BadData

Conversation: TypeAlias = Sequence[Message]
"""Whole: the last message is the assistant's answer, the one that is scored."""

ScoreAnswers: TypeAlias = Callable[[Sequence[Conversation]], Sequence[float]]
"""One finite number per conversation, in their order; the higher, the better the answer. The scale is its own."""

TIE = 1e-9
Z_95 = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


class Compared(NamedTuple):
    """What was made of one preference pair."""

    source: str
    chosen: float
    rejected: float

    @property
    def credit(self) -> float:
        """1 where the chosen answer scores higher, 0 where the rejected one does, 0.5 for neither."""
        difference = self.chosen - self.rejected
        return 0.5 if abs(difference) <= TIE else float(difference > 0)


class Accuracy(NamedTuple):
    """How often people's choice was found again on pairs that nothing was learned from."""

    n: int
    estimate: float | None
    """None without pairs."""
    ci_lower: float
    ci_upper: float
    by_source: dict[str, tuple[int, float]]
    """Number of pairs and accuracy."""

    @property
    def beats_chance(self) -> bool:
        """Whether even the lower end of the interval is more than a coin would get."""
        return self.ci_lower > 0.5


def accuracy_of(compared: Sequence[Compared]) -> Accuracy:
    """The share of pairs on which the scores agree with people.

    >>> accuracy_of([Compared("edit", 1.0, 0.0)] * 9 + [Compared("thumbs", 0.0, 1.0)]).estimate
    0.9
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for one in compared:
        groups[one.source].append(one.credit)
    n, total = len(compared), sum(one.credit for one in compared)
    by_source = {source: (len(credits), sum(credits) / len(credits)) for source, credits in sorted(groups.items())}
    return Accuracy(n, total / n if n else None, *wilson(total, n), by_source)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Interval of a share at 95 % (Wilson 1927, "Probable inference", eq. 4); (0, 1) without observations.

    >>> [round(end, 3) for end in wilson(9, 10)]
    [0.596, 0.982]
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def checked_scores(score: ScoreAnswers, conversations: Sequence[Conversation]) -> list[float]:
    """Scores that keep the promise: one finite number each.

    Raises:
        BadData: there are more or fewer, or one is not a finite number.
    """
    found = list(score(conversations))
    if len(found) != len(conversations):
        raise BadData(f"{len(conversations)} answers were to be scored, and {len(found)} scores came back")
    try:
        numbers = [float(one) for one in found]
    except (TypeError, ValueError) as exc:
        raise BadData("a score is not a number") from exc
    if not all(map(math.isfinite, numbers)):
        raise BadData("a score is infinite or not a number")
    return numbers
