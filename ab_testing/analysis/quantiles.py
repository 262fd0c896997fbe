"""Quantiles of rows that are clustered by user (Woodruff, "Confidence Intervals for Medians", JASA 1952).

The share of rows at or below the sample's quantile is a ratio metric, so the delta method gives its variance with users
as the unit; the interval is the distribution function inverted at that share plus and minus its error.

Quantiles need the rows themselves: there is no sum that would do, so their evidence is put together row by row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from ab_testing.analysis.intervals import Interval
from ab_testing.errors import InsufficientData

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class ClusteredQuantile(NamedTuple):
    """One variant's quantile."""

    value: float
    interval: Interval
    std_error: float
    """Half the interval over the normal quantile."""
    users: int
    rows: int


def clustered_quantile(values: FloatArray, users: IntArray, share: float, alpha: float) -> ClusteredQuantile:
    """Return the quantile of `values` that `share` do not exceed.

    Args:
        values: One per row, finite.
        users: Number of the user of each row, from 0.
        share: Between 0 and 1.
        alpha: One minus the interval's coverage.

    Raises:
        InsufficientData: Fewer than two users, or the interval would reach beyond the data.
    """
    rows_of = np.bincount(users)
    count = int(np.count_nonzero(rows_of))
    if count < 2:
        raise InsufficientData(f"need at least 2 users per variant, got {count}")
    ordered = np.sort(values)
    value = _at(ordered, share)
    reach = -float(special.ndtri(alpha / 2)) * math.sqrt(share_variance(values <= value, users, rows_of))
    lower, upper = share - reach, share + reach
    if lower <= 0 or upper >= 1:
        raise InsufficientData(f"too few users for an interval around the share {share}")
    interval = Interval(_at(ordered, lower), _at(ordered, upper))
    if interval.upper <= interval.lower:
        raise InsufficientData(f"the values around the share {share} do not differ")
    std_error = (interval.upper - interval.lower) / (-2 * float(special.ndtri(alpha / 2)))
    return ClusteredQuantile(value, interval, std_error, count, len(values))


def share_variance(flags: npt.NDArray[np.bool_], users: IntArray, rows_of: npt.NDArray[np.intp]) -> float:
    """Return the variance of the share of flagged rows, users being the unit."""
    flagged = np.bincount(users[flags], minlength=len(rows_of)).astype(np.float64)
    count = int(np.count_nonzero(rows_of))
    residuals = flagged - flagged.sum() / len(users) * rows_of
    return float(residuals @ residuals) * count / (count - 1) / len(users) ** 2


def _at(ordered: FloatArray, share: float) -> float:
    """The smallest value that at least `share` of the rows do not exceed."""
    place = math.ceil(share * len(ordered) - 1e-9) - 1
    return float(ordered[min(max(place, 0), len(ordered) - 1)])
