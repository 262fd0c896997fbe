"""The difference between two variants as reports show it: a rate per interaction, clustered by user."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scipy import stats

from ab_testing.errors import InsufficientData

Method = Literal["delta", "newcombe"]


@dataclass(frozen=True, slots=True)
class RatioMoments:
    """Running sums over users of x (harms, say) and n (interactions): enough for the rate and its variance."""

    users: int = 0
    x: float = 0.0
    n: float = 0.0
    xx: float = 0.0
    xn: float = 0.0
    nn: float = 0.0

    def add(self, x: float, n: float) -> RatioMoments:
        """Return the moments with one more user, who had `x` in `n` interactions."""
        return self.merge(RatioMoments(1, x, n, x * x, x * n, n * n))

    def merge(self, other: RatioMoments) -> RatioMoments:
        """Return the moments of two disjoint groups of users together."""
        return RatioMoments(
            self.users + other.users,
            self.x + other.x,
            self.n + other.n,
            self.xx + other.xx,
            self.xn + other.xn,
            self.nn + other.nn,
        )

    @classmethod
    def from_users(cls, users: Iterable[tuple[float, float]]) -> RatioMoments:
        """Return the moments of users given as (x, n).

        >>> RatioMoments.from_users([(1, 2), (0, 2)]).rate
        0.25
        """
        moments = cls()
        for x, n in users:
            moments = moments.add(x, n)
        return moments

    @property
    def rate(self) -> float:
        return self.x / self.n

    @property
    def variance_of_rate(self) -> float:
        """Delta method on the linearised residuals x - rate * n (Deng, Knoblich and Lu, KDD 2018).

        The residuals add up to zero, so their sum of squares needs no centring.
        """
        squares = self.xx - 2 * self.rate * self.xn + self.rate**2 * self.nn
        mean_n = self.n / self.users
        return max(squares, 0.0) / (self.users - 1) / mean_n**2 / self.users

    @property
    def effective_users(self) -> float:
        """How many equally active users these are worth (Kish)."""
        return self.n**2 / self.nn


@dataclass(frozen=True, slots=True)
class RateDifference:
    """Treatment minus control, with an interval of the asked coverage at one fixed look."""

    estimate: float
    ci_lower: float
    ci_upper: float
    control_rate: float
    treatment_rate: float
    control_users: int
    treatment_users: int
    method: Method


class _Interval(NamedTuple):
    lower: float
    upper: float


def rate_difference(control: RatioMoments, treatment: RatioMoments, alpha: float) -> RateDifference:
    """Compare two rates, users being the unit.

    Where a variant shows no variation at all (no event, or nothing but events), the delta method would claim certainty;
    Newcombe's interval on the effective number of users is used instead.

    Raises:
        InsufficientData: Fewer than two users in a variant, or no variation in data that are not shares.
    """
    for name, moments in (("control", control), ("treatment", treatment)):
        if moments.users < 2 or moments.n <= 0:
            raise InsufficientData(f"{name}: need at least 2 users with interactions, got {moments.users}")
    varies = min(_relative_variation(control), _relative_variation(treatment)) > 1e-12
    interval = _delta(control, treatment, alpha) if varies else _newcombe(control, treatment, alpha)
    return RateDifference(
        estimate=treatment.rate - control.rate,
        ci_lower=interval.lower,
        ci_upper=interval.upper,
        control_rate=control.rate,
        treatment_rate=treatment.rate,
        control_users=control.users,
        treatment_users=treatment.users,
        method="delta" if varies else "newcombe",
    )


def _relative_variation(moments: RatioMoments) -> float:
    """Variance against its own scale, so that rounding does not pass for variation."""
    return moments.variance_of_rate * moments.users / moments.rate**2 if moments.rate else 0.0


def _delta(control: RatioMoments, treatment: RatioMoments, alpha: float) -> _Interval:
    """Interval from Student's t with Welch's degrees of freedom."""
    first, second = control.variance_of_rate, treatment.variance_of_rate
    freedom = (first + second) ** 2 / (first**2 / (control.users - 1) + second**2 / (treatment.users - 1))
    reach = float(stats.t.isf(alpha / 2, freedom)) * math.sqrt(first + second)
    estimate = treatment.rate - control.rate
    return _Interval(estimate - reach, estimate + reach)


def _newcombe(control: RatioMoments, treatment: RatioMoments, alpha: float) -> _Interval:
    """Hybrid score interval (Newcombe, "Interval estimation for the difference", Stat. Med. 1998, method 10).

    With shares in [0, 1] a user varies at most as much as one coin, which is what counting users as coins supposes.
    """
    first, second = _wilson(control, alpha), _wilson(treatment, alpha)
    estimate = treatment.rate - control.rate
    below = math.hypot(treatment.rate - second.lower, first.upper - control.rate)
    above = math.hypot(second.upper - treatment.rate, control.rate - first.lower)
    return _Interval(estimate - below, estimate + above)


def _wilson(moments: RatioMoments, alpha: float) -> _Interval:
    rate, count = moments.rate, moments.effective_users
    if not 0 <= rate <= 1:
        raise InsufficientData("no variation between users, and the values are not shares")
    z = float(stats.norm.isf(alpha / 2))
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    return _Interval(centre - reach, centre + reach)
