"""Asking again where a check cannot tell, without the error rate growing with every look.

Checks on answers are looked at after the first answers to each prompt, and again each time these have doubled, up to a
bound. Each look takes a part of `alpha`, in proportion to the answers that it adds (Lan and DeMets 1983, "Discrete
sequential boundaries for clinical trials"; the spending function is alpha times the share of all answers). A loss that
is not allowed passes at some look with a probability of at most the sum of the parts, as far as each look's bound holds
and whatever the looks have in common: they see the same prompts, and how alike that makes them nobody knows beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import ndtr, ndtri

from retrain.measurements import Paired

EVIDENCE_VARIANCE = 2.0
"""What the two made-up prompts of `retrain.comparison.mean_bounds` add to a sum of squares."""


class Look(NamedTuple):
    """One look at the answers there are."""

    n_answers: int
    """To each prompt, by each model."""
    alpha: float
    """One-sided."""


def plan_looks(first: int, most: int) -> tuple[int, ...]:
    """Answers to each prompt at every look; one look where `most` is no more than `first`.

    >>> plan_looks(2, 16), plan_looks(3, 10), plan_looks(4, 1)
    ((2, 4, 8, 16), (3, 6, 10), (4,))
    """
    found = [first]
    while found[-1] < most:
        found.append(min(most, 2 * found[-1]))
    return tuple(found)


def looks_of(planned: Sequence[int], alpha: float) -> tuple[Look, ...]:
    """The planned looks, each with its part of `alpha`.

    >>> [look.alpha for look in looks_of((2, 4, 8), 0.08)]
    [0.02, 0.02, 0.04]
    """
    before = (0, *planned)
    return tuple(Look(n, alpha * (n - earlier) / planned[-1]) for earlier, n in zip(before, planned, strict=False))


def answers_at(paired: Paired, n_answers: int) -> Paired | None:
    """The first `n_answers` to each prompt; None where a prompt has fewer."""
    taken: dict[str, int] = {}
    rows = []
    for row, unit in enumerate(paired.units):
        taken[unit] = taken.get(unit, 0) + 1
        if taken[unit] <= n_answers:
            rows.append(row)
    if not taken or min(taken.values()) < n_answers:
        return None
    columns = (paired.units, paired.parent, paired.candidate)
    units, parent, candidate = (tuple(column[row] for row in rows) for column in columns)
    return Paired(units, parent, candidate)  # type: ignore[arg-type]


def chance_to_pass(n_prompts: int, look: Look, margin: float, *, disagreement: float, change: float = 0.0) -> float:
    """About how likely a check on answers passes at a look, by the normal approximation.

    Args:
        disagreement: the share of answers in which the two models differ on a prompt although neither is better there.
        change: how much better the candidate is in truth; negative is worse.

    >>> round(chance_to_pass(150, Look(1, 0.05), 0.02, disagreement=0.1), 2)
    0.17
    """
    n = n_prompts + EVIDENCE_VARIANCE
    noise = disagreement / look.n_answers * n_prompts / n**2
    half = float(ndtri(1 - look.alpha)) * math.sqrt(noise + EVIDENCE_VARIANCE / n**2)
    room = margin + change * n_prompts / n - half
    return float(ndtr(room / math.sqrt(noise))) if noise else float(room >= 0)
