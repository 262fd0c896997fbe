"""Sums of products of floats without any rounding, at the speed of matrix multiplication.

Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication" (Numer. Algorithms 59, 2012): cut
each number into slices of so few bits that a product of two slices, added up over all rows, fits into the 53 bits of a
float. Then no order of additions can round, not even inside BLAS, and Python's integers put the slices together.

Exact sums make merged moments equal to those of one pass, and variances of data with a huge mean correct.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Products = tuple[tuple[Fraction, ...], ...]

_BLOCK_ROWS = 1 << 17
_SLICE_BITS = 18  # 2 * 18 bits of a product and 17 of the number of rows make 53.
_SMALLEST_EXPONENT = -1074  # 2**-1074 is the smallest float above zero: nothing is left below it.

_LARGEST_EXPONENT = 1000


class _Slices(NamedTuple):
    """One column as a sum of whole numbers below 2**18, each times a power of two."""

    wholes: list[FloatArray]
    exponents: list[int]


def exact_products(left: list[FloatArray], right: list[FloatArray]) -> Products:
    """Return the sum over rows of each column of `left` times each column of `right`.

    All columns have the same length and finite values.

    >>> exact_products([np.array([0.1, 1e100])], [np.array([3.0, 0.0])])[0][0] == 3 * Fraction(0.1)
    True
    """
    if left is right:
        return _mirrored(_products(left, left))
    return tuple(tuple(row) for row in _products(left, right))


def _products(left: list[FloatArray], right: list[FloatArray]) -> list[list[Fraction]]:
    """Where both sides are the same list, only what is on and right of the diagonal."""
    total = [[Fraction(0)] * len(right) for _ in left]
    rows = len(left[0])
    for start in range(0, rows, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        sliced = [_cut(column[part]) for column in left]
        other = sliced if left is right else [_cut(column[part]) for column in right]
        _add_block(total, sliced, other)
    return total


def _mirrored(half: list[list[Fraction]]) -> Products:
    places = range(len(half))
    return tuple(tuple(half[min(i, j)][max(i, j)] for j in places) for i in places)


def _add_block(total: list[list[Fraction]], left: list[_Slices], right: list[_Slices]) -> None:
    ours = np.stack([whole for column in left for whole in column.wholes])
    # Stacked again even if it is the same: of an array with itself, numpy takes BLAS's symmetric product, which takes
    # three times as long as the general one for so few rows.
    theirs = np.stack([whole for column in right for whole in column.wholes])
    grid = ours @ theirs.T
    row = 0
    for i, first in enumerate(left):
        column = 0
        for j, second in enumerate(right):
            block = grid[row : row + len(first.wholes), column : column + len(second.wholes)]
            if left is not right or i <= j:
                total[i][j] += _assemble(block, first.exponents, second.exponents)
            column += len(second.wholes)
        row += len(first.wholes)


def _assemble(block: FloatArray, first: list[int], second: list[int]) -> Fraction:
    """Add up slice products in units of the smallest of them."""
    lowest = first[-1] + second[-1]
    whole = sum(
        int(value) << (upper + lower - lowest)
        for upper, values in zip(first, block.tolist(), strict=True)
        for lower, value in zip(second, values, strict=True)
    )
    return Fraction(whole << lowest) if lowest >= 0 else Fraction(whole, 1 << -lowest)


def _cut(column: FloatArray) -> _Slices:
    rest, wholes, exponents = column, list[FloatArray](), list[int]()
    exponent = math.frexp(float(np.abs(column).max(initial=0.0)))[1]
    while not wholes or rest.any():
        exponent = max(exponent - _SLICE_BITS, _SMALLEST_EXPONENT)
        whole = np.trunc(_scaled(rest, -exponent))
        rest = rest - _scaled(whole, exponent)  # Exact: it only drops leading bits.
        wholes.append(whole)
        exponents.append(exponent)
    return _Slices(wholes, exponents)


def _scaled(values: FloatArray, exponent: int) -> FloatArray:
    """Times a power of two, by multiplication where that power is a float: it is five times as fast."""
    return values * 2.0**exponent if abs(exponent) <= _LARGEST_EXPONENT else np.ldexp(values, exponent)
