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
    check_outcome,
    log_split_mismatch,
    upper_harm_bound,
)
from ab_testing.errors import InvalidCanary, InvalidOutcome
from ab_testing.evidence import HarmWeights, MetricEvidence, MetricTally, harm_weights, log_users_mean
from ab_testing.experiment import CANARY_RESERVE

Role = Literal["primary", "guardrail", "signal"]
"""The primary metric also bounds each step; a signal can roll back, but promotion does not wait for evidence on it."""
Status = Literal["ramp", "certify", "hold", "promoted", "rolled_back", "aborted"]
HeldReason = Literal["srm_assigned", "srm_scored", "srm", "missing_data", "inconclusive", "approval", "operator"]
"""What a canary waits for. "srm" is what versions before 2 of the method wrote for "srm_scored"."""
SPLIT_FAULTS: frozenset[HeldReason | None] = frozenset({"srm_assigned", "srm_scored", "srm"})
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
    threshold: float | None = None
    """Of an exceedance: above it an answer counts as slow or long."""
    counts_events: bool = False
    """Whether each user's first harmful event is evidence at once: for harms that at most one user in twenty sees."""


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
    watch_s: float = 0.0
    """How long the candidate is watched after its promotion, the old champion loaded beside it."""
    srm_alpha: float = 0.001
    certify_from: float = 0.10
    """Smallest share of traffic whose users count towards promotion: a 1 % canary catches disasters, no more."""
    bound_margins: tuple[float, ...] = (0.02, 0.04, 0.05, 0.1, 0.2, 0.5)
    """Margins among which the bound on the primary metric is looked for."""
    bake_s: float = 0.0
    """Nothing is promoted sooner than this after the launch."""
    needs_approval: bool = False
    """Whether a person must order the promotion, once the evidence suffices."""
    max_silence_s: float = 21_600.0
    """Nothing advances when the last user was learned of longer ago than this, or in the future: the evidence is stale
    or the clock has jumped. Such spans do not count as time that has passed."""

    def __post_init__(self) -> None:
        _check_steps(self)
        _check_metrics(self)
        for name in ("alpha_rollback", "alpha_promote", "harm_budget", "srm_alpha", "breaker_error_share"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidCanary(f"{name} must lie between 0 and 1")
        if not (0 <= self.min_dwell_s < self.max_time_s < math.inf and 0 <= self.bake_s < self.max_time_s):
            raise InvalidCanary("min_dwell_s and bake_s must be shorter than max_time_s")
        if not 0 < self.max_silence_s < math.inf:
            raise InvalidCanary("max_silence_s must be above 0")
        if self.breaker_min_requests < 1:
            raise InvalidCanary("breaker_min_requests must be at least 1")

    @property
    def harm_weights(self) -> dict[str, HarmWeights]:
        """What the bets of each metric count for in the evidence of harm."""
        return {m.name: harm_weights(m.weight, counts_events=m.counts_events) for m in self.metrics}

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


class UserEvent(NamedTuple):
    """The first harmful event of one analysed user, in one metric, told of the moment it is known.

    The guarantee is exact where it is told of before the user's outcome counts: what the outcome moves later, such as
    the time of a step, may hint at the user's side.
    """

    metric: str
    unit: str
    is_treatment: bool
    treatment_probability: float
    """That of the user's own phase, as in `UserOutcome`: whatever the weight is by now."""
    phase: int
    """Step in which the user was first seen."""


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
    """Largest logarithm so far of the evidence of harm, the users' weighted mean or one metric's bet on events, among
    those that could decide."""
    harm_metric: str | None = None
    """The metric that contributed most to that peak."""
    held_reason: HeldReason | None = None
    assigned: tuple[PhaseCount, ...] = ()
    """Users as they were assigned, whether or not anything was ever known of their outcome."""
    baked_from: float | None = None
    """From when the bake time counts; None for the start."""
    seen_at: float | None = None
    """When something was learned last; None for the start of the step."""
    seen: int = 0
    """How much had been learned by then."""

    @property
    def n_learned(self) -> int:
        """Users assigned, users matured and events: it rises with whatever is learned."""
        users = sum(count.control + count.treatment for count in (*self.assigned, *self.phases))
        return users + sum(evidence.events.events for evidence in self.metrics.values())

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
            "assigned": [list(count) for count in self.assigned],
            "baked_from": self.baked_from,
            "seen_at": self.seen_at,
            "seen": self.seen,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> CanaryState:
        metrics = cast(Mapping[str, Mapping[str, object]], data["metrics"])
        return cls(
            status=cast(Status, data["status"]),
            step=cast(int, data["step"]),
            started_at=cast(float, data["started_at"]),
            step_started_at=cast(float, data["step_started_at"]),
            cap_started_at=cast(float, data["cap_started_at"]),
            metrics={name: MetricEvidence.from_json(evidence) for name, evidence in metrics.items()},
            phases=_phases_from_json(data["phases"]),
            harm_peak=cast(float, data["harm_peak"]),
            harm_metric=cast("str | None", data["harm_metric"]),
            held_reason=cast("HeldReason | None", data["held_reason"]),
            assigned=_phases_from_json(data.get("assigned", ())),
            baked_from=cast("float | None", data.get("baked_from")),
            seen_at=cast("float | None", data.get("seen_at")),
            seen=cast(int, data.get("seen", 0)),
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
    if not _learns(state):
        return state
    tally = _Tally(state, config)
    for outcome in outcomes:
        tally.add(outcome)
    return tally.added_to(state)


def observe_events(state: CanaryState, config: CanaryConfig, events: Iterable[UserEvent]) -> CanaryState:
    """Fold first harmful events into the evidence, in the order in which they came to be known.

    The caller tells of each user once per metric, and only of users who are analysed. Events of metrics that do not
    count them change nothing.

    Raises:
        InvalidOutcome: The metric is unknown, or a probability is impossible.
    """
    if not _learns(state):
        return state
    for event in events:
        state = _observe_event(state, config, event)
    return state


def observe_assigned(state: CanaryState, config: CanaryConfig, counts: Iterable[PhaseCount]) -> CanaryState:
    """Add analysed users first seen since the last call, by phase: each user is counted once.

    Raises:
        InvalidOutcome: The canary has no such phase, a phase had another probability before, or a count is negative.
    """
    if not _learns(state):
        return state
    assigned = state.assigned
    for count in counts:
        if not 0 <= count.phase < len(config.steps) or min(count.control, count.treatment) < 0:
            raise InvalidOutcome(f"nobody can have been assigned as {count}")
        check_outcome(0.0, count.treatment_probability)
        assigned = _add_count(assigned, count)
    return replace(state, assigned=assigned)


def split_mismatch(counts: Iterable[PhaseCount]) -> float:
    """Return the log Bayes factor against the intended split, over all phases."""
    return math.fsum(
        log_split_mismatch(count.control, count.treatment, count.treatment_probability) for count in counts
    )


def _learns(state: CanaryState) -> bool:
    return not state.is_final and state.held_reason not in SPLIT_FAULTS


def harm_bound(state: CanaryState, config: CanaryConfig) -> float:
    """Return the always-valid upper bound on the added harm of the worst primary metric; 1 when nothing is known."""
    primaries = [state.metrics[metric.name] for metric in config.metrics if metric.role == "primary"]
    bounds = [upper_harm_bound(evidence.bound, config.alpha_promote) for evidence in primaries]
    return max(1.0 if bound is None else bound for bound in bounds)


class _Tally:
    """A state's evidence while matured users are being added to it: frozen again before anybody sees it."""

    def __init__(self, state: CanaryState, config: CanaryConfig) -> None:
        needed = -math.log(config.alpha_promote)
        self._metrics = {
            each.name: MetricTally(state.metrics[each.name], is_required=each.role != "signal", log_needed=needed)
            for each in config.metrics
        }
        self._config = config
        self._phases = {count.phase: count for count in state.phases}
        self._certifies_from = treatment_probability(config.certify_from) - _ROUNDING
        self._harm_peak = state.harm_peak
        self._harm_metric = state.harm_metric
        self._log_limit = max(state.harm_peak, -math.log(config.alpha_rollback))

    def add(self, outcome: UserOutcome) -> None:
        """Bet on one user in every metric that the user could show."""
        _, is_treatment, w, values, _ = outcome
        certifies = w >= self._certifies_from
        for name, metric in self._metrics.items():
            f = values.get(name)
            if f is not None:
                metric.add(f, is_treatment, w, certifies=certifies)
        self._count(outcome)
        self._raise_peak()

    def _count(self, outcome: UserOutcome) -> None:
        phase, w = outcome.phase, outcome.treatment_probability
        before = self._phases.get(phase)
        if before is None:
            check_outcome(0.0, w)
            before = PhaseCount(phase, w)
        self._phases[phase] = _sum(before, PhaseCount(phase, w, not outcome.is_treatment, outcome.is_treatment))

    def _raise_peak(self) -> None:
        if max([max(metric.harm.log_wealth) for metric in self._metrics.values()]) < self._log_limit:
            return  # No mean is above its largest part: nothing is decided here, and most users end here.
        weights = list(self._config.harm_weights.values())
        logs = [metric.harm.log_e_value for metric in self._metrics.values()]
        harm = log_users_mean(logs, weights)
        if harm > self._harm_peak:
            self._harm_peak = harm
            self._log_limit = max(self._log_limit, harm)
            parts = [log + _log(weight.users) for log, weight in zip(logs, weights, strict=True)]
            self._harm_metric = list(self._metrics)[parts.index(max(parts))]

    def added_to(self, state: CanaryState) -> CanaryState:
        return replace(
            state,
            metrics={name: tally.frozen() for name, tally in self._metrics.items()},
            phases=tuple([self._phases[phase] for phase in sorted(self._phases)]),
            harm_peak=self._harm_peak,
            harm_metric=self._harm_metric,
        )


def _observe_event(state: CanaryState, config: CanaryConfig, event: UserEvent) -> CanaryState:
    metric = next((metric for metric in config.metrics if metric.name == event.metric), None)
    if metric is None:
        raise InvalidOutcome(f"no metric is called {event.metric!r}")
    if not metric.counts_events:
        return state
    before = state.metrics[metric.name]
    after = before._replace(events=before.events.update(event.is_treatment, event.treatment_probability))
    state = replace(state, metrics={**state.metrics, metric.name: after})
    harm = after.events.log_e_value + _log(config.harm_weights[metric.name].events)
    return state if harm <= state.harm_peak else replace(state, harm_peak=harm, harm_metric=metric.name)


def _add_count(phases: tuple[PhaseCount, ...], more: PhaseCount) -> tuple[PhaseCount, ...]:
    counts = {count.phase: count for count in phases}
    counts[more.phase] = _sum(counts.get(more.phase, more._replace(control=0, treatment=0)), more)
    return tuple(counts[phase] for phase in sorted(counts))


def _sum(count: PhaseCount, more: PhaseCount) -> PhaseCount:
    phase, w, control, treatment = count
    if abs(w - more.treatment_probability) > _ROUNDING:
        raise InvalidOutcome(f"phase {phase} cannot have two probabilities of treatment")
    return PhaseCount(phase, w, control + more.control, treatment + more.treatment)


def _phases_from_json(data: object) -> tuple[PhaseCount, ...]:
    return tuple(PhaseCount(*count) for count in cast(Sequence[tuple[int, float, int, int]], data))


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
