"""All that a report keeps of a metric's users: a few exact sums per variant and stratum, whatever the number of users.

A cell is a variant in a stratum (a phase of a ramp). A user may be in several cells; the sums of products between two
cells keep what such users have in common, so that variances are clustered by user across strata and variants.

Every sum is exact (`exact_sums`), so moments of disjoint users merge, in any order, to exactly those of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ab_testing.analysis.errors import MomentsDoNotFit
from ab_testing.analysis.exact_sums import FloatArray, Products, exact_products

BoolArray = npt.NDArray[np.bool_]
JsonObject = dict[str, object]


class Cell(NamedTuple):
    """A variant in a stratum."""

    stratum: str
    variant: str


class UserColumns(NamedTuple):
    """One value per user of a cell: numerator and denominator, and their covariates where there are any."""

    columns: tuple[FloatArray, ...]
    users: npt.NDArray[np.intp]
    """Sorted numbers of the users, the same number in every cell."""


@dataclass(frozen=True, slots=True)
class CellMoments:
    """Sums over the users of one cell."""

    users: int
    sums: tuple[Fraction, ...]
    products: Products
    is_share: bool
    """Whether every user's numerator lies between 0 and the denominator."""

    def merge(self, other: CellMoments) -> CellMoments:
        """Return the sums of two disjoint groups of users together."""
        if len(self.sums) != len(other.sums):
            raise MomentsDoNotFit("moments with and without a covariate do not belong together")
        sums = tuple(ours + theirs for ours, theirs in zip(self.sums, other.sums, strict=True))
        return CellMoments(
            self.users + other.users,
            sums,
            _added(self.products, other.products),
            self.is_share and other.is_share,
        )

    @property
    def effective_users(self) -> float:
        """How many equally active users these are worth (Kish)."""
        return float(self.sums[1] ** 2 / self.products[1][1]) if self.products[1][1] else 0.0


@dataclass(frozen=True)
class Moments:
    """A metric's exact moments in every cell, and between cells that share users."""

    cells: Mapping[Cell, CellMoments]
    crossings: Mapping[tuple[Cell, Cell], Products]
    """Sums of products over users who are in both cells; the first cell sorts before the second."""

    def merge(self, other: Moments) -> Moments:
        """Return the moments of two disjoint groups of users together.

        Raises:
            MomentsDoNotFit: They are not moments of the same metric.
        """
        cells = dict(self.cells)
        for cell, theirs in other.cells.items():
            cells[cell] = cells[cell].merge(theirs) if cell in cells else theirs
        crossings = dict(self.crossings)
        for pair, products in other.crossings.items():
            crossings[pair] = _added(crossings[pair], products) if pair in crossings else products
        return Moments(dict(sorted(cells.items())), dict(sorted(crossings.items())))

    def to_json(self) -> JsonObject:
        """As text that gives back the very same numbers."""
        cells = [
            [*cell, moments.users, _texts((moments.sums,))[0], _texts(moments.products), moments.is_share]
            for cell, moments in self.cells.items()
        ]
        crossings = [[*first, *second, _texts(products)] for (first, second), products in self.crossings.items()]
        return {"cells": cells, "crossings": crossings}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Moments:
        cells, crossings = {}, {}
        for stratum, variant, users, sums, products, is_share in cast(
            list[tuple[str, str, int, list[str], list[list[str]], bool]], data["cells"]
        ):
            cells[Cell(stratum, variant)] = CellMoments(users, _numbers([sums])[0], _numbers(products), is_share)
        for a, b, c, d, products in cast(list[tuple[str, str, str, str, list[list[str]]]], data["crossings"]):
            crossings[Cell(a, b), Cell(c, d)] = _numbers(products)
        return cls(cells, crossings)


def moments_of(cells: Mapping[Cell, UserColumns]) -> Moments:
    """Return the exact moments of users given cell by cell."""
    filled = {cell: given for cell, given in sorted(cells.items()) if len(given.users)}
    crossings = {}
    for first, second in combinations(filled, 2):
        shared = _shared_products(filled[first], filled[second])
        if shared is not None:
            crossings[first, second] = shared
    return Moments({cell: cell_moments(given.columns) for cell, given in filled.items()}, crossings)


def cell_moments(columns: tuple[FloatArray, ...]) -> CellMoments:
    """Return the sums over one cell's users.

    >>> cell_moments((np.array([1.0, 0.0]), np.array([2.0, 2.0]))).sums
    (Fraction(1, 1), Fraction(4, 1))
    """
    given = [*columns, np.ones(len(columns[0]))]
    products = exact_products(given, given)
    x, n = columns[:2]
    return CellMoments(
        users=len(x),
        sums=tuple(row[-1] for row in products[:-1]),
        products=tuple(row[:-1] for row in products[:-1]),
        is_share=bool(((x >= 0) & (x <= n)).all()),
    )


def _shared_products(first: UserColumns, second: UserColumns) -> Products | None:
    is_first = np.zeros(max(first.users[-1], second.users[-1]) + 1, dtype=np.bool_)
    is_first[first.users] = True
    theirs = np.flatnonzero(is_first[second.users])
    if not len(theirs):
        return None
    ours = np.searchsorted(first.users, second.users[theirs])
    return exact_products([column[ours] for column in first.columns], [column[theirs] for column in second.columns])


def _added(ours: Products, theirs: Products) -> Products:
    return tuple(
        tuple(first + second for first, second in zip(left, right, strict=True))
        for left, right in zip(ours, theirs, strict=True)
    )


def _texts(numbers: Products) -> list[list[str]]:
    return [[str(number) for number in row] for row in numbers]


def _numbers(texts: list[list[str]]) -> Products:
    return tuple(tuple(Fraction(text) for text in row) for row in texts)
