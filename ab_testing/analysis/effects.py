"""The two values of a metric and how uncertain they are: delta method, CUPED, strata, users who cross.

Every value is a ratio of sums per cell, R = sum x / sum n. By the delta method (Deng, Knoblich and Lu, "Applying the
Delta Method in Metric Analytics", KDD 2018) a user of cell c moves R by (x - R n) / sum n. CUPED (Deng, Xu, Kohavi and
Walker, WSDM 2013) subtracts theta times the same expression of what the user did before. A variant's value is the
weighted average over strata, so a user moves it by the weighted sum over all cells the user is in; the variance is the
sum of the squares of that, which products within and between cells give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ab_testing.analysis.exact_sums import Products
from ab_testing.analysis.moments import Cell, CellMoments, Moments
from ab_testing.errors import InsufficientData

_LEAST_VARIATION = Fraction(1, 10**26)
"""Squared spread relative to the value, below which users differ by rounding only: float sums err by about 1e-15."""


_LEAST_LEFT = 1e-20
"""Share of the variance below which what is left of it is rounding."""


class Arm(NamedTuple):
    """One variant, all strata together."""

    value: float
    variance: float
    freedom: float
    """Degrees of freedom of the variance (Satterthwaite, over strata)."""
    users: int
    effective_users: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both variants' values and the variance of their difference."""

    control: Arm
    treatment: Arm
    covariance: float
    """Of the two values, because some users are in both variants."""
    freedom: float
    """Welch's degrees of freedom."""
    estimate: float
    theta: float | None = None
    """How much of the covariate was subtracted; None without one."""
    variance_without_covariate: float | None = None

    @property
    def variance(self) -> float:
        return self.control.variance + self.treatment.variance - 2 * self.covariance


class _Part(NamedTuple):
    """One cell's share in its variant's value."""

    moments: CellMoments
    weight: Fraction
    value: Fraction
    influence: tuple[Fraction, ...]
    """What one unit of x, n and the covariates of a user moves the variant's value by."""


_Covariances = dict[tuple[Cell, Cell], float]


def compare(moments: Moments, control: str, treatment: str, *, with_covariate: bool = True) -> Comparison:
    """Return the values of two variants and how uncertain they are.

    Raises:
        InsufficientData: No stratum has two users of each variant, or the users of a variant do not differ.
    """
    strata = stratum_weights(moments, control, treatment)
    has_covariate = len(next(iter(moments.cells.values())).sums) > 2
    theta = _theta(moments, tuple(strata), (control, treatment)) if has_covariate and with_covariate else None
    parts = _parts(moments, strata, (control, treatment), theta or Fraction(0))
    _check_variation(parts, (control, treatment))
    plain = compare(moments, control, treatment, with_covariate=False).variance if theta is not None else None
    return _comparison(moments, parts, control, treatment, theta, plain)


def stratum_weights(moments: Moments, control: str, treatment: str) -> dict[str, Fraction]:
    """Return the weight of each stratum that has at least two users of both variants.

    Proportional to K_C K_T / (K_C + K_T) (Cochran, "Some Methods for Strengthening the Common chi-squared Tests",
    Biometrics 1954): inverse variances when strata vary alike, but free of the outcomes. Weights by estimated variance
    would give most to strata that happen to have no rare event yet.

    Raises:
        InsufficientData: There is no such stratum.
    """
    sizes = {}
    for stratum in sorted({cell.stratum for cell in moments.cells}):
        users = [_users(moments.cells.get(Cell(stratum, variant))) for variant in (control, treatment)]
        if min(users) >= 2:
            sizes[stratum] = Fraction(users[0] * users[1], sum(users))
    if not sizes:
        counts = {name: _all_users(moments, name) for name in (control, treatment)}
        raise InsufficientData("need at least 2 users per variant, got " + _listed(counts))
    total = sum(sizes.values())
    return {stratum: size / total for stratum, size in sizes.items()}


def user_spread(cell: CellMoments) -> float:
    """Return the standard deviation of a user's share in a variant's value: sqrt(users x the value's variance).

    Raises:
        InsufficientData: Fewer than two users, or they do not differ.
    """
    if cell.users < 2 or cell.sums[1] <= 0:
        raise InsufficientData(f"need at least 2 users, got {cell.users}")
    if _relative_variation(cell) <= _LEAST_VARIATION:
        raise InsufficientData("the users do not differ")
    after, _ = _influences(cell)
    return math.sqrt(_quadratic(after, cell.products, after) * cell.users**2 / (cell.users - 1))


def _users(cell: CellMoments | None) -> int:
    return cell.users if cell and cell.sums[1] > 0 else 0


def _all_users(moments: Moments, variant: str) -> int:
    return sum(found.users for cell, found in moments.cells.items() if cell.variant == variant)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items())


def _theta(moments: Moments, strata: tuple[str, ...], variants: tuple[str, str]) -> Fraction | None:
    """Covariance over variance of linearised outcome and covariate, of both variants together, within strata."""
    covariance = variance = Fraction(0)
    for stratum in strata:
        first, second = (moments.cells[Cell(stratum, variant)] for variant in variants)
        both = first.merge(second)
        if both.sums[3] <= 0:
            continue
        after, before = _influences(both)
        covariance += _quadratic(after, both.products, before)
        variance += _quadratic(before, both.products, before)
    return covariance / variance if variance else None


def _influences(cell: CellMoments) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    """What a unit of each column of a user moves the outcome's and the covariate's ratio by."""
    zero = Fraction(0)
    x, n, *before = cell.sums
    padding = (zero,) * len(before)
    after = (1 / n, -x / n**2, *padding)
    if not before or before[1] <= 0:
        return after, (zero, zero, *padding)
    return after, (zero, zero, 1 / before[1], -before[0] / before[1] ** 2)


def _quadratic(left: tuple[Fraction, ...], products: Products, right: tuple[Fraction, ...]) -> Fraction:
    return sum(
        (
            first * second * product
            for first, row in zip(left, products, strict=True)
            if first
            for second, product in zip(right, row, strict=True)
            if second
        ),
        Fraction(0),
    )


def _parts(
    moments: Moments, strata: Mapping[str, Fraction], variants: tuple[str, str], theta: Fraction
) -> dict[Cell, _Part]:
    parts = {}
    for stratum, weight in strata.items():
        cells = [moments.cells[Cell(stratum, variant)] for variant in variants]
        expected = _before(cells[0].merge(cells[1])) if theta else Fraction(0)
        for variant, cell in zip(variants, cells, strict=True):
            after, before = _influences(cell)
            influence = tuple(first - theta * second for first, second in zip(after, before, strict=True))
            shift = theta * (_before(cell) - expected) if theta and cell.sums[3] > 0 else Fraction(0)
            value = cell.sums[0] / cell.sums[1] - shift
            parts[Cell(stratum, variant)] = _Part(cell, weight, value, influence)
    return parts


def _before(cell: CellMoments) -> Fraction:
    return cell.sums[2] / cell.sums[3] if cell.sums[3] > 0 else Fraction(0)


def _check_variation(parts: Mapping[Cell, _Part], variants: tuple[str, str]) -> None:
    for variant in variants:
        ours = [part for cell, part in parts.items() if cell.variant == variant]
        if not any(_relative_variation(part.moments) > _LEAST_VARIATION for part in ours):
            raise InsufficientData(f"the users of {variant} do not differ")


def _check_uncertainty(shared: _Covariances, variants: tuple[str, str], plain: float) -> None:
    """Claim no certainty where a covariate, or users being in both variants, cancels all variation."""
    own = [_total(shared, variant, variant) for variant in variants]
    difference = sum(own) - 2 * _total(shared, *variants)
    if min(*own, difference) <= _LEAST_LEFT * max(*own, plain):
        cause = (
            "the covariate explains every difference: is it from before?" if plain else "all users are in both variants"
        )
        raise InsufficientData(f"nothing is left to estimate an error from: {cause}")


def _relative_variation(cell: CellMoments) -> Fraction:
    """Squared spread of the users' linearised values against the values themselves."""
    after, _ = _influences(cell)
    squares = _quadratic(after, cell.products, after) * cell.sums[1] ** 2
    return squares / cell.products[0][0] if cell.products[0][0] else Fraction(0)


def _comparison(
    moments: Moments,
    parts: Mapping[Cell, _Part],
    control: str,
    treatment: str,
    theta: Fraction | None,
    plain: float | None,
) -> Comparison:
    shared = _covariances(moments, parts)
    _check_uncertainty(shared, (control, treatment), plain or 0.0)
    first, second = _arm(parts, shared, control), _arm(parts, shared, treatment)
    covariance = _total(shared, control, treatment)
    difference = sum(
        (part.weight * part.value * (-1) ** (cell.variant == control) for cell, part in parts.items()), Fraction(0)
    )
    return Comparison(
        control=first,
        treatment=second,
        covariance=covariance,
        freedom=_freedom(parts, shared, first.variance + second.variance - 2 * covariance),
        estimate=float(difference),
        theta=None if theta is None else float(theta),
        variance_without_covariate=plain,
    )


def _arm(parts: Mapping[Cell, _Part], shared: _Covariances, variant: str) -> Arm:
    ours = {cell: part for cell, part in parts.items() if cell.variant == variant}
    variance = _total(shared, variant, variant)
    return Arm(
        value=float(sum((part.weight * part.value for part in ours.values()), Fraction(0))),
        variance=variance,
        freedom=_freedom(ours, shared, variance),
        users=sum(part.moments.users for part in ours.values()),
        effective_users=math.fsum(part.moments.effective_users for part in ours.values()),
    )


def _freedom(parts: Mapping[Cell, _Part], shared: _Covariances, variance: float) -> float:
    """Satterthwaite's degrees of freedom of a variance that the cells add up to, each with its own."""
    return variance**2 / math.fsum(shared[cell, cell] ** 2 / (part.moments.users - 1) for cell, part in parts.items())


def _total(shared: _Covariances, variant: str, other: str) -> float:
    return math.fsum(
        value for (first, second), value in shared.items() if (first.variant, second.variant) == (variant, other)
    )


def _covariances(moments: Moments, parts: Mapping[Cell, _Part]) -> _Covariances:
    """What the users of each cell, and of each two cells that share any, add to the covariance of the two values."""
    found = {(cell, cell): _covariance(part, part, part.moments.products) for cell, part in parts.items()}
    for (first, second), products in moments.crossings.items():
        if first in parts and second in parts:
            value = _covariance(parts[first], parts[second], products)
            found[first, second] = found[second, first] = value
    return found


def _covariance(ours: _Part, theirs: _Part, products: Products) -> float:
    shared = _quadratic(ours.influence, products, theirs.influence) * ours.weight * theirs.weight
    # K / (K - 1), the unbiased variance; for two cells the geometric mean of theirs.
    return float(shared) * math.sqrt(_correction(ours.moments.users) * _correction(theirs.moments.users))


def _correction(users: int) -> float:
    return users / (users - 1)
