"""What others would say at a look, on many simulations at once: the tutorial's test, gbstats, and our own reports.

gbstats 0.8.0 decides by Waudby-Smith and others' asymptotic confidence sequence ("Time-uniform central limit theory and
asymptotic confidence sequences", equations 9 and 155); its form is written out here because two million calls of the
package would take an hour. `compare_with_gbstats` calls the package on a part of the looks, where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from ab_testing.analysis.intervals import confidence_sequence, sequence_p_value
from bench.ab_sums import Estimate, Flags, Floats, Pair, Sums

ALPHA = 0.05
_TUNING = 5000.0
"""gbstats' default: the number of users at which its sequence is tightest."""
_LEAST_FREEDOM, _LEAST_EVENTS = 100.0, 30.0
"""Below these our reports show no sequence."""


class Test(NamedTuple):
    """What a test says of a difference, at one look of each simulation."""

    difference: Floats
    p_value: Floats
    upper: Floats
    """Upper end of the interval by which a margin would be ruled out; infinite where there is none."""

    @property
    def rejects(self) -> Flags:
        return self.p_value < ALPHA

    @property
    def says_harm(self) -> Flags:
        return self.rejects & (self.difference > 0)


def tutorial(pair: Pair) -> Test:
    """Welch's test and its one-sided 95 % bound: right at one look, of independent units.

    It is kept silent, as gbstats is, while a variant's units do not differ; the textbook would claim certainty there.
    """
    difference, variance = _difference(pair)
    parts = [arm.variance / arm.n for arm in pair]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = variance**2 / sum(part**2 / (arm.n - 1) for part, arm in zip(parts, pair, strict=True))
    known = np.isfinite(variance) & _both_vary(pair)
    safe = np.where(known, variance, 1.0)
    freedom = np.where(known, freedom, 1.0)
    p_value = np.where(known, 2 * special.stdtr(freedom, -np.abs(difference) / np.sqrt(safe)), 1.0)
    upper = difference - special.stdtrit(freedom, ALPHA) * np.sqrt(safe)
    return Test(difference, p_value, np.where(known, upper, np.inf))


def gbstats_sequential(pair: Pair) -> Test:
    """Return what gbstats 0.8.0 says: its p-value, and the upper end of its 95 % interval.

    Where it gives up (no event in the control, no variance) it says p = 1 and an interval from 0 to 0. That counts as
    no verdict here, although the interval would rule any margin out.
    """
    difference, variance = _difference(pair)
    known = _both_vary(pair) & (pair.control.mean != 0)
    n, rho2 = pair.control.n + pair.treatment.n, _rho_squared()
    safe = np.where(known, variance, 1.0)
    growth = n * rho2 + 1
    log_e = rho2 * difference**2 * n / safe / (2 * growth) - 0.5 * np.log(growth)
    p_value = np.where(known, np.exp(-np.maximum(log_e, 0.0)), 1.0)
    reach = np.sqrt(safe * n * 2 * growth * np.log(np.sqrt(growth) / ALPHA) / (n**2 * rho2))
    return Test(difference, p_value, np.where(known, difference + reach, np.inf))


def sequence(estimate: Estimate, prior_sd: float, events: Pair | None) -> Test:
    """Return what our reports say, once there are a hundred degrees of freedom and, of shares, thirty events."""
    difference, variance, freedom = estimate
    known = (freedom >= _LEAST_FREEDOM) & (variance > 0)
    if events is not None:
        for arm in events:
            tries = arm.n if arm.d is None else arm.d
            known &= np.minimum(arm.x, tries - arm.x) >= _LEAST_EVENTS
    variance, freedom = np.where(known, variance, 1.0), np.where(known, freedom, _LEAST_FREEDOM)
    shrinkage = variance / (variance + prior_sd**2)
    squared = difference**2 / variance / freedom
    log_e = 0.5 * np.log(shrinkage)
    log_e += 0.5 * (freedom + 1) * (np.log1p(squared) - np.log1p(shrinkage * squared))
    growth = (2 * math.log(1 / ALPHA) - np.log(shrinkage)) / (freedom + 1)
    room = 1 - shrinkage * np.exp(growth)
    reach = np.sqrt(freedom * np.expm1(growth) / np.where(room > 0, room, np.nan) * variance)
    upper = np.where(known & (room > 0), difference + reach, np.inf)
    return Test(difference, np.where(known, np.exp(-np.maximum(log_e, 0.0)), 1.0), upper)


class Agreement(NamedTuple):
    """How far the written-out form is from the package."""

    calls: int = 0
    largest_difference: float = 0.0
    """Of a p-value, or of an interval's end."""
    other_decisions: int = 0

    def plus(self, other: Agreement) -> Agreement:
        return Agreement(
            self.calls + other.calls,
            max(self.largest_difference, other.largest_difference),
            self.other_decisions + other.other_decisions,
        )


def gbstats_version() -> str | None:
    try:
        return version("gbstats")
    except PackageNotFoundError:
        return None


def compare_with_gbstats(pair: Pair, test: Test, places: Sequence[int], margin: float) -> Agreement:
    """Call the package on some simulations' sums at one look, and compare."""
    tests = import_module("gbstats.frequentist.tests")
    config = tests.SequentialConfig(difference_type="absolute", alpha=ALPHA, sequential_tuning_parameter=_TUNING)
    found = Agreement()
    for place in places:
        result = tests.SequentialTwoSidedTTest(*(_statistic(arm, place) for arm in pair), config).compute_result()
        upper = math.inf if result.error_message else float(result.ci[1])
        ours_p, ours_upper = float(test.p_value[place]), float(test.upper[place])
        gap = 0.0 if math.isinf(upper) and math.isinf(ours_upper) else abs(upper - ours_upper)
        decisions = (result.p_value < ALPHA) != (ours_p < ALPHA) or (upper < margin) != (ours_upper < margin)
        found = found.plus(Agreement(1, max(gap, abs(float(result.p_value) - ours_p)), int(decisions)))
    return found


def compare_with_reports(estimate: Estimate, test: Test, prior_sd: float, places: Sequence[int]) -> float:
    """Return the largest difference between the written-out sequence and `ab_testing.analysis.intervals`."""
    largest = 0.0
    for place in places:
        difference, variance, freedom = (float(value[place]) for value in estimate)
        if freedom < _LEAST_FREEDOM or not math.isfinite(test.upper[place]):
            continue
        p_value = sequence_p_value(difference, variance, freedom, prior_sd)
        upper = confidence_sequence(difference, variance, freedom, ALPHA, prior_sd).upper
        largest = max(largest, abs(p_value - float(test.p_value[place])), abs(upper - float(test.upper[place])))
    return largest


def _statistic(arm: Sums, place: int) -> Any:
    models = import_module("gbstats.models.statistics")
    n = int(arm.n[place])
    numerator = models.SampleMeanStatistic(n=n, sum=float(arm.x[place]), sum_squares=float(arm.xx[place]))
    if arm.d is None or arm.dd is None or arm.xd is None:
        return numerator
    return models.RatioStatistic(
        n=n,
        m_statistic=numerator,
        d_statistic=models.SampleMeanStatistic(n=n, sum=float(arm.d[place]), sum_squares=float(arm.dd[place])),
        m_d_sum_of_products=float(arm.xd[place]),
    )


def _difference(pair: Pair) -> tuple[Floats, Floats]:
    variance = pair.control.variance / np.maximum(pair.control.n, 1) + pair.treatment.variance / np.maximum(
        pair.treatment.n, 1
    )
    return np.nan_to_num(pair.treatment.mean - pair.control.mean), variance


def _both_vary(pair: Pair) -> Flags:
    return (np.nan_to_num(pair.control.variance) > 0) & (np.nan_to_num(pair.treatment.variance) > 0)


def _rho_squared() -> float:
    log = -2 * math.log(ALPHA)
    return (log + math.log(log + 1)) / _TUNING
