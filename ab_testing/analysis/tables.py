"""Columns of anybody's table as NumPy arrays: pandas, polars, Arrow, or a dict of arrays.

All of them give a column for `table[name]` and turn it into an array for `numpy.asarray`, so neither their packages nor
an adapter is needed, and the same values give the same arrays, whoever holds them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from ab_testing.analysis.errors import InvalidTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
AnyIntArray = npt.NDArray[np.integer]

_SPARE_CODES = 4
"""Whole-number ids are used as they are while their range is at most so many times the rows."""


_FEW_CODES = 256


class Table(Protocol):
    """What every kind of table has in common."""

    def __getitem__(self, name: str, /) -> object: ...


class Codes(NamedTuple):
    """Which of `distinct` values each row has; a code may stand for no row at all."""

    codes: IntArray
    distinct: int


class Labels(NamedTuple):
    """Which of `names` each row has."""

    codes: AnyIntArray
    names: tuple[str, ...]
    """Sorted."""


def read_numbers(table: Table, name: str) -> FloatArray:
    """Return a column of numbers; what is missing becomes NaN.

    Raises:
        InvalidTable: There is no such column, or it holds something else or an infinite number.
    """
    values = _column(table, name)
    if values.dtype.kind == "O":
        return _numbers_of_objects(values, name)
    if values.dtype.kind not in "biuf":
        raise InvalidTable(f"column {name!r} holds no numbers but {values.dtype}")
    return values.astype(np.float64, copy=False)


def read_units(table: Table, name: str) -> Codes:
    """Return who each row belongs to. Whole numbers within a small range cost almost nothing; the rest is hashed or
    sorted.

    Raises:
        InvalidTable: There is no such column, or a row belongs to nobody.
    """
    values = _column(table, name)
    if values.dtype.kind in "iu" and len(values):
        low, high = int(values.min()), int(values.max())
        if high - low < _SPARE_CODES * len(values):
            codes = values.astype(np.int64, copy=False)
            return Codes(codes - low if low else codes, high - low + 1)
    found, names = _factorised(values, name)
    return Codes(found.astype(np.int64, copy=False), len(names))


def read_labels(table: Table, name: str) -> Labels:
    """Return a column of few different values, as sorted names.

    Raises:
        InvalidTable: There is no such column, or a row has no value.
    """
    codes, found = _factorised(_column(table, name), name)
    names = [str(value) for value in found]
    order = sorted(range(len(names)), key=names.__getitem__)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[order] = np.arange(len(names))
    is_sorted = order == list(range(len(names)))
    return Labels(codes if is_sorted else ranks[codes], tuple(names[place] for place in order))


def rows_of(table: Table, name: str) -> int:
    """Return the number of rows, as this column has them."""
    return len(_column(table, name))


def _column(table: Table, name: str) -> npt.NDArray[np.generic]:
    try:
        column = table[name]
    except Exception as exc:
        raise InvalidTable(f"the table has no column {name!r}") from exc
    values = np.asarray(column)
    if values.ndim != 1:
        raise InvalidTable(f"column {name!r} has {values.ndim} dimensions, not one")
    return values if values.flags.writeable or values.dtype.kind not in "biuf" else np.asarray(_Unlocked(values))


class _Unlocked:
    """The memory of a read-only array as that of one that may be written to, and nobody here does.

    Data frames hand out read-only views, and `numpy.bincount` copies both of its arguments if they are read-only, every
    time: that took as long as all the rest.
    """

    def __init__(self, values: npt.NDArray[np.generic]) -> None:
        self._values = values  # Keeps the memory alive.
        interface = values.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _factorised(values: npt.NDArray[np.generic], name: str) -> tuple[AnyIntArray, list[object]]:
    if values.dtype.kind in "biu":
        return _small_integers(values)
    if values.dtype.kind not in "OUST":
        raise InvalidTable(f"column {name!r} holds neither names nor whole numbers but {values.dtype}")
    objects = values.tolist()
    numbers = {value: number for number, value in enumerate(dict.fromkeys(objects))}
    codes = np.fromiter(map(numbers.__getitem__, objects), np.int64, len(objects))
    if any(value is None or value != value for value in numbers):  # NaN differs from itself.
        raise InvalidTable(f"column {name!r} has rows without a value")
    return codes, list(numbers)


def _small_integers(values: npt.NDArray[np.generic]) -> tuple[AnyIntArray, list[object]]:
    """Without sorting the rows where the integers are small, as codes of variants are."""
    whole = cast(AnyIntArray, values.view(np.uint8) if values.dtype == np.bool_ else values)
    if len(whole) and int(whole.min()) >= 0 and (largest := int(whole.max())) < _FEW_CODES:
        # A thousand rows have them all, as a rule; if not, the slow way finds out.
        seen = np.unique(whole[:: 1 + len(whole) // 1000])
        if len(seen) == largest + 1:
            return whole, seen.tolist()
    found, codes = np.unique(whole, return_inverse=True)
    return codes, found.tolist()


def _numbers_of_objects(values: npt.NDArray[np.generic], name: str) -> FloatArray:
    try:
        return np.array([np.nan if _is_missing(value) else float(value) for value in values.tolist()])
    except (TypeError, ValueError) as exc:
        raise InvalidTable(f"column {name!r} holds something that is no number") from exc


def _is_missing(value: object) -> bool:
    return value is None or type(value).__name__ == "NAType"
