"""What a rollout will do, said before it is launched: its steps, what decides, and what a harm would cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ab_testing.canary_state import CanaryConfig, GuardrailMetric
from ab_testing.plan import Question
from ab_testing.planning import ExperimentPlan, canary_sentences, plan_experiment
from ab_testing.rollout_rules import canary_config
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import RolloutSettings

SEEN_DAYS = 7.0
"""Of the past, to learn traffic and rates from."""


class RolloutPlan(NamedTuple):
    """Rules that would be frozen at a launch now, and what they are expected to cost."""

    config: CanaryConfig
    maturity_s: float
    expected: ExperimentPlan | None
    unknown: str
    """Why nothing can be forecast; empty if something is."""

    def to_json(self) -> dict[str, object]:
        return {
            "config": self.config.to_json(),
            "config_hash": self.config.config_hash,
            "maturity_s": self.maturity_s,
            "canary": None if self.expected is None else self.expected.to_json()["canary"],
            "unknown": self.unknown,
        }


def plan_rollout(database: Database, rules: RolloutSettings, alias: str, *, now: float) -> RolloutPlan:
    """Plan a rollout of the alias with the traffic and the rates of the last week.

    Raises:
        ConfigurationError: the rollout's settings contradict each other.
    """
    config = canary_config(rules)
    try:
        expected = plan_experiment(database, rules, alias, Question(), days=SEEN_DAYS, now=now)
    except NegativeVerdict as exc:
        return RolloutPlan(config, rules.maturity_s, None, str(exc))
    return RolloutPlan(config, rules.maturity_s, expected, "")


def sentences(plan: RolloutPlan) -> Iterator[str]:
    """The plan in plain words."""
    config = plan.config
    yield f"steps: {', '.join(_percent(step) for step in config.steps)} of all traffic, then everybody"
    yield (
        f"each step: at least {config.min_dwell_s:g} s and {', '.join(map(str, config.min_users))} canary users;"
        f" a user counts {plan.maturity_s:g} s after the first answer"
    )
    yield from (_metric_sentence(metric) for metric in config.metrics)
    yield (
        f"breaker: {_percent(config.breaker_error_share)} of at least {config.breaker_min_requests} canary requests"
        " in a minute failed, and so much more than of the control's"
    )
    yield f"promotion: {_promotion(config)}"
    yield from _forecast(plan)


def _metric_sentence(metric: GuardrailMetric) -> str:
    above = "" if metric.threshold is None else f" above {metric.threshold:g}"
    events = ", each user's first event at once" if metric.counts_events else ""
    margin = "can only roll back" if metric.role == "signal" else f"margin {_percent(metric.margin)}"
    return f"{metric.role} {metric.name}{above}: {margin}, {_percent(metric.weight)} of the rollback evidence{events}"


def _promotion(config: CanaryConfig) -> str:
    bake = f"not before {config.bake_s:g} s after the launch" if config.bake_s else "as soon as the evidence suffices"
    approval = ", by a person's order" if config.needs_approval else ""
    watch = f"; watched for {config.watch_s:g} s after it" if config.watch_s else ""
    return f"{bake}{approval}{watch}; held as inconclusive after {config.max_time_s:g} s"


def _forecast(plan: RolloutPlan) -> Iterator[str]:
    if plan.expected is None:
        yield f"forecast: none, {plan.unknown}"
        return
    yield from canary_sentences(plan.expected)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
