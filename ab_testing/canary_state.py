"""What a canary is told at launch, and what it has seen since: frozen values that go to JSON and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, cast

from ab_testing.assignment import treatment_probability
from ab_testing.eprocess import (
    METHOD,
    HarmBet,
    NonInferiorityBet,
    log_split_mismatch,
    log_weighted_mean,
    upper_harm_bound,
)
from ab_testing.errors import InvalidCanary, InvalidOutcome
from ab_testing.experiment import CANARY_RESERVE

Role = Literal["primary", "guardrail", "signal"]
"""The primary metric also bounds each step; a signal can roll back, but promotion does not wait for evidence on it."""
Status = Literal["ramp", "certify", "hold", "promoted", "rolled_back", "aborted"]
HeldReason = Literal["srm", "missing_data", "inconclusive", "operator"]
FINAL: frozenset[Status] = frozenset({"promoted", "rolled_back", "aborted"})

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class GuardrailMetric:
    """A harm per user, in [0, 1], up is worse."""

    name: str
    margin: float
    """Added harm (absolute) from which on the treatment must not be promoted."""
    weight: float
    """Share of the rollback evidence; the weights of all metrics add up to one."""
    role: Role = "guardrail"


@dataclass(frozen=True, slots=True)
class CanaryConfig:
    """Everything that decides about a canary. Frozen at launch: changing it later voids the guarantees."""

    metrics: tuple[GuardrailMetric, ...]
    steps: tuple[float, ...] = (0.01, 0.10, 0.50)
    """Shares of all traffic."""
    alpha_rollback: float = 0.05
    """Bound on the probability that a canary which is no worse is ever rolled back by a metric."""
    alpha_promote: float = 0.05
    """Bound on the probability that a canary which is worse by a margin is ever promoted."""
    harm_budget: float = 0.02
    """A step is taken only if the harm that it adds to all traffic stays below this, by the primary metric's bound."""
    min_dwell_s: float = 600.0
    min_users: tuple[int, ...] = (5, 20, 50)
    """Treatment users, first seen in the step and matured, that each step needs."""
    breaker_error_share: float = 0.2
    breaker_min_requests: int = 20
    max_time_s: float = 14 * 86_400.0
    srm_alpha: float = 0.001
    certify_from: float = 0.10
    """Smallest share of traffic whose users count towards promotion: a 1 % canary catches disasters, no more."""
    bound_margins: tuple[float, ...] = (0.02, 0.04, 0.05, 0.1, 0.2, 0.5)
    """Margins among which the bound on the primary metric is looked for."""

    def __post_init__(self) -> None:
        _check_steps(self)
        _check_metrics(self)
        for name in ("alpha_rollback", "alpha_promote", "harm_budget", "srm_alpha", "breaker_error_share"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidCanary(f"{name} must lie between 0 and 1")
        if not (0 <= self.min_dwell_s < self.max_time_s < math.inf):
            raise InvalidCanary("min_dwell_s must be shorter than max_time_s")
        if self.breaker_min_requests < 1:
            raise InvalidCanary("breaker_min_requests must be at least 1")

    @property
    def config_hash(self) -> str:
        """Identity of the rules, including the version of the statistics."""
        canonical = json.dumps([METHOD, self.to_json()], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, object]:
        return cast(dict[str, object], json.loads(json.dumps(asdict(self), allow_nan=False)))

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> CanaryConfig:
        """Return the configuration that `to_json` wrote.

        Raises:
            InvalidCanary: A key is unknown, or a value contradicts another one.
        """
        values = dict(data)
        try:
            metrics = tuple(GuardrailMetric(**metric) for metric in cast(Sequence[dict[str, object]], data["metrics"]))  # type: ignore[arg-type]
            lists = {name: tuple(cast(Sequence[float], value)) for name, value in values.items() if _is_list(value)}
            return cls(**(values | lists | {"metrics": metrics}))  # type: ignore[arg-type]
        except (KeyError, TypeError) as exc:
            raise InvalidCanary(f"not a canary configuration: {exc}") from exc


class UserOutcome(NamedTuple):
    """One analysed user whose outcome has matured. Every user is told of once."""

    unit: str
    is_treatment: bool
    treatment_probability: float
    """Of an analysed unit, at the weight in force when the user was first seen: `treatment_probability(weight)`."""
    values: Mapping[str, float | None]
    """Harm by metric; None where this user's requests could not show it, for reasons older than the variant."""
    phase: int
    """Step in which the user was first seen, in any zone."""


@dataclass(frozen=True, slots=True)
class MetricEvidence:
    """What is known about one metric."""

    harm: HarmBet
    certify: NonInferiorityBet
    bound: tuple[NonInferiorityBet, ...] = ()
    treatment_sum: float = 0.0
    treatment_count: int = 0

    def to_json(self) -> dict[str, object]:
        return {
            "harm": self.harm.to_json(),
            "certify": self.certify.to_json(),
            "bound": [bet.to_json() for bet in self.bound],
            "treatment_sum": self.treatment_sum,
            "treatment_count": self.treatment_count,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> MetricEvidence:
        bound = cast(Sequence[Mapping[str, object]], data["bound"])
        return cls(
            HarmBet.from_json(cast(Mapping[str, object], data["harm"])),
            NonInferiorityBet.from_json(cast(Mapping[str, object], data["certify"])),
            tuple(NonInferiorityBet.from_json(bet) for bet in bound),
            float(cast(float, data["treatment_sum"])),
            int(cast(int, data["treatment_count"])),
        )


class PhaseCount(NamedTuple):
    """Analysed users first seen in one phase."""

    phase: int
    treatment_probability: float
    control: int = 0
    treatment: int = 0


@dataclass(frozen=True, slots=True)
class CanaryState:
    """Everything a canary remembers: its size does not grow with traffic."""

    status: Status
    step: int
    started_at: float
    step_started_at: float
    cap_started_at: float
    """From when the time cap counts: the start, or the last time a person resumed."""
    metrics: Mapping[str, MetricEvidence]
    phases: tuple[PhaseCount, ...] = ()
    harm_peak: float = 0.0
    """Largest logarithm, over all users so far, of the weighted mean of the metrics' evidence of harm."""
    harm_metric: str | None = None
    """The metric that contributed most to that peak."""
    held_reason: HeldReason | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    def phase_count(self, phase: int) -> PhaseCount | None:
        return next((count for count in self.phases if count.phase == phase), None)

    def to_json(self) -> dict[str, object]:
        return {
            "status": self.status,
            "step": self.step,
            "started_at": self.started_at,
            "step_started_at": self.step_started_at,
            "cap_started_at": self.cap_started_at,
            "metrics": {name: evidence.to_json() for name, evidence in self.metrics.items()},
            "phases": [list(count) for count in self.phases],
            "harm_peak": self.harm_peak,
            "harm_metric": self.harm_metric,
            "held_reason": self.held_reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> CanaryState:
        metrics = cast(Mapping[str, Mapping[str, object]], data["metrics"])
        phases = cast(Sequence[tuple[int, float, int, int]], data["phases"])
        return cls(
            status=cast(Status, data["status"]),
            step=cast(int, data["step"]),
            started_at=cast(float, data["started_at"]),
            step_started_at=cast(float, data["step_started_at"]),
            cap_started_at=cast(float, data["cap_started_at"]),
            metrics={name: MetricEvidence.from_json(evidence) for name, evidence in metrics.items()},
            phases=tuple(PhaseCount(*count) for count in phases),
            harm_peak=cast(float, data["harm_peak"]),
            harm_metric=cast("str | None", data["harm_metric"]),
            held_reason=cast("HeldReason | None", data["held_reason"]),
        )


def launch(config: CanaryConfig, now: float) -> CanaryState:
    """Return the state of a canary that starts now, at the first step and with no evidence at all."""
    return CanaryState(
        status=running_status(config, 0),
        step=0,
        started_at=now,
        step_started_at=now,
        cap_started_at=now,
        metrics={metric.name: _no_evidence(metric, config) for metric in config.metrics},
    )


def running_status(config: CanaryConfig, step: int) -> Status:
    return "certify" if step == len(config.steps) - 1 else "ramp"


def observe(state: CanaryState, config: CanaryConfig, outcomes: Iterable[UserOutcome]) -> CanaryState:
    """Fold matured users into the evidence, one by one.

    The order of the users matters and how they are batched does not. The caller sees to it that no user comes twice,
    and that only users come who were analysed in the phase in which they were first seen. A canary that is over, or
    whose split cannot be trusted, learns nothing more.

    Raises:
        InvalidOutcome: A value or a probability is impossible.
    """
    if state.is_final or state.held_reason == "srm":
        return state
    for outcome in outcomes:
        state = _observe_user(state, config, outcome)
    return state


def split_mismatch(state: CanaryState) -> float:
    """Return the log Bayes factor against the intended split, over all phases."""
    return math.fsum(
        log_split_mismatch(count.control, count.treatment, count.treatment_probability) for count in state.phases
    )


def harm_bound(state: CanaryState, config: CanaryConfig) -> float:
    """Return the always-valid upper bound on the added harm of the worst primary metric; 1 when nothing is known."""
    primaries = [state.metrics[metric.name] for metric in config.metrics if metric.role == "primary"]
    bounds = [upper_harm_bound(evidence.bound, config.alpha_promote) for evidence in primaries]
    return max(1.0 if bound is None else bound for bound in bounds)


def _observe_user(state: CanaryState, config: CanaryConfig, outcome: UserOutcome) -> CanaryState:
    certifies = outcome.treatment_probability >= treatment_probability(config.certify_from) - _ROUNDING
    metrics = {
        name: _observe_metric(evidence, outcome, outcome.values.get(name), certifies)
        for name, evidence in state.metrics.items()
    }
    logs = [metrics[metric.name].harm.log_e_value for metric in config.metrics]
    weights = [metric.weight for metric in config.metrics]
    harm = log_weighted_mean(logs, weights)
    state = replace(state, metrics=metrics, phases=_count(state.phases, outcome))
    if harm <= state.harm_peak:
        return state
    worst = max(config.metrics, key=lambda metric: metrics[metric.name].harm.log_e_value + _log(metric.weight))
    return replace(state, harm_peak=harm, harm_metric=worst.name)


def _observe_metric(evidence: MetricEvidence, outcome: UserOutcome, f: float | None, certifies: bool) -> MetricEvidence:
    if f is None:
        return evidence
    arguments = (f, outcome.is_treatment, outcome.treatment_probability)
    return MetricEvidence(
        harm=evidence.harm.update(*arguments),
        certify=evidence.certify.update(*arguments) if certifies else evidence.certify,
        bound=tuple([bet.update(*arguments) for bet in evidence.bound]),
        treatment_sum=evidence.treatment_sum + (f if outcome.is_treatment else 0.0),
        treatment_count=evidence.treatment_count + outcome.is_treatment,
    )


def _count(phases: tuple[PhaseCount, ...], outcome: UserOutcome) -> tuple[PhaseCount, ...]:
    counts = {count.phase: count for count in phases}
    count = counts.get(outcome.phase, PhaseCount(outcome.phase, outcome.treatment_probability))
    if abs(count.treatment_probability - outcome.treatment_probability) > _ROUNDING:
        raise InvalidOutcome(f"phase {outcome.phase} cannot have two probabilities of treatment")
    counts[outcome.phase] = count._replace(
        control=count.control + (not outcome.is_treatment), treatment=count.treatment + outcome.is_treatment
    )
    return tuple(counts[phase] for phase in sorted(counts))


def _no_evidence(metric: GuardrailMetric, config: CanaryConfig) -> MetricEvidence:
    margins = config.bound_margins if metric.role == "primary" else ()
    return MetricEvidence(
        HarmBet(), NonInferiorityBet(metric.margin), tuple(NonInferiorityBet(margin) for margin in margins)
    )


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _check_steps(config: CanaryConfig) -> None:
    steps = config.steps
    if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] <= 1 - CANARY_RESERVE:
        raise InvalidCanary(f"steps must rise from above 0 to at most {1 - CANARY_RESERVE}, got {steps}")
    if steps[-1] < config.certify_from:
        raise InvalidCanary("the last step must be large enough to certify: see certify_from")
    if len(config.min_users) != len(steps) or min(config.min_users) < 1:
        raise InvalidCanary("min_users needs a number of at least 1 for every step")


def _check_metrics(config: CanaryConfig) -> None:
    names = [metric.name for metric in config.metrics]
    if len(set(names)) != len(names) or not any(metric.role == "primary" for metric in config.metrics):
        raise InvalidCanary("metrics need different names, and one of them must be primary")
    if any(metric.weight < 0 for metric in config.metrics) or abs(sum(m.weight for m in config.metrics) - 1) > 1e-6:
        raise InvalidCanary("the weights of the metrics must be at least 0 and add up to 1")
    if not all(0 < margin < 1 for margin in (*config.bound_margins, *(metric.margin for metric in config.metrics))):
        raise InvalidCanary("margins must lie between 0 and 1")
    if not config.bound_margins or min(config.bound_margins) > config.harm_budget / config.steps[-1]:
        raise InvalidCanary("no margin in bound_margins is small enough for harm_budget: the last step is out of reach")
