"""The rules of a rollout, made from the settings at its launch and frozen there."""

from __future__ import annotations

from collections.abc import Iterator

from ab_testing.canary_state import CanaryConfig, GuardrailMetric, Role
from ab_testing.errors import InvalidCanary
from ab_testing.outcomes import HARMFUL_COMPLIANCE, HARMS, OVER_REFUSAL, THUMBS_DOWN, TOXICITY
from pawl.errors import ConfigurationError
from pawl.settings import RolloutMetricSettings, RolloutSettings

UNUSED_MARGIN = 0.5
"""Of a metric that can only roll back."""


def canary_config(settings: RolloutSettings) -> CanaryConfig:
    """The rules of a rollout, frozen at its launch.

    Raises:
        ConfigurationError: the settings contradict each other.
    """
    try:
        return CanaryConfig(
            metrics=tuple(_metrics(settings)),
            steps=tuple(settings.steps),
            alpha_rollback=settings.alpha_rollback,
            alpha_promote=settings.alpha_promote,
            harm_budget=settings.harm_budget,
            min_dwell_s=settings.min_dwell_s,
            min_users=tuple(settings.min_users),
            breaker_error_share=settings.breaker_error_share,
            breaker_min_requests=settings.breaker_min_requests,
            max_time_s=settings.max_time_s,
            watch_s=settings.watch_s,
            bake_s=settings.bake_s,
            needs_approval=settings.needs_approval,
        )
    except InvalidCanary as exc:
        raise ConfigurationError(f"rollout: {exc}") from exc


def _metrics(settings: RolloutSettings) -> Iterator[GuardrailMetric]:
    if settings.metrics is None:
        yield from _usual_metrics(settings)
        return
    for place, declared in enumerate(settings.metrics):
        _check(declared, f"rollout.metrics.{place}")
        yield _metric(declared.name, declared.margin, declared.weight, declared.role, declared.threshold)


def _usual_metrics(settings: RolloutSettings) -> Iterator[GuardrailMetric]:
    """Half of the rollback evidence is for safety."""
    compliance = settings.harmful_compliance_margin
    yield _metric(THUMBS_DOWN, settings.thumbs_margin, 0.4, "primary")
    yield _metric(TOXICITY, settings.toxicity_margin, 0.25, "guardrail")
    yield _metric(HARMFUL_COMPLIANCE, compliance or UNUSED_MARGIN, 0.25, "guardrail" if compliance else "signal")
    yield _metric(OVER_REFUSAL, settings.over_refusal_margin, 0.1, "guardrail")


def _metric(name: str, margin: float, weight: float, role: Role, threshold: float | None = None) -> GuardrailMetric:
    return GuardrailMetric(name, margin, weight, role, threshold, counts_events=HARMS[name].is_rare)


def _check(declared: RolloutMetricSettings, path: str) -> None:
    if HARMS[declared.name].has_threshold and declared.threshold is None:
        raise ConfigurationError(f"{path}.threshold: {declared.name} needs one")
    if declared.threshold is not None and not HARMS[declared.name].has_threshold:
        raise ConfigurationError(f"{path}.threshold: {declared.name} has none")
