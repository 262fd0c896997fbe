"""Intervals for a difference with a normal estimate: at one look, and at every look."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy import special

from ab_testing.errors import InsufficientData


class Interval(NamedTuple):
    lower: float
    upper: float


def t_interval(estimate: float, variance: float, freedom: float, alpha: float) -> Interval:
    """Return Student's interval.

    >>> t_interval(0.0, 1.0, 1e9, 0.05).upper.__round__(4)
    1.96
    """
    reach = -float(special.stdtrit(freedom, alpha / 2)) * math.sqrt(variance)
    return Interval(estimate - reach, estimate + reach)


def t_p_value(estimate: float, variance: float, freedom: float) -> float:
    """Return the two-sided p-value, from the tail itself, so that it does not vanish for large statistics."""
    return min(1.0, 2 * float(special.stdtr(freedom, -abs(estimate) / math.sqrt(variance))))


def confidence_sequence(estimate: float, variance: float, freedom: float, alpha: float, prior_sd: float) -> Interval:
    """Return an interval that holds at all looks at once.

    The t-mixture of Lindon, Ham, Tingley and Bojinov ("Anytime-Valid Linear Models and Regression Adjusted Causal
    Inference", arXiv 2210.08589), its clock being the information 1 / variance, so that a change of weights does not
    change the prior. It is as good as the normal approximation: for display, never for a promotion.

    Args:
        estimate: The difference.
        variance: Of the estimate.
        freedom: Its degrees of freedom.
        alpha: How often, over all looks, the interval may miss the truth.
        prior_sd: Size of the effects that it is best at; frozen at launch.

    Raises:
        InsufficientData: No difference can be excluded yet.
    """
    shrinkage = variance / (variance + prior_sd**2)
    # log E = log(r)/2 + (v+1)/2 [log(1 + t^2/v) - log(1 + r t^2/v)] solved for t^2/v at E = 1/alpha.
    growth = (2 * math.log(1 / alpha) - math.log(shrinkage)) / (freedom + 1)
    room = 1 - shrinkage * math.exp(growth)
    if room <= 0:
        raise InsufficientData("too few users for a confidence sequence to exclude anything")
    reach = math.sqrt(freedom * math.expm1(growth) / room * variance)
    return Interval(estimate - reach, estimate + reach)


def sequence_p_value(estimate: float, variance: float, freedom: float, prior_sd: float) -> float:
    """Return a p-value that holds at all looks at once: one over the e-value of `confidence_sequence`."""
    shrinkage = variance / (variance + prior_sd**2)
    squared = estimate**2 / variance / freedom
    log_e = 0.5 * math.log(shrinkage) + 0.5 * (freedom + 1) * (math.log1p(squared) - math.log1p(shrinkage * squared))
    return min(1.0, math.exp(-log_e)) if log_e > 0 else 1.0
