"""What two replies of a judge, one for each order of the answers, come to: a winner with a margin, or none.

Judges favour a place, so a verdict needs the same winner in both orders (Zheng et al. 2023, arXiv:2306.05685, §3.4).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from feedback.judged.constitution import Constitution
from feedback.judged.reply import Scores, SideScores


class Outcome(StrEnum):
    """What became of two answers that went to a judge."""

    PREFERRED = "preferred"
    TIED = "tied"
    """In one of the orders at least it found both as good."""
    DISAGREED = "disagreed"
    """It preferred another answer when they changed places."""
    UNREADABLE = "unreadable"
    """Its replies were no scores, or it refused the request. The next run asks again."""


class Ruling(NamedTuple):
    """What a judge makes of two answers."""

    outcome: Outcome
    lead: float
    """How far the first answer is ahead, -1 to 1."""


UNREADABLE = Ruling(Outcome.UNREADABLE, 0.0)


def rule(forward: Scores | None, backward: Scores | None, constitution: Constitution) -> Ruling:
    """What both orders come to.

    The lead is the mean of both, in which a bonus for a place cancels out.

    Args:
        forward: the scores as the answers were given.
        backward: the scores after they changed places; `first` is what was second before. None: not to be read.
    """
    if forward is None or backward is None:
        return UNREADABLE
    leads = weighted_lead(forward, constitution), -weighted_lead(backward, constitution)
    lead = sum(leads) / 2
    if min(leads) > 0 or max(leads) < 0:
        return Ruling(Outcome.PREFERRED, lead)
    return Ruling(Outcome.DISAGREED if leads[0] * leads[1] < 0 else Outcome.TIED, lead)


def weighted_lead(scores: Scores, constitution: Constitution) -> float:
    """How far the first answer is ahead by all principles together, -1 to 1."""
    total = sum(one.weight for one in constitution.principles)
    # Rounded: sums of tenths that are equal must not differ by their order.
    return round(sum(one.weight * _lead(scores[one.id]) for one in constitution.principles) / total, 9)


def _lead(sides: SideScores) -> float:
    return sides.first - sides.second
