"""P-values of several comparisons, corrected for there being several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Correction = Literal["holm", "bh"]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that bound the chance of any false claim (Holm, Scand. J. Stat. 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = _ascending(p_values)
    adjusted, worst = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, p_values[place] * (len(order) - rank))
        adjusted[place] = min(worst, 1.0)
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values that bound the expected share of false ones among the claims (JRSS-B 1995).

    >>> [round(p, 3) for p in benjamini_hochberg([0.01, 0.04, 0.03])]
    [0.03, 0.04, 0.04]
    """
    order = _ascending(p_values)
    adjusted, best = [0.0] * len(order), 1.0
    for rank in reversed(range(len(order))):
        place = order[rank]
        best = min(best, p_values[place] * len(order) / (rank + 1))
        adjusted[place] = best
    return adjusted


def corrected(p_values: Sequence[float], correction: Correction) -> list[float]:
    """Return the p-values corrected in the way of that name."""
    return holm(p_values) if correction == "holm" else benjamini_hochberg(p_values)


def _ascending(p_values: Sequence[float]) -> list[int]:
    return sorted(range(len(p_values)), key=p_values.__getitem__)
