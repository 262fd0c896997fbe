"""What a fixed split will take before its launch, and what is known of the harms that a canary watches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ab_testing.analysis.effects import user_spread
from ab_testing.analysis.errors import InvalidMetric
from ab_testing.analysis.metrics import Metric, exceedance, proportion, ratio
from ab_testing.analysis.moments import CellMoments
from ab_testing.analysis.power import Design, detectable_effect, required_users, required_users_at_any_look
from ab_testing.analysis.table_analysis import whole_moments
from ab_testing.analysis.tables import Table
from ab_testing.canary_state import GuardrailMetric
from ab_testing.errors import InsufficientData
from ab_testing.forecast import HarmRates
from ab_testing.outcomes import (
    EDIT,
    ERRORS,
    FALLBACK,
    HARMFUL_COMPLIANCE,
    LONG_ANSWERS,
    OVER_REFUSAL,
    REGENERATION,
    SLOW_ANSWERS,
    SLOW_FIRST_TOKEN,
    THUMBS_DOWN,
    TOXICITY,
)

RELATIVE_EFFECT: Final = 0.05
"""Of the value, where a metric has no margin: the change that a split should show."""
_SHARES: Final[Mapping[str, tuple[str, str]]] = {
    THUMBS_DOWN: ("thumbs_down", "answered"),
    TOXICITY: ("toxic", "scored"),
    HARMFUL_COMPLIANCE: ("harmful_complied", "harmful_asked"),
    OVER_REFUSAL: ("benign_refused", "benign_asked"),
    REGENERATION: ("regenerated", "answered"),
    EDIT: ("edited", "answered"),
    ERRORS: ("failed", "counted"),
    FALLBACK: ("fallback", "counted"),
}
"""Where a table has what each of a canary's harms counts, and among what."""
_LIMITED: Final[Mapping[str, tuple[str, float]]] = {
    SLOW_ANSWERS: ("latency_s", 1e-3),
    SLOW_FIRST_TOKEN: ("ttft_s", 1e-3),
    LONG_ANSWERS: ("tokens", 1.0),
}
"""Where it has what must exceed a threshold, and the threshold's unit in the column's."""


class Question(NamedTuple):
    """What is planned for."""

    users_per_hour: float | None = None
    """New ones, of all traffic; None for as many as were measured."""
    treatment_share: float = 0.5
    alpha: float = 0.05
    power: float = 0.8
    horizon_hours: float = 14 * 24.0
    rates: Mapping[str, float] = {}
    """Values of metrics that are known better than from the table."""
    effects: Mapping[str, float] = {}
    """Changes that a split should show, by metric."""
    times: float = 4.0
    """How many times as common a canary makes each harm."""


@dataclass(frozen=True, slots=True)
class MetricPlan:
    """What one metric of a split needs. What cannot be told is None, and `reason` says why."""

    metric: str
    role: str
    value: float | None = None
    """Of everybody now."""
    effect: float | None = None
    """The change that it should show: asked for, else the margin, else a twentieth of the value."""
    users: float | None = None
    """In all variants, for one look at the end."""
    users_at_any_look: float | None = None
    """The same, when looking every day decides; of metrics with a margin."""
    hours: float | None = None
    """Until `users` are there."""
    detectable: float | None = None
    """The smallest change that the users of the horizon show."""
    reason: str | None = None


def plan_split(table: Table, metrics: Sequence[Metric], question: Question) -> list[MetricPlan]:
    """Return what each metric of a fixed split needs.

    Raises:
        InvalidMetric: a rate or an effect is named that is no metric's.
    """
    names = {metric.name for metric in metrics}
    unknown = sorted({*question.effects, *question.rates} - names - _SHARES.keys() - _LIMITED.keys())
    if unknown:
        raise InvalidMetric(f"there is no metric {unknown[0]!r}; there are {', '.join(sorted(names))}")
    moments = whole_moments(table, metrics)
    return [_plan(metric, moments.get(metric.name), question) for metric in metrics]


def harm_rates(
    table: Table, metrics: Sequence[GuardrailMetric], *, given: Mapping[str, float], times: float
) -> dict[str, HarmRates]:
    """Return how often users see each harm that a canary watches, and how often with a candidate that is worse.

    Of harms whose first event is evidence, that is the share of users who see any; of others, the mean of the users'
    shares. A harm that nobody saw is left out.

    Args:
        table: As `read_traffic` gives it.
        metrics: Of the canary.
        given: Rates that are known better than from the table.
        times: How many times as common the candidate makes each harm.
    """
    measured = whole_moments(table, [_as_measured(metric) for metric in metrics])
    seen = {name: float(cell.sums[0] / cell.sums[1]) for name, cell in measured.items()}
    rates = {metric.name: given.get(metric.name, seen.get(metric.name, 0.0)) for metric in metrics}
    return {name: HarmRates(rate, min(rate * times, 1.0)) for name, rate in rates.items() if rate > 0}


def _as_measured(harm: GuardrailMetric) -> Metric:
    """On the columns of `EXPERIMENT_COLUMNS`."""
    if harm.name in _LIMITED:
        column, unit = _LIMITED[harm.name]
        return exceedance(harm.name, column, (harm.threshold or 0.0) * unit)
    happened, applies = _SHARES[harm.name]
    return proportion(harm.name, happened) if harm.counts_events else ratio(harm.name, happened, applies)


def _plan(metric: Metric, cell: CellMoments | None, question: Question) -> MetricPlan:
    try:
        base = _base(metric, cell, question.rates.get(metric.name))
        return _planned(metric, base, question)
    except InsufficientData as exc:
        return MetricPlan(metric.name, metric.role, reason=str(exc))


class _Base(NamedTuple):
    """What is known of a metric before."""

    value: float
    sd: float
    """Of a user."""


def _base(metric: Metric, cell: CellMoments | None, rate: float | None) -> _Base:
    """Of a rate that was only named, each user counts as one coin."""
    if rate is not None:
        if not 0 < rate < 1:
            raise InsufficientData(f"a rate lies between 0 and 1, not at {rate:g}")
        return _Base(rate, math.sqrt(rate * (1 - rate)))
    if metric.kind == "quantile":
        raise InsufficientData("a quantile's error is not known before: plan with a mean or an exceedance")
    if cell is None or cell.sums[0] == 0:
        raise InsufficientData("nothing of the kind was seen: name its rate")
    return _Base(float(cell.sums[0] / cell.sums[1]), user_spread(cell))


def _planned(metric: Metric, base: _Base, question: Question) -> MetricPlan:
    design = Design(base.sd, question.alpha, question.treatment_share)
    effect = question.effects.get(metric.name) or metric.margin or RELATIVE_EFFECT * abs(base.value)
    users = required_users(design, effect, question.power)
    users_per_hour = question.users_per_hour or 0.0
    horizon = users_per_hour * question.horizon_hours
    return MetricPlan(
        metric=metric.name,
        role=metric.role,
        value=base.value,
        effect=effect,
        users=users,
        users_at_any_look=_at_any_look(metric, design, effect, question.power),
        hours=users / users_per_hour if users_per_hour > 0 else None,
        detectable=detectable_effect(design, horizon, question.power) if horizon > 0 else None,
    )


def _at_any_look(metric: Metric, design: Design, effect: float, power: float) -> float | None:
    return None if metric.margin is None else required_users_at_any_look(design, effect, metric.margin / 2, power)
