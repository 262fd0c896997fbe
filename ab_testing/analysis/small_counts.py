"""Shares with few events, where a normal approximation would claim certainty or miss a harm the control never had."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy import optimize, stats

from ab_testing.analysis.intervals import Interval

_FEW = 10
"""Events, or non-events, of a variant below which the p-value is exact."""
_SMALLEST_ALPHA = 1e-300


class Share(NamedTuple):
    """Events among coins; both may be fractions when users weigh differently."""

    events: float
    n: float

    @property
    def value(self) -> float:
        return self.events / self.n


def newcombe(control: Share, treatment: Share, alpha: float) -> Interval:
    """Return the hybrid score interval of a difference (Newcombe, Stat. Med. 1998, method 10); never of width zero.

    >>> [round(limit, 4) for limit in newcombe(Share(0, 29), Share(5, 56), 0.05)]
    [-0.0381, 0.1926]
    """
    z = float(stats.norm.isf(alpha / 2))
    first, second = wilson(control, z), wilson(treatment, z)
    estimate = treatment.value - control.value
    below = math.hypot(treatment.value - second.lower, first.upper - control.value)
    above = math.hypot(second.upper - treatment.value, control.value - first.lower)
    return Interval(estimate - below, estimate + above)


def wilson(share: Share, z: float) -> Interval:
    """Return the score interval of one share (Wilson, JASA 1927)."""
    value, n = share
    value /= n
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + (z / (2 * n)) ** 2)
    return Interval(max(centre - reach, 0.0), min(centre + reach, 1.0))


def newcombe_p_value(control: Share, treatment: Share) -> float:
    """Return the alpha at which the interval just touches zero."""
    if control.value == treatment.value:
        return 1.0

    def reaches_zero(log_alpha: float) -> float:
        interval = newcombe(control, treatment, math.exp(log_alpha))
        return interval.lower if treatment.value > control.value else -interval.upper

    smallest = math.log(_SMALLEST_ALPHA)
    if reaches_zero(smallest) > 0:
        return _SMALLEST_ALPHA
    return math.exp(optimize.brentq(reaches_zero, smallest, 0.0, xtol=1e-12, rtol=1e-12))


def share_p_value(control: Share, treatment: Share) -> float:
    """Return Fisher's exact p-value where a variant has few events, else that of the pooled score test."""
    table = [[round(share.events), round(share.n - share.events)] for share in (treatment, control)]
    if sum(row[0] for row in table) in (0, sum(map(sum, table))):
        return 1.0
    if min(min(row) for row in table) < _FEW:
        return float(stats.fisher_exact(table).pvalue)
    return float(stats.chi2_contingency(table, correction=False).pvalue)
