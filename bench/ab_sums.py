"""Sums per variant, of many simulations at once, and the differences that a report makes of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Sums(NamedTuple):
    """What a test of one variant's units starts from: x per unit, or x per d; arrays are (sims,)."""

    n: Floats
    x: Floats
    xx: Floats
    d: Floats | None = None
    dd: Floats | None = None
    xd: Floats | None = None

    @property
    def mean(self) -> Floats:
        """NaN where there is no unit."""
        return _divide(self.x, self.n if self.d is None else self.d)

    @property
    def variance(self) -> Floats:
        """Of one unit's share in the mean, by the delta method for ratios, so that variance / n is the mean's."""
        if self.d is None or self.dd is None or self.xd is None:
            return _divide(self.xx - _divide(self.x**2, self.n), self.n - 1)
        squares = self.xx - 2 * self.mean * self.xd + self.mean**2 * self.dd
        return _divide(squares, self.n - 1) * _divide(self.n, self.d) ** 2

    def plus(self, other: Sums) -> Sums:
        pairs = zip(self, other, strict=True)
        return Sums(*(None if left is None or right is None else left + right for left, right in pairs))  # type: ignore[arg-type]


class Pair(NamedTuple):
    """Both variants."""

    control: Sums
    treatment: Sums

    def plus(self, other: Pair) -> Pair:
        return Pair(self.control.plus(other.control), self.treatment.plus(other.treatment))


class Estimate(NamedTuple):
    """A difference as a report has it; arrays are (sims,)."""

    difference: Floats
    variance: Floats
    freedom: Floats
    """Users of the smaller variant, less one."""


class Cells(NamedTuple):
    """One phase: what each user did in it, and which variant the user was in."""

    x: Floats
    d: Floats
    is_treatment: Flags


def stratified(phases: list[Pair]) -> Estimate:
    """Return the difference over phases that share no user, weighted as `ab_testing.analysis.effects` does."""
    sizes = _sizes(phases)
    total = np.sum(sizes, axis=0)
    difference, variance = np.zeros_like(total), np.zeros_like(total)
    users = [np.zeros_like(total), np.zeros_like(total)]
    for pair, size in zip(phases, sizes, strict=True):
        share, counts = _divide(size, total), size > 0
        noise = _divide(pair.treatment.variance, pair.treatment.n) + _divide(pair.control.variance, pair.control.n)
        difference += np.where(counts, share * (pair.treatment.mean - pair.control.mean), 0.0)
        variance += np.where(counts, share**2 * noise, 0.0)
        users = [count + np.where(counts, arm.n, 0.0) for count, arm in zip(users, pair, strict=True)]
    return Estimate(difference, variance, np.minimum(*users) - 1)


def _sizes(phases: list[Pair]) -> list[Floats]:
    """What each phase weighs: nothing below two users of both variants."""
    return [
        np.where(
            np.minimum(pair.control.n, pair.treatment.n) >= 2,
            pair.control.n * pair.treatment.n / np.maximum(pair.control.n + pair.treatment.n, 1.0),
            0.0,
        )
        for pair in phases
    ]


def clustered_by_user(phases: list[Cells]) -> Estimate:
    """Return the difference over phases that share users: each user's influence is summed before it is squared."""
    pairs = [ratio_pair(*cells) for cells in phases]
    estimate, sizes = stratified(pairs), _sizes(pairs)
    total = np.sum(sizes, axis=0)
    influence = np.zeros(phases[-1].x.shape)
    for cells, pair, size in zip(phases, pairs, sizes, strict=True):
        share = _divide(size, total)
        for arm, mine, sign in ((pair.treatment, cells.is_treatment, 1), (pair.control, ~cells.is_treatment, -1)):
            assert arm.d is not None
            scale = sign * _divide(share, arm.d)
            own = np.where(mine, cells.x - np.nan_to_num(arm.mean)[:, None] * cells.d, 0.0)
            influence[:, : own.shape[1]] += np.nan_to_num(scale)[:, None] * own
    return estimate._replace(variance=_dot(influence, influence))


def value_pair(value: Floats, is_treatment: Flags) -> Pair:
    mine, squares = value * is_treatment, value**2
    n, x, xx = is_treatment.sum(axis=1).astype(np.float64), mine.sum(axis=1), (mine * value).sum(axis=1)
    control = Sums(value.shape[1] - n, value.sum(axis=1) - x, squares.sum(axis=1) - xx)
    return Pair(control, Sums(n, x, xx))


def ratio_pair(x: Floats, d: Floats, is_treatment: Flags) -> Pair:
    came = d > 0
    return Pair(*(_ratio_sums(x, d, came & mine) for mine in (~is_treatment, is_treatment)))


def _ratio_sums(x: Floats, d: Floats, mine: Flags) -> Sums:
    x, d = x * mine, d * mine
    n = mine.sum(axis=1).astype(np.float64)
    return Sums(n, x.sum(axis=1), _dot(x, x), d.sum(axis=1), _dot(d, d), _dot(x, d))


def row_pair(x: Floats, d: Floats, is_treatment: Flags) -> Pair:
    """Interactions as units: each is harmful or not, so that squares add up to the same."""
    rows, harmful = _dot(d, is_treatment), _dot(x, is_treatment)
    all_rows, all_harmful = d.sum(axis=1), x.sum(axis=1)
    control = Sums(all_rows - rows, all_harmful - harmful, all_harmful - harmful)
    return Pair(control, Sums(rows, harmful, harmful))


def _dot(left: Floats, right: Floats | Flags) -> Floats:
    """Row by row, without a product in memory."""
    products: Floats = np.einsum("ij,ij->i", left, right)
    return products


def pooled_by_variant(phases: list[Cells]) -> Pair:
    """A user is one unit of each variant that the user has been in."""
    arms = []
    for is_canary in (False, True):
        x = np.zeros(phases[-1].x.shape)
        d = np.zeros(phases[-1].x.shape)
        for cells in phases:
            mine = cells.is_treatment == is_canary
            x[:, : mine.shape[1]] += cells.x * mine
            d[:, : mine.shape[1]] += cells.d * mine
        arms.append(_ratio_sums(x, d, d > 0))
    return Pair(*arms)


def _divide(left: Floats, right: Floats) -> Floats:
    return np.divide(left, right, out=np.full_like(left, np.nan), where=right > 0)
