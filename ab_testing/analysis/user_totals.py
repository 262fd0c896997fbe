"""From rows to one pair of totals per user and cell: the only step of a report that looks at every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ab_testing.analysis.errors import InvalidTable
from ab_testing.analysis.metrics import Metric
from ab_testing.analysis.moments import Cell, Moments, UserColumns, moments_of
from ab_testing.analysis.tables import AnyIntArray, Codes, FloatArray, Labels, Table, read_numbers

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_LARGEST = 1e100


@dataclass(frozen=True)
class Layout:
    """Which slot each row is added to. A slot is a user, or a user in a cell if some user is in several cells."""

    keys: IntArray
    """The slot of each row."""
    users: int
    cells: tuple[Cell, ...]
    rows: npt.NDArray[np.intp]
    """Rows per slot."""
    cell_of_user: AnyIntArray | None
    """None where slots are users in cells, those of the first cell first."""

    @cached_property
    def slots(self) -> tuple[npt.NDArray[np.intp], ...]:
        """The slots of each cell that have rows."""
        if self.cell_of_user is None:
            starts = range(0, len(self.rows), self.users)
            return tuple(start + np.flatnonzero(self.rows[start : start + self.users]) for start in starts)
        cells = range(len(self.cells))
        return tuple(np.flatnonzero((self.cell_of_user == cell) & (self.rows > 0)) for cell in cells)

    def users_of(self, cells: Sequence[int]) -> int:
        """How many users are in any of these cells."""
        return len(np.unique(np.concatenate([self.slots[cell] % self.users for cell in cells])))

    def is_in(self, cell: int) -> BoolArray:
        """Whether each row is in the cell."""
        if self.cell_of_user is None:
            return np.asarray(self.keys // self.users == cell)
        return np.asarray(self.cell_of_user == cell)[self.keys]


def lay_out(units: Codes, variants: Labels, strata: Labels | None) -> Layout:
    """Give every row the slot of its user, or of its user in its cell."""
    names = strata.names if strata else ("",)
    cells = tuple(Cell(stratum, variant) for stratum in names for variant in variants.names)
    places = variants.codes if strata is None else strata.codes.astype(np.int64) * len(variants.names) + variants.codes
    cell_of_user = np.zeros(units.distinct, dtype=places.dtype)
    cell_of_user[units.codes] = places
    if (cell_of_user[units.codes] == places).all():  # Half as many slots, which at ten million rows stay in the cache.
        rows = np.bincount(units.codes, minlength=units.distinct)
        return Layout(units.codes, units.distinct, cells, rows, cell_of_user)
    keys = np.multiply(places, units.distinct, dtype=np.int64)
    keys += units.codes
    return Layout(keys, units.distinct, cells, np.bincount(keys, minlength=units.distinct * len(cells)), None)


def selected(layout: Layout, rows: BoolArray) -> Layout:
    """Return the layout of some rows only."""
    keys = layout.keys[rows]
    return replace(layout, keys=keys, rows=np.bincount(keys, minlength=len(layout.rows)))


@dataclass
class UserTotals:
    """Totals of columns per user and cell; each column is added up once, however many metrics use it."""

    table: Table
    layout: Layout
    rows: BoolArray | None = None
    """Rows of the table that the layout is about; None means all."""
    whole: UserTotals | None = None
    """With the rows that have no value of the metric. What a user did before stands on any of them: left out with
    the row, it would depend on what came of the row."""
    _totals: dict[tuple[str, float | None], FloatArray] = field(default_factory=dict)

    def moments(self, metric: Metric) -> Moments:
        """Return the exact moments of one metric, of the rows that have a value for it.

        Raises:
            InvalidTable: A column is missing, holds infinite numbers or weighs rows negatively.
        """
        try:
            columns = self._columns(metric)
        except _MissingValues:
            return self._complete(metric).moments(metric)
        if columns[1].min(initial=0.0) < 0:
            raise InvalidTable(f"metric {metric.name!r} has a negative denominator")
        cells = {}
        for cell, slots in zip(self.layout.cells, self.layout.slots, strict=True):
            kept = slots[columns[1][slots] != 0]  # A user whose rows all weigh nothing says nothing.
            cells[cell] = UserColumns(tuple(column[kept] for column in columns), kept % self.layout.users)
        return moments_of(cells)

    def numbers(self, name: str) -> FloatArray:
        """Return a column of the rows that the layout is about."""
        values = read_numbers(self.table, name)
        return values if self.rows is None else values[self.rows]

    def restricted(self, rows: BoolArray) -> UserTotals:
        """Return the totals of some of the rows of this layout."""
        kept = rows if self.rows is None else _nested(self.rows, rows)
        return UserTotals(self.table, selected(self.layout, rows), kept)

    def _complete(self, metric: Metric) -> UserTotals:
        is_known = ~np.isnan(self.numbers(metric.numerator))
        if metric.denominator is not None:
            is_known &= ~np.isnan(self.numbers(metric.denominator))
        complete = self.restricted(is_known)
        complete.whole = self
        return complete

    def _columns(self, metric: Metric) -> tuple[FloatArray, ...]:
        x, n = self._numerator(metric), self._denominator(metric)
        if metric.covariate is None:
            return x, n
        whole = self.whole or self
        before = whole._total(metric.covariate, is_optional=True)
        if metric.covariate_denominator is not None:
            return x, n, before, whole._total(metric.covariate_denominator, is_optional=True)
        is_known = whole._counted(~np.isnan(whole.numbers(metric.covariate))) > 0
        return x, n, before, is_known.astype(np.float64)

    def _numerator(self, metric: Metric) -> FloatArray:
        if metric.kind == "exceedance":
            values = self.numbers(metric.numerator)
            if np.isnan(values).any():
                raise _MissingValues
            return self._counted(values > (metric.level or 0.0))
        total = self._total(metric.numerator, metric.clip)
        return (total > 0).astype(np.float64) if metric.kind == "proportion" else total

    def _denominator(self, metric: Metric) -> FloatArray:
        if metric.kind in ("mean", "proportion"):
            return (self.layout.rows > 0).astype(np.float64)
        return self.layout.rows.astype(np.float64) if metric.denominator is None else self._total(metric.denominator)

    def _total(self, name: str, clip: float | None = None, *, is_optional: bool = False) -> FloatArray:
        known = self._totals.get((name, clip))
        if known is not None:
            return known
        values = self.numbers(name)
        if is_optional:
            values = np.nan_to_num(values, posinf=np.inf, neginf=-np.inf)
        if clip is not None:
            values = np.minimum(values, clip)
        total = self._added(values)
        if not (np.abs(total) < _LARGEST).all():
            _complain_of_infinity(values, name)
            raise _MissingValues
        if not is_optional:
            self._totals[name, clip] = total
        return total

    def _added(self, values: FloatArray) -> FloatArray:
        return np.bincount(self.layout.keys, weights=values, minlength=len(self.layout.rows)).astype(
            np.float64, copy=False
        )

    def _counted(self, flags: BoolArray) -> FloatArray:
        return np.bincount(self.layout.keys[flags], minlength=len(self.layout.rows)).astype(np.float64)


class _MissingValues(Exception):
    """Some row has no value for a metric: it is to be left out of that metric, numerator and denominator."""


def _complain_of_infinity(values: FloatArray, name: str) -> None:
    if not np.isnan(values).any() or np.isinf(values).any():
        raise InvalidTable(f"column {name!r} holds infinite numbers, or such as are too large to square")


def _nested(outer: BoolArray, inner: BoolArray) -> BoolArray:
    """Rows of the whole table that are chosen by `inner` among those that `outer` chose."""
    chosen = outer.copy()
    chosen[outer] = inner
    return chosen
