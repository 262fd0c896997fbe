"""The difference as a share of the control's value, the control's own noise included.

Dividing the absolute interval by the control's value pretends that this value is known.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from scipy import special

from ab_testing.analysis.effects import Comparison
from ab_testing.analysis.intervals import Interval
from ab_testing.errors import InsufficientData

RelativeMethod = Literal["log_ratio", "fieller"]


class RelativeEffect(NamedTuple):
    """Treatment over control, minus one."""

    estimate: float
    interval: Interval
    method: RelativeMethod


def relative_effect(found: Comparison, alpha: float) -> RelativeEffect:
    """Return the relative effect: on the log scale where both values are positive, else by Fieller's theorem.

    Raises:
        InsufficientData: The control's value cannot be told from zero, so that no ratio to it is bounded.
    """
    control, treatment = found.control, found.treatment
    quantile = -float(special.stdtrit(found.freedom, alpha / 2))
    if quantile**2 * control.variance >= control.value**2:
        raise InsufficientData("the control's value cannot be told from zero")
    estimate = treatment.value / control.value - 1
    if min(control.value, treatment.value) > 0:
        return RelativeEffect(estimate, _log_ratio(found, alpha), "log_ratio")
    return RelativeEffect(estimate, fieller(found, quantile), "fieller")


def fieller(found: Comparison, quantile: float) -> Interval:
    """Return the ratios r, less one, for which treatment - r control is not significant.

    Fieller, "Some Problems in Interval Estimation" (JRSS-B 1954). Bounded only if g = q^2 var_C / C^2 < 1.
    """
    control, treatment = found.control, found.treatment
    squared = quantile**2
    # (T - r C)^2 <= q^2 (V_T - 2 r cov + r^2 V_C) is a r^2 - 2 b r + c <= 0.
    a = control.value**2 - squared * control.variance
    b = control.value * treatment.value - squared * found.covariance
    c = treatment.value**2 - squared * treatment.variance
    reach = math.sqrt(max(b * b - a * c, 0.0))
    return Interval((b - reach) / a - 1, (b + reach) / a - 1)


def _log_ratio(found: Comparison, alpha: float) -> Interval:
    control, treatment = found.control, found.treatment
    shares = [arm.variance / arm.value**2 for arm in (control, treatment)]
    variance = sum(shares) - 2 * found.covariance / (treatment.value * control.value)
    spread = sum(share**2 / arm.freedom for share, arm in zip(shares, (control, treatment), strict=True))
    reach = -float(special.stdtrit(variance**2 / spread, alpha / 2)) * math.sqrt(variance)
    centre = math.log(treatment.value / control.value)
    return Interval(math.expm1(centre - reach), math.expm1(centre + reach))
