"""The canary's decisions: roll back, hold, advance, promote or go on, and why in plain words.

All functions are pure: the same state, configuration, time and health give the same decision, so that a log of inputs
replays to the same verdicts. Two promises hold whatever the traffic does and however often anyone looks:

* a canary that is no worse is ever rolled back by its metrics with probability at most `alpha_rollback`;
* a canary that is worse by the margin in some metric is promoted with probability at most `alpha_promote`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, cast, get_args

from ab_testing.canary_state import (
    CanaryConfig,
    CanaryState,
    GuardrailMetric,
    HeldReason,
    PhaseCount,
    Status,
    UserEvent,
    UserOutcome,
    harm_bound,
    launch,
    observe,
    observe_assigned,
    observe_events,
    running_status,
    split_mismatch,
)
from ab_testing.eprocess import NonInferiorityBet, finite_exp
from ab_testing.errors import InvalidTransition
from ab_testing.evidence import MetricEvidence, log_harm
from ab_testing.experiment import CANARY_RESERVE

__all__ = [
    "CanaryConfig",
    "CanaryState",
    "Decision",
    "GuardrailMetric",
    "Health",
    "PhaseCount",
    "UserEvent",
    "UserOutcome",
    "apply",
    "decide",
    "launch",
    "observe",
    "observe_assigned",
    "observe_events",
    "override",
    "weight_of",
]

Verdict = Literal["advance", "promote", "hold", "continue", "roll_back", "abort", "resume"]
Cause = HeldReason | Literal["breaker", "harm", "evidence", "waiting", "over"]
Evidence = Mapping[str, float | Mapping[str, float]]
_HOLDS: frozenset[str] = frozenset(get_args(HeldReason))


@dataclass(frozen=True, slots=True)
class Health:
    """What the controller knows besides the matured users."""

    canary_requests: int = 0
    """Requests assigned to the treatment in the last minute."""
    canary_errors: int = 0
    """Those of them that failed hard or timed out."""
    control_requests: int = 0
    """The same of the control."""
    control_errors: int = 0
    missing: tuple[str, ...] = ()
    """Metrics that cannot be measured now: no scorer, no weights, no recent scores."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, the share of traffic that follows from it, and why."""

    verdict: Verdict
    weight: float
    """Share of all traffic for the treatment once the decision is applied; 1 means that it becomes the champion."""
    reason: str
    cause: Cause
    metric: str | None = None
    evidence: Evidence = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "verdict": self.verdict,
            "weight": self.weight,
            "reason": self.reason,
            "cause": self.cause,
            "metric": self.metric,
            "evidence": {
                name: dict(value) if isinstance(value, Mapping) else value for name, value in self.evidence.items()
            },
        }


@dataclass(frozen=True)
class _View:
    """All that a decision may depend on, and what more than one check asks of it."""

    state: CanaryState
    config: CanaryConfig
    now: float
    health: Health

    @cached_property
    def blocker(self) -> _Blocker | None:
        return _blocker(self)

    @cached_property
    def log_certify(self) -> dict[str, float]:
        """Logarithm, by metric, of the evidence as it is now that the harm is below the margin."""
        return {name: evidence.certify.log_e_value for name, evidence in self.state.metrics.items()}

    @property
    def step_count(self) -> PhaseCount:
        return self.state.phase_count(self.state.step) or PhaseCount(self.state.step, 0.5)

    @property
    def weight(self) -> float:
        return weight_of(self.state, self.config)

    @property
    def is_last_step(self) -> bool:
        return self.state.step == len(self.config.steps) - 1


def weight_of(state: CanaryState, config: CanaryConfig) -> float:
    """Return the share of all traffic that the treatment has in this state."""
    if state.is_final:
        return 1.0 if state.status == "promoted" else 0.0
    return config.steps[state.step]


def decide(state: CanaryState, config: CanaryConfig, now: float, health: Health) -> Decision:
    """Return what to do now. The order of the checks is part of the design: what protects users comes first."""
    view = _View(state, config, now, health)
    for check in (_over, _breaker, _srm, _harm, _missing_data, _held, _progress, _time_cap):
        decision = check(view)
        if decision is not None:
            return decision
    return _decision(view, "continue", _waiting_for(view), "waiting")


def override(
    state: CanaryState,
    config: CanaryConfig,
    action: Literal["advance", "hold", "resume", "roll_back", "abort"],
    reason: str,
) -> Decision:
    """Return the decision of a person, who answers for it instead of the evidence.

    Raises:
        InvalidTransition: The canary is over.
    """
    if state.is_final:
        raise InvalidTransition(f"the canary is over: {state.status}")
    if action == "advance":
        return Decision(*_next_step(state, config), reason, "operator")
    weight = 0.0 if action in ("roll_back", "abort") else weight_of(state, config)
    return Decision(action, weight, reason, "operator")


def apply(state: CanaryState, config: CanaryConfig, decision: Decision, now: float) -> CanaryState:
    """Return the state after the decision.

    Raises:
        InvalidTransition: The canary is over and the decision would change that.
    """
    if decision.cause == "over":
        return state
    if state.is_final:
        raise InvalidTransition(f"the canary is over: {state.status}")
    state = _without_gap(state, config, now)
    match decision.verdict:
        case "roll_back":
            return _end(state, "rolled_back")
        case "abort":
            return _end(state, "aborted")
        case "promote":
            return _end(state, "promoted")
        case "advance":
            return _enter(state, config, state.step + 1, now)
        case "hold":
            return replace(state, status="hold", held_reason=_held_reason(decision))
        case "resume":
            return replace(_running(state, config), cap_started_at=now)
        case "continue":
            return _running(state, config)


def _without_gap(state: CanaryState, config: CanaryConfig, now: float) -> CanaryState:
    """Note when something was learned last. A silence, or a jump of the clock, before it is not time that passed."""
    if state.n_learned == state.seen or not math.isfinite(now):
        return state
    gap = now - _seen_at(state)
    lost = 0.0 if 0 <= gap <= config.max_silence_s else gap
    return replace(
        state,
        step_started_at=state.step_started_at + lost,
        cap_started_at=state.cap_started_at + lost,
        baked_from=_baked_from(state) + lost,
        seen_at=now,
        seen=state.n_learned,
    )


def _seen_at(state: CanaryState) -> float:
    return state.step_started_at if state.seen_at is None else state.seen_at


def _baked_from(state: CanaryState) -> float:
    return state.started_at if state.baked_from is None else state.baked_from


def _over(view: _View) -> Decision | None:
    if not view.state.is_final:
        return None
    return _decision(view, "continue", f"The canary is over: {view.state.status}.", "over")


def _breaker(view: _View) -> Decision | None:
    """Roll back when the canary's failed share reaches the limit, and the control's share plus the limit.

    Where the control fails as often, the engines or the network are to blame, and the champion would not help anybody.
    """
    requests, errors = view.health.canary_requests, view.health.canary_errors
    limit = view.config.breaker_error_share
    if requests < view.config.breaker_min_requests:
        return None
    control_share = view.health.control_errors / max(view.health.control_requests, 1)
    if errors / max(requests, 1) - control_share < limit:
        return None
    reason = (
        f"{errors} of {requests} canary requests failed in the last minute, and {_percent(control_share)} of the "
        f"control's; the limit is {_percent(limit)} more than the control's."
    )
    return _decision(view, "roll_back", reason, "breaker", weight=0.0)


def _srm(view: _View) -> Decision | None:
    return _split_fault(view, "assigned", view.state.assigned) or _split_fault(view, "scored", view.state.phases)


def _split_fault(view: _View, which: Literal["assigned", "scored"], counts: tuple[PhaseCount, ...]) -> Decision | None:
    mismatch = split_mismatch(counts)
    if mismatch < -math.log(view.config.srm_alpha):
        return None
    seen = ", ".join(f"step {c.phase + 1}: {c.treatment} of {c.control + c.treatment}" for c in counts)
    reason = (
        f"The split of {which} users is not the one intended (canary users in {seen}; Bayes factor "
        f"{finite_exp(mismatch):.3g}). Find out who is missing, then start again with a new salt."
    )
    return _decision(view, "hold", reason, "srm_assigned" if which == "assigned" else "srm_scored")


def _harm(view: _View) -> Decision | None:
    state, needed = view.state, 1 / view.config.alpha_rollback
    if state.harm_metric is None or state.harm_peak < math.log(needed):
        return None
    reason = (
        f"{state.harm_metric}: {_rates(state.metrics[state.harm_metric])}. "
        f"The evidence of harm reached {finite_exp(state.harm_peak):.3g}; {needed:.3g} rolls back. {_blame(view)}"
    )
    return _decision(view, "roll_back", reason, "harm", metric=state.harm_metric, weight=0.0)


def _blame(view: _View) -> str:
    """Say whether single metrics are proven harmful, at the same level for all of them together."""
    proven = _proven(view)
    if not proven:
        return "No metric is proven harmful on its own: this one contributed most."
    return f"Proven on its own: {', '.join(proven)}."


def _proven(view: _View) -> list[str]:
    """Return the metrics that the closed test rejects (Vovk and Wang, "E-values", 2021, on Holm's procedure).

    A metric is rejected if every set of metrics that it is in would be, each with its own share of the weights: the
    hardest set is the metric together with all others that fall short of their part. Events stand for themselves.
    """
    weights = view.config.harm_weights
    needed, surplus, by_events = 1 / view.config.alpha_rollback, dict[str, float](), dict[str, float]()
    for metric in view.config.metrics:
        evidence, weight = view.state.metrics[metric.name], weights[metric.name]
        surplus[metric.name] = weight.users * evidence.harm.e_value - metric.weight * needed
        by_events[metric.name] = weight.events * evidence.events.e_value
    shortfall = math.fsum(min(0.0, amount) for amount in surplus.values())
    return [
        name
        for name in surplus
        if by_events[name] >= needed or surplus[name] + shortfall - min(0.0, surplus[name]) >= 0
    ]


def _missing_data(view: _View) -> Decision | None:
    missing = [metric.name for metric in view.config.metrics if metric.name in view.health.missing]
    if not missing:
        return None
    reason = f"Cannot be measured now: {', '.join(missing)}. The canary waits at {_percent(view.weight)} until it can."
    if view.state.held_reason not in (None, "missing_data"):
        return _held(view)
    return _decision(view, "hold", reason, "missing_data", metric=missing[0])


def _held(view: _View) -> Decision | None:
    held = view.state.held_reason
    if held is None or held == "missing_data":
        return None
    if held == "approval":
        return _decision(view, "hold", _approval(view), held)
    reason = f"Held ({held}) until a person resumes, advances or rolls back. {_waiting_for(view)}".strip()
    return _decision(view, "hold", reason, held)


def _progress(view: _View) -> Decision | None:
    if view.blocker is not None:
        return None
    verdict, weight = _next_step(view.state, view.config)
    if verdict == "promote" and view.config.needs_approval:
        return _decision(view, "hold", _approval(view), "approval")
    users = f"{view.step_count.treatment} canary users at {_percent(view.weight)}"
    if verdict == "promote":
        reason = f"After {users}, a harm of the margin is ruled out in every metric ({_margins(view.config)})."
    else:
        bound = harm_bound(view.state, view.config)
        reason = (
            f"After {users}, the primary metric's added harm is at most {_percent(bound)}; at {_percent(weight)} "
            f"of traffic that is {_percent(bound * weight)}, within the budget of {_percent(view.config.harm_budget)}."
        )
    return _decision(view, verdict, reason, "evidence", weight=weight)


def _approval(view: _View) -> str:
    return (
        f"A harm of the margin is ruled out in every metric ({_margins(view.config)}). "
        "Waits for approval: a person's advance promotes."
    )


def _time_cap(view: _View) -> Decision | None:
    if not view.now - view.state.cap_started_at >= view.config.max_time_s:
        return None
    reason = f"Inconclusive after {view.config.max_time_s:.0f} s. {_waiting_for(view)}"
    return _decision(view, "hold", reason, "inconclusive")


class _Blocker(NamedTuple):
    """The first condition for the next step that does not hold yet."""

    reason: str
    users: float | None
    """Users of all traffic still needed, where the evidence so far lets us guess."""


def _blocker(view: _View) -> _Blocker | None:
    for condition in (_silent, _too_soon, _too_few):
        if (blocker := condition(view)) is not None:
            return blocker
    return _uncertified(view) if view.is_last_step else _over_budget(view)


def _silent(view: _View) -> _Blocker | None:
    silence = view.now - _seen_at(view.state)
    if 0 <= silence <= view.config.max_silence_s:  # Written so that NaN is silence too.
        return None
    since = "the clock went back" if silence < 0 else f"nothing was learned for {silence:.0f} s"
    return _Blocker(f"{since}: stale evidence, or a clock that jumped, decides nothing", None)


def _too_soon(view: _View) -> _Blocker | None:
    dwell, baked = view.now - view.state.step_started_at, view.now - _baked_from(view.state)
    if not dwell >= view.config.min_dwell_s:
        return _Blocker(f"{dwell:.0f} s of {view.config.min_dwell_s:.0f} s have passed in this step", None)
    if view.is_last_step and not baked >= view.config.bake_s:
        return _Blocker(f"{baked:.0f} s of {view.config.bake_s:.0f} s have passed since the launch", None)
    return None


def _too_few(view: _View) -> _Blocker | None:
    count, needed = view.step_count, view.config.min_users[view.state.step]
    for side, users, share in (("canary", count.treatment, view.weight), ("control", count.control, CANARY_RESERVE)):
        if users < needed:
            return _Blocker(f"{users} of {needed} {side} users are in", (needed - users) / share)
    return None


def _over_budget(view: _View) -> _Blocker | None:
    config, following = view.config, view.config.steps[view.state.step + 1]
    bound = harm_bound(view.state, config)
    if bound * following <= config.harm_budget + 1e-12:
        return None
    allowed = config.harm_budget / following
    bets = [
        max((bet for bet in view.state.metrics[metric.name].bound if bet.margin <= allowed), key=lambda bet: bet.margin)
        for metric in config.metrics
        if metric.role == "primary"
    ]
    reason = (
        f"the primary metric's added harm may be up to {_percent(bound)}; "
        f"{_percent(following)} of traffic allows {_percent(allowed)}"
    )
    alpha = config.alpha_promote
    users = [_users_to_cross(bet, bet.log_e_value, alpha) for bet in bets if not bet.has_crossed(alpha)]
    return _Blocker(reason, _most(users))


def _uncertified(view: _View) -> _Blocker | None:
    alpha = view.config.alpha_promote
    evidence = view.state.metrics
    required = [metric for metric in view.config.metrics if metric.role != "signal"]
    open_ones = [metric for metric in required if not evidence[metric.name].certify.has_crossed(alpha)]
    if not open_ones:
        return None
    parts = [
        f"{metric.name} {_certified(view, metric.name):.3g} (margin {_percent(metric.margin)})" for metric in open_ones
    ]
    reason = f"evidence that the harm is below the margin must reach {1 / alpha:.3g}: {', '.join(parts)}"
    users = [_users_to_cross(evidence[m.name].certify, view.log_certify[m.name], alpha) for m in open_ones]
    return _Blocker(reason, _most(users))


def _most(users: list[float | None]) -> float | None:
    known = [needed for needed in users if needed is not None]
    return max(known) if known and len(known) == len(users) else None


def _users_to_cross(bet: NonInferiorityBet, log_e_value: float, alpha: float) -> float | None:
    """Guess from the growth of the best stake so far; None while nothing grows."""
    # The reserve has the same share of traffic in every step, so it tells how much traffic the growth took.
    traffic = bet.control_count / CANARY_RESERVE
    growth = max(bet.log_wealth)
    return None if growth <= 0 else max(0.0, -math.log(alpha) - log_e_value) * traffic / growth


def _waiting_for(view: _View) -> str:
    blocker = view.blocker
    if blocker is None:
        return ""
    text = f"Step {view.state.step + 1} ({_percent(view.weight)}): {blocker.reason}."
    if blocker.users is None:
        return text
    return f"{text} Needs about {math.ceil(blocker.users)} more users of all traffic."


def _next_step(state: CanaryState, config: CanaryConfig) -> tuple[Verdict, float]:
    following = state.step + 1
    return ("promote", 1.0) if following == len(config.steps) else ("advance", config.steps[following])


def _enter(state: CanaryState, config: CanaryConfig, step: int, now: float) -> CanaryState:
    if step >= len(config.steps):
        raise InvalidTransition("there is no further step: promote instead")
    return replace(state, status=running_status(config, step), step=step, step_started_at=now, held_reason=None)


def _held_reason(decision: Decision) -> HeldReason:
    if decision.cause not in _HOLDS:
        raise InvalidTransition(f"a canary is not held because of {decision.cause}")
    return cast(HeldReason, decision.cause)


def _running(state: CanaryState, config: CanaryConfig) -> CanaryState:
    return replace(state, status=running_status(config, state.step), held_reason=None)


def _end(state: CanaryState, status: Status) -> CanaryState:
    return replace(state, status=status, held_reason=None)


def _decision(
    view: _View,
    verdict: Verdict,
    reason: str,
    cause: Cause,
    *,
    metric: str | None = None,
    weight: float | None = None,
) -> Decision:
    return Decision(verdict, view.weight if weight is None else weight, reason, cause, metric, _evidence(view))


def _evidence(view: _View) -> Evidence:
    state, config = view.state, view.config
    harm = log_harm(state.metrics, config.harm_weights)
    return {
        "harm": finite_exp(max(state.harm_peak, harm.overall)),
        "harm_needed": 1 / config.alpha_rollback,
        "harm_bound": harm_bound(state, config),
        "split_mismatch": finite_exp(split_mismatch(state.phases)),
        "assigned_split_mismatch": finite_exp(split_mismatch(state.assigned)),
        "canary_users": float(sum(count.treatment for count in state.phases)),
        "control_users": float(sum(count.control for count in state.phases)),
        "harm_by_metric": {name: finite_exp(log) for name, log in harm.by_metric.items()},
        "certify_by_metric": {name: _certified(view, name) for name in state.metrics},
        "certify_needed": 1 / config.alpha_promote,
    }


def _certified(view: _View, name: str) -> float:
    return finite_exp(max(view.state.metrics[name].certify.peak, view.log_certify[name]))


def _rates(evidence: MetricEvidence) -> str:
    control, treatment = evidence.harm.control_count, evidence.treatment_count
    control_rate = evidence.harm.control_sum / max(control, 1)
    treatment_rate = evidence.treatment_sum / max(treatment, 1)
    return (
        f"{_percent(treatment_rate)} in {treatment} canary users "
        f"against {_percent(control_rate)} in {control} control users"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _margins(config: CanaryConfig) -> str:
    return ", ".join(f"{metric.name} {_percent(metric.margin)}" for metric in config.metrics if metric.role != "signal")
