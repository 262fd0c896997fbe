"""From a table of interactions to a report, without a server: pandas, polars, Arrow or a dict of NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce

import numpy as np
import numpy.typing as npt

from ab_testing.analysis.corrections import Correction, corrected
from ab_testing.analysis.errors import AnalysisError, InvalidTable
from ab_testing.analysis.metric_effects import Variants, moments_effect, quantile_effect
from ab_testing.analysis.metrics import Metric, check_names
from ab_testing.analysis.moments import CellMoments
from ab_testing.analysis.quantiles import ClusteredQuantile, clustered_quantile
from ab_testing.analysis.report import Effect, Report
from ab_testing.analysis.tables import Table, read_labels, read_units
from ab_testing.analysis.user_totals import Layout, UserTotals, lay_out
from ab_testing.errors import InsufficientData

BoolArray = npt.NDArray[np.bool_]

_THREADS = 2
_ROWS_FOR_THREADS = 100_000
"""With fewer, a report takes less time than starting a thread may."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What the table calls its columns."""

    unit: str = "user_id"
    """Who was randomised. Rows of one unit are never taken as independent."""
    variant: str = "variant"
    """The variant assigned, whatever was served."""
    stratum: str | None = None
    """Phase of the ramp, or day: compared within, then averaged."""
    segment: str | None = None
    """Also report each of its values on its own."""
    created_at: str | None = None
    """Seconds since the epoch; needed by metrics with a maturity."""


DEFAULT_COLUMNS = Columns()


def analyse(
    table: Table,
    metrics: Sequence[Metric],
    *,
    columns: Columns = DEFAULT_COLUMNS,
    control: str = "control",
    alpha: float = 0.05,
    correction: Correction = "holm",
    now: float | None = None,
) -> Report:
    """Compare every other variant with `control` in every metric.

    >>> table = {
    ...     "user_id": np.arange(4).repeat(2),
    ...     "variant": np.array(["control", "treatment"]).repeat(4),
    ...     "thumbs_up": np.array([0, 1, 0, 0, 1, 1, 0, 1]),
    ... }
    >>> analyse(table, [Metric(name="thumbs_up_rate", kind="ratio", numerator="thumbs_up")]).effects[0].estimate
    0.5

    Args:
        table: Anything that gives a column for `table[name]`, one row per interaction.
        metrics: What to report.
        columns: What the table calls its columns.
        control: The variant to compare with.
        alpha: One minus the coverage of the intervals.
        correction: Of the p-values of all effects of one role: Holm, or Benjamini and Hochberg.
        now: Seconds since the epoch; rows younger than a metric's maturity do not count for it.

    Raises:
        InvalidMetric: Two metrics share a name.
        InvalidTable: A column is missing or holds what it must not, or no row is of the control.
        AnalysisError: `alpha` is no probability.
    """
    check_names(metrics)
    if not 0 < alpha < 1:
        raise AnalysisError(f"alpha must lie between 0 and 1, got {alpha}")
    totals = _read(table, columns)
    variants = [Variants(control, name) for name in _treatments(totals.layout, control)]
    effects = _effects(totals, metrics, variants, columns, alpha, now)
    if columns.segment:
        effects += _segment_effects(totals, metrics, variants, columns, alpha, now)
    return Report(alpha, correction, tuple(_with_corrected_p_values(effects, correction)))


def whole_moments(
    table: Table, metrics: Sequence[Metric], *, columns: Columns = DEFAULT_COLUMNS
) -> dict[str, CellMoments]:
    """Return each metric's moments of everybody, all variants together: what is known before an experiment.

    A metric that no user has a value of is left out, and so are quantiles, which need the rows.

    Raises:
        InvalidTable: see `analyse`; also if some user is in several variants.
    """
    totals = _read(table, columns)
    found = {}
    for metric in metrics:
        moments = None if metric.kind == "quantile" else totals.moments(metric)
        if moments and moments.crossings:
            raise InvalidTable("users in several variants cannot be counted as one group")
        if moments and moments.cells:
            found[metric.name] = reduce(CellMoments.merge, moments.cells.values())
    return found


def _read(table: Table, columns: Columns) -> UserTotals:
    units = read_units(table, columns.unit)
    labels = read_labels(table, columns.variant)
    strata = read_labels(table, columns.stratum) if columns.stratum else None
    lengths = {len(units.codes), len(labels.codes)} | ({len(strata.codes)} if strata else set())
    if len(lengths) > 1:
        raise InvalidTable(f"columns differ in length: {sorted(lengths)}")
    return UserTotals(table, lay_out(units, labels, strata))


def _treatments(layout: Layout, control: str) -> list[str]:
    names = sorted({cell.variant for cell in layout.cells})
    if control not in names:
        raise InvalidTable(f"no row is of the control {control!r}; the variants are {', '.join(names) or 'none'}")
    return [name for name in names if name != control]


def _effects(
    totals: UserTotals,
    metrics: Sequence[Metric],
    variants: Sequence[Variants],
    columns: Columns,
    alpha: float,
    now: float | None,
) -> list[Effect]:
    matured = {0.0: totals}
    for metric in metrics:
        if metric.maturity_s not in matured:
            matured[metric.maturity_s] = totals.restricted(_is_mature(totals, metric.maturity_s, columns, now))
    effects_of = partial(_metric_effects, matured, variants=variants, alpha=alpha)
    if len(totals.layout.keys) < _ROWS_FOR_THREADS:
        return [effect for metric in metrics for effect in effects_of(metric)]
    with ThreadPoolExecutor(_THREADS) as pool:  # NumPy holds no lock while it adds up a column.
        return [effect for effects in pool.map(effects_of, metrics) for effect in effects]


def _metric_effects(
    matured: Mapping[float, UserTotals], metric: Metric, variants: Sequence[Variants], alpha: float
) -> list[Effect]:
    totals = matured[metric.maturity_s]
    if metric.kind == "quantile":
        return [_quantile_effect(totals, metric, pair, alpha) for pair in variants]
    moments = totals.moments(metric)
    return [moments_effect(metric, moments, pair, alpha) for pair in variants]


def _is_mature(totals: UserTotals, maturity_s: float, columns: Columns, now: float | None) -> BoolArray:
    if columns.created_at is None or now is None:
        raise InvalidTable("a metric with a maturity needs the column created_at, and now")
    return totals.numbers(columns.created_at) <= now - maturity_s


def _quantile_effect(totals: UserTotals, metric: Metric, variants: Variants, alpha: float) -> Effect:
    layout = totals.layout
    places = {name: [i for i, cell in enumerate(layout.cells) if cell.variant == name] for name in variants}
    values = totals.numbers(metric.numerator)

    def quantile_of(variant: str) -> ClusteredQuantile:
        if len(places[variant]) > 1:
            raise InsufficientData("quantiles are not compared within strata: use an exceedance")
        is_ours = layout.is_in(places[variant][0]) & ~np.isnan(values)
        if np.isinf(values[is_ours]).any():
            raise InvalidTable(f"column {metric.numerator!r} holds infinite numbers")
        return clustered_quantile(values[is_ours], layout.keys[is_ours] % layout.users, metric.level or 0.5, alpha)

    users = [layout.users_of(places[name]) for name in variants]
    return quantile_effect(metric, variants, (users[0], users[1]), quantile_of, alpha)


def _segment_effects(
    totals: UserTotals,
    metrics: Sequence[Metric],
    variants: Sequence[Variants],
    columns: Columns,
    alpha: float,
    now: float | None,
) -> list[Effect]:
    segments = read_labels(totals.table, columns.segment or "")
    effects = []
    for code, name in enumerate(segments.names):
        ours = totals.restricted(segments.codes == code)
        found = _effects(ours, metrics, variants, columns, alpha, now)
        effects += [replace(effect, segment=name) for effect in found]
    return effects


def _with_corrected_p_values(effects: Sequence[Effect], correction: Correction) -> list[Effect]:
    adjusted = list(effects)
    for role in {effect.role for effect in effects}:
        family = [i for i, effect in enumerate(effects) if effect.role == role and effect.p_value is not None]
        p_values = corrected([effects[i].p_value or 0.0 for i in family], correction)
        for i, p_value in zip(family, p_values, strict=True):
            adjusted[i] = replace(effects[i], adjusted_p_value=p_value)
    return adjusted
