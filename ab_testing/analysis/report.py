"""What a report says of each metric, and the report as text that is the same for the same data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from ab_testing.analysis.intervals import Interval
from ab_testing.analysis.metrics import Role
from ab_testing.analysis.relative_effects import RelativeEffect

Method = Literal["delta", "cuped", "newcombe", "woodruff"]
Verdict = Literal["better", "worse", "not_worse", "unclear", "insufficient_data"]


@dataclass(frozen=True, slots=True)
class VariantValue:
    """One variant's value of a metric."""

    value: float | None
    users: int
    effective_users: float | None = None
    """How many equally active users these are worth."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Treatment minus control in one metric. What could not be computed is None, and `notes` say why."""

    metric: str
    role: Role
    control: str
    treatment: str
    verdict: Verdict
    """By the confidence sequence where there is one, so that it holds at every look; else by the interval."""
    reason: str | None
    """Why there is no estimate."""
    control_value: VariantValue
    treatment_value: VariantValue
    method: Method | None = None
    estimate: float | None = None
    std_error: float | None = None
    """None where the interval is not a multiple of one."""
    interval: Interval | None = None
    """At one look."""
    p_value: float | None = None
    """At one look."""
    adjusted_p_value: float | None = None
    """Corrected for all effects of the same role in the report, segments included."""
    sequence: Interval | None = None
    """At all looks at once."""
    sequence_p_value: float | None = None
    relative: RelativeEffect | None = None
    variance_reduction: float | None = None
    """Share of the variance that the covariate removed."""
    segment: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All effects of an experiment."""

    alpha: float
    correction: str
    effects: tuple[Effect, ...]

    def __iter__(self) -> Iterator[Effect]:
        return iter(self.effects)

    def effect(self, metric: str, treatment: str | None = None, segment: str | None = None) -> Effect:
        """Return one effect; the first treatment's where none is named.

        Raises:
            KeyError: There is none.
        """
        for found in self.effects:
            if (found.metric, found.segment) == (metric, segment) and treatment in (None, found.treatment):
                return found
        raise KeyError(f"no effect of {metric!r} for treatment {treatment!r}, segment {segment!r}")

    def to_json(self) -> str:
        """As text: the same data give the same bytes, whatever table they came in. It never holds NaN."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    def rows(self) -> list[dict[str, object]]:
        """One flat record per effect, for a data frame of your choice."""
        return [_flat(effect) for effect in self.effects]


def _flat(effect: Effect) -> dict[str, object]:
    lower, upper = effect.interval or (None, None)
    sequence_lower, sequence_upper = effect.sequence or (None, None)
    relative = effect.relative
    return {
        "metric": effect.metric,
        "segment": effect.segment,
        "treatment": effect.treatment,
        "verdict": effect.verdict,
        "control_value": effect.control_value.value,
        "treatment_value": effect.treatment_value.value,
        "estimate": effect.estimate,
        "ci_lower": lower,
        "ci_upper": upper,
        "cs_lower": sequence_lower,
        "cs_upper": sequence_upper,
        "p_value": effect.p_value,
        "adjusted_p_value": effect.adjusted_p_value,
        "relative": relative.estimate if relative else None,
        "relative_lower": relative.interval.lower if relative else None,
        "relative_upper": relative.interval.upper if relative else None,
        "method": effect.method,
        "reason": effect.reason,
        "notes": "; ".join(effect.notes),
    }
