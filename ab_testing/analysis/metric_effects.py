"""One metric's effect from its moments: which method its data allow, and what must be left unsaid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ab_testing.analysis.effects import Comparison, compare
from ab_testing.analysis.intervals import (
    Interval,
    confidence_sequence,
    sequence_p_value,
    t_interval,
    t_p_value,
)
from ab_testing.analysis.metrics import Metric
from ab_testing.analysis.moments import CellMoments, Moments
from ab_testing.analysis.quantiles import ClusteredQuantile
from ab_testing.analysis.relative_effects import relative_effect
from ab_testing.analysis.report import Effect, VariantValue, Verdict
from ab_testing.analysis.small_counts import Share, newcombe, newcombe_p_value, share_p_value
from ab_testing.errors import InsufficientData

_SEQUENCE_USERS = 100.0
_SEQUENCE_EVENTS = 30.0
"""A confidence sequence is as good as the normal approximation, so none is shown below so many degrees of freedom, or
so many events and non-events of a share in each variant."""

_FEW_EVENTS = 5.0
"""Below it the normal approximation to a share is not used at all."""

Answer = TypeVar("Answer")


class Variants(NamedTuple):
    """Who is compared with whom."""

    control: str
    treatment: str


def moments_effect(metric: Metric, moments: Moments, variants: Variants, alpha: float) -> Effect:
    """Return the effect on a metric whose evidence is sums."""
    control, treatment = (_whole(moments, name) for name in variants)
    empty = _empty(metric, variants, control, treatment)
    try:
        if metric.kind == "proportion" and _is_plain(moments, variants):
            return _share_effect(metric, empty, (control, treatment), alpha)
        _check_events((control, treatment), is_plain=_is_plain(moments, variants))
        found = compare(moments, *variants)
    except InsufficientData as exc:
        return _few_events_effect(metric, empty, (control, treatment), _is_plain(moments, variants), str(exc), alpha)
    return _normal_effect(metric, empty, found, (control, treatment), alpha)


def quantile_effect(
    metric: Metric,
    variants: Variants,
    users: tuple[int, int],
    quantile_of: Callable[[str], ClusteredQuantile],
    alpha: float,
) -> Effect:
    """Return the effect on a quantile; `quantile_of` gives one variant's."""
    empty = Effect(
        metric.name, metric.role, variants.control, variants.treatment, "insufficient_data", None,
        VariantValue(None, users[0]), VariantValue(None, users[1]),
    )  # fmt: skip
    try:
        control, treatment = quantile_of(variants.control), quantile_of(variants.treatment)
    except InsufficientData as exc:
        return replace(empty, reason=str(exc))
    estimate = treatment.value - control.value
    variance = control.std_error**2 + treatment.std_error**2
    interval = t_interval(estimate, variance, math.inf, alpha)
    return replace(
        empty,
        verdict=_verdict(metric, interval),
        control_value=VariantValue(control.value, control.users),
        treatment_value=VariantValue(treatment.value, treatment.users),
        method="woodruff",
        estimate=estimate,
        std_error=math.sqrt(variance),
        interval=interval,
        p_value=t_p_value(estimate, variance, math.inf),
        notes=("no confidence sequence for quantiles: watch an exceedance instead",),
    )


def _normal_effect(
    metric: Metric, empty: Effect, found: Comparison, cells: tuple[CellMoments | None, CellMoments | None], alpha: float
) -> Effect:
    interval = t_interval(found.estimate, found.variance, found.freedom, alpha)
    sequence, why_none = _or_reason(lambda: _sequence(metric, found, cells, alpha))
    relative, why_absolute = _or_reason(lambda: relative_effect(found, alpha))
    before = found.variance_without_covariate
    is_sequential = sequence is not None and metric.margin is not None
    return replace(
        empty,
        verdict=_verdict(metric, sequence or interval),
        control_value=VariantValue(found.control.value, found.control.users, found.control.effective_users),
        treatment_value=VariantValue(found.treatment.value, found.treatment.users, found.treatment.effective_users),
        method="delta" if found.theta is None else "cuped",
        estimate=found.estimate,
        std_error=math.sqrt(found.variance),
        interval=interval,
        p_value=t_p_value(found.estimate, found.variance, found.freedom),
        sequence=sequence,
        sequence_p_value=sequence_p_value(found.estimate, found.variance, _freedom(found), _prior_sd(metric))
        if is_sequential
        else None,
        relative=relative,
        variance_reduction=None if before is None else 1 - found.variance / before,
        notes=_notes(metric, found, no_sequence=why_none, no_relative=why_absolute),
    )


def _share_effect(
    metric: Metric, empty: Effect, cells: tuple[CellMoments | None, CellMoments | None], alpha: float
) -> Effect:
    control, treatment = (_share(cell) for cell in cells)
    interval = newcombe(control, treatment, alpha)
    return replace(
        empty,
        verdict=_verdict(metric, interval),
        method="newcombe",
        estimate=treatment.value - control.value,
        interval=interval,
        p_value=share_p_value(control, treatment),
        notes=("holds at one look only",),
    )


def _few_events_effect(
    metric: Metric,
    empty: Effect,
    cells: tuple[CellMoments | None, CellMoments | None],
    is_plain: bool,
    reason: str,
    alpha: float,
) -> Effect:
    """Few events in a variant, or nothing but events: of shares that still says something."""
    if not is_plain or not all(cell is not None and cell.users >= 2 and cell.is_share for cell in cells):
        return replace(empty, reason=reason)
    control, treatment = (_effective_share(cell) for cell in cells)
    interval = newcombe(control, treatment, alpha)
    return replace(
        empty,
        verdict=_verdict(metric, interval),
        method="newcombe",
        estimate=treatment.value - control.value,
        interval=interval,
        p_value=newcombe_p_value(control, treatment),
        notes=(f"{reason}: users are counted as coins", "holds at one look only"),
    )


def _check_events(cells: tuple[CellMoments | None, CellMoments | None], *, is_plain: bool) -> None:
    """Turn shares of few events away from the normal approximation, which does not hold for them."""
    if not is_plain or not all(cell is not None and cell.is_share for cell in cells):
        return
    if min(_fewest_events(cell) for cell in cells if cell is not None) < _FEW_EVENTS:
        raise InsufficientData("fewer than 5 events or non-events in a variant")


def _sequence(
    metric: Metric, found: Comparison, cells: tuple[CellMoments | None, CellMoments | None], alpha: float
) -> Interval:
    if metric.margin is None:
        raise InsufficientData("no confidence sequence: the metric has no margin")
    if _freedom(found) < _SEQUENCE_USERS:
        raise InsufficientData("no confidence sequence yet: fewer than 101 users in a variant")
    for cell in cells:
        if cell is not None and cell.is_share and _fewest_events(cell) < _SEQUENCE_EVENTS:
            raise InsufficientData("no confidence sequence yet: fewer than 30 events or non-events in a variant")
    return confidence_sequence(found.estimate, found.variance, _freedom(found), alpha, _prior_sd(metric))


def _freedom(found: Comparison) -> float:
    """Of a confidence sequence: those of the smaller variant."""
    return min(found.control.users, found.treatment.users) - 1.0


def _prior_sd(metric: Metric) -> float:
    return (metric.margin or 0.0) / 2


def _fewest_events(cell: CellMoments) -> float:
    return float(min(cell.sums[0], cell.sums[1] - cell.sums[0]))


def _verdict(metric: Metric, interval: Interval) -> Verdict:
    """Read an interval the metric's way round."""
    lower, upper = interval if metric.direction == "up_is_good" else (-interval.upper, -interval.lower)
    if upper < 0:
        return "worse"
    if lower > 0:
        return "better"
    return "not_worse" if metric.margin is not None and lower > -metric.margin else "unclear"


def _notes(metric: Metric, found: Comparison, *, no_sequence: str | None, no_relative: str | None) -> tuple[str, ...]:
    notes = [no_sequence] if no_sequence else []
    if no_relative:
        notes.append(f"no relative effect: {no_relative}")
    if metric.covariate is not None and found.theta is None:
        notes.append("the covariate does not vary: nothing was adjusted")
    return tuple(notes)


def _or_reason(compute: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
    try:
        return compute(), None
    except InsufficientData as exc:
        return None, str(exc)


def _whole(moments: Moments, variant: str) -> CellMoments | None:
    """All of a variant's users, strata together."""
    whole = None
    for cell, found in moments.cells.items():
        if cell.variant == variant:
            whole = found if whole is None else whole.merge(found)
    return whole


def _is_plain(moments: Moments, variants: Variants) -> bool:
    """Whether both variants are one cell each, sharing no user."""
    strata = {cell.stratum for cell in moments.cells if cell.variant in variants}
    crossed = any({first.variant, second.variant} <= set(variants) for first, second in moments.crossings)
    return len(strata) == 1 and not crossed


def _empty(metric: Metric, variants: Variants, control: CellMoments | None, treatment: CellMoments | None) -> Effect:
    return Effect(
        metric.name, metric.role, *variants, "insufficient_data", None,
        _variant_value(control), _variant_value(treatment),
    )  # fmt: skip


def _variant_value(cell: CellMoments | None) -> VariantValue:
    if cell is None:
        return VariantValue(None, 0)
    return VariantValue(float(cell.sums[0] / cell.sums[1]), cell.users, cell.effective_users)


def _share(cell: CellMoments | None) -> Share:
    if cell is None or cell.users < 2:
        raise InsufficientData(f"need at least 2 users per variant, got {cell.users if cell else 0}")
    return Share(float(cell.sums[0]), float(cell.sums[1]))


def _effective_share(cell: CellMoments | None) -> Share:
    assert cell is not None
    return Share(float(cell.sums[0] / cell.sums[1]) * cell.effective_users, cell.effective_users)
