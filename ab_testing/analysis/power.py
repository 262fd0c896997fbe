"""How many users a comparison needs, before anything is launched; of canaries see `ab_testing/forecast.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy import optimize, special

from ab_testing.errors import InsufficientData


class Design(NamedTuple):
    """Two variants of which each user's value varies with standard deviation `sd`."""

    sd: float
    """Of the value per user; of a ratio, sqrt(users x its variance) as a report of past data shows it."""
    alpha: float = 0.05
    """Two-sided."""
    treatment_share: float = 0.5


def power(design: Design, effect: float, users: float) -> float:
    """Return how likely `users` in total show a difference of `effect`, both tails counted.

    >>> round(power(Design(1.0), 0.2, 785), 3)
    0.8
    """
    shift = abs(effect) / _std_error(design, users)
    quantile = float(special.ndtri(design.alpha / 2))
    return float(special.ndtr(quantile + shift) + special.ndtr(quantile - shift))


def required_users(design: Design, effect: float, wanted: float = 0.8) -> float:
    """Return how many users in total show `effect` with probability `wanted`.

    Raises:
        InsufficientData: No number of users does.
    """
    if effect == 0 or not design.alpha < wanted < 1:
        raise InsufficientData("no number of users shows an effect of zero, or is certain to show one")
    high = 4.0
    while power(design, effect, high) < wanted:
        high *= 2
    return float(optimize.brentq(lambda users: power(design, effect, users) - wanted, 1e-9, high, xtol=1e-9))


def required_users_at_any_look(design: Design, effect: float, prior_sd: float, wanted: float = 0.8) -> float:
    """Return how many users in total let the confidence sequence show `effect` with probability `wanted` by then.

    The price of looking whenever one likes: `required_users` is for one look. The sequence is that of
    `intervals.confidence_sequence` with many degrees of freedom; it may show the effect sooner, which is not counted.

    Args:
        design: Of the comparison.
        effect: The true difference.
        prior_sd: Of the sequence: half the metric's margin, where it has one.
        wanted: The power.

    Raises:
        InsufficientData: No number of users does.
    """
    if effect == 0 or not 0 < wanted < 1:
        raise InsufficientData("no number of users shows an effect of zero, or is certain to show one")

    def missing(users: float) -> float:
        error = _std_error(design, users)
        reach = _sequence_reach(error, prior_sd, design.alpha)
        return (
            float(special.ndtr((abs(effect) - reach) / error) + special.ndtr(-(abs(effect) + reach) / error)) - wanted
        )

    high = 4.0
    while missing(high) < 0:
        high *= 2
    return float(optimize.brentq(missing, high / 2 if high > 4 else 1e-9, high, xtol=1e-9))


def _sequence_reach(error: float, prior_sd: float, alpha: float) -> float:
    """Half the width of the normal mixture: log E = log(r)/2 + t^2 (1 - r)/2 solved at E = 1/alpha."""
    shrinkage = error**2 / (error**2 + prior_sd**2)
    return error * math.sqrt((2 * math.log(1 / alpha) - math.log(shrinkage)) / (1 - shrinkage))


def detectable_effect(design: Design, users: float, wanted: float = 0.8) -> float:
    """Return the smallest effect that `users` in total show with probability `wanted`."""
    unit = _std_error(design, users)
    shift = optimize.brentq(lambda effect: power(design, effect, users) - wanted, 0.0, 60 * unit, xtol=1e-15)
    return float(shift)


def _std_error(design: Design, users: float) -> float:
    share = design.treatment_share
    return design.sd / math.sqrt(users * share * (1 - share))
