"""A plan for one model alias: its own traffic and rates from the store, the rules from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from ab_testing.built_in_metrics import built_in
from ab_testing.experiment_table import DAY_S, read_traffic
from ab_testing.forecast import Detection, Forecast, forecast
from ab_testing.plan import MetricPlan, Question, harm_rates, plan_split
from ab_testing.rollout_rules import canary_config
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import RolloutSettings

_ON_FIRST_ROWS: Final = frozenset({"returned"})
"""Known of experiments alone: they have a first day."""


@dataclass(frozen=True, slots=True)
class ExperimentPlan:
    """What is to be expected of an alias's next experiment."""

    alias: str
    users_per_hour: float
    users_seen: int
    hours_seen: float
    """In how much of the past."""
    question: Question
    canary: Forecast
    """With the configured rules."""
    unseen: tuple[str, ...]
    """Harms that a canary watches and nobody saw: they are thought never to happen."""
    split: tuple[MetricPlan, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "alias": self.alias,
            "users_per_hour": self.users_per_hour,
            "measured": {"users": self.users_seen, "hours": self.hours_seen},
            "canary": {
                "times": self.question.times,
                "unseen": list(self.unseen),
                **asdict(self.canary),
                "users_to_promote": self.canary.users_to_promote,
                "minutes_to_promote": self.canary.minutes_to_promote,
            },
            "split": {
                "treatment_share": self.question.treatment_share,
                "power": self.question.power,
                "alpha": self.question.alpha,
                "horizon_hours": self.question.horizon_hours,
                "metrics": [asdict(metric) for metric in self.split],
            },
        }

    def split_rows(self) -> list[dict[str, object]]:
        """For people."""
        return [
            {**asdict(metric), "days": None if metric.hours is None else metric.hours / 24} for metric in self.split
        ]


def plan_experiment(
    database: Database, rules: RolloutSettings, alias: str, question: Question, *, days: float, now: float
) -> ExperimentPlan:
    """Plan a canary of the configured steps and a fixed split.

    Args:
        days: of the past, to learn traffic and rates from.

    Raises:
        NegativeVerdict: nothing was measured and no traffic is named.
        InvalidCanary: a rate is none, or there is no traffic.
        InvalidMetric: a rate or an effect is named that is no metric's.
        ConfigurationError: the rollout's settings contradict each other.
    """
    seen = read_traffic(database, alias, since=now - days * DAY_S, now=now)
    measured = seen.users / (seen.seconds / 3600) if seen.seconds > 0 else None
    users_per_hour = measured if question.users_per_hour is None else question.users_per_hour
    if users_per_hour is None:
        raise NegativeVerdict(f"{alias} had no traffic in the last {days:g} days; name it: --users-per-hour")
    asked = question._replace(users_per_hour=users_per_hour)
    metrics = [metric for metric in built_in(is_ramp=False) if metric.name not in _ON_FIRST_ROWS]
    config = canary_config(rules)
    rates = harm_rates(seen.table, config.metrics, given=question.rates, times=question.times)
    return ExperimentPlan(
        alias=alias,
        users_per_hour=users_per_hour,
        users_seen=seen.users,
        hours_seen=seen.seconds / 3600,
        question=asked,
        canary=forecast(config, rates, users_per_hour, maturity_s=rules.maturity_s),
        unseen=tuple(metric.name for metric in config.metrics if metric.name not in rates),
        split=tuple(plan_split(seen.table, metrics, asked)),
    )


def sentences(plan: ExperimentPlan) -> Iterator[str]:
    """The canary's part in plain words, and what the split's table is about."""
    yield (
        f"{plan.alias}: {plan.users_per_hour:.3g} new users an hour"
        f" ({plan.users_seen} users seen in {spelt_hours(plan.hours_seen)})"
    )
    yield from canary_sentences(plan)
    yield (
        f"a split with {plan.question.treatment_share:.0%} treatment, by metric: users for a power of"
        f" {plan.question.power:.0%}, and the smallest change that shows within"
        f" {spelt_hours(plan.question.horizon_hours)}:"
    )


def canary_sentences(plan: ExperimentPlan) -> Iterator[str]:
    """When a bad one is expected to be stopped, and a good one to be through."""
    yield f"a canary that makes a harm {plan.question.times:g} times as common is expected to be rolled back after:"
    yield from (f"  {detection_sentence(found)}" for found in plan.canary.detections)
    if not plan.canary.detections:
        yield "  unknown: no harm was seen yet; name rates, such as --rate toxicity=0.005"
    if plan.unseen:
        yield f"  ({', '.join(plan.unseen)}: nobody saw any, so it is left out)"
    users, minutes = plan.canary.users_to_promote, plan.canary.minutes_to_promote
    if users is None or minutes is None:
        yield f"a canary that changes nothing is expected to stay at step {len(plan.canary.steps) + 1}"
    else:
        yield (
            f"a canary that changes nothing is expected to be promoted after about {users:.0f} users of all traffic,"
            f" {spelt_hours(minutes / 60)}"
        )


def detection_sentence(found: Detection) -> str:
    """
    >>> detection_sentence(Detection("toxicity", 0, 0.01, True, 7.2, 293.2, 29_000.0, 40.1))
    'at 1 %: toxicity: 7 canary events, about 293 canary users, about 40 min at your traffic'
    """
    return (
        f"at {100 * found.weight:g} %: {found.metric}: {found.canary_events:.0f} canary events,"
        f" about {found.canary_users:.0f} canary users, about {spelt_hours(found.minutes / 60)} at your traffic"
    )


def spelt_hours(hours: float) -> str:
    """
    >>> [spelt_hours(hours) for hours in (0.66, 5.0, 100.0)]
    ['40 min', '5 h', '4.2 days']
    """
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.2g} days"
