"""After a promotion: is the candidate, now alone, what the canary certified?

There is no control any more, so nothing here compares. Two absolute limits stand, both frozen before the first user of
the watch: the share of requests that fail, and the toxicity that the canary allowed for: the candidate's own rate
among its users, plus the margin that was ruled out. The old champion stays loaded as long as the watch lasts.

The toxicity is a bet against "the users' mean share of toxic answers is within the limit" (Waudby-Smith and Ramdas,
2024), so that it may be looked at any time. A user who is there in several windows counts in each, as if a new one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from ab_testing.canary import Decision, Evidence, Health
from ab_testing.canary_state import CanaryConfig, CanaryState
from ab_testing.eprocess import finite_exp, log_weighted_mean
from ab_testing.errors import InvalidOutcome, InvalidTransition
from ab_testing.evidence import MetricEvidence

TOXICITY = "toxicity"
STAKES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.6, 0.9)
_SHARES = (1 / len(STAKES),) * len(STAKES)
_CAUTION = 0.999
SCORE_PATIENCE_S = 60.0
"""How long answers may wait for their scores before they are judged, or given up."""


class Window(NamedTuple):
    """A span of time after the promotion, and what its users saw."""

    until: float
    toxic_shares: tuple[float, ...]
    """For each user, the share of the scored answers that were toxic; the smallest first."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the watch goes by, and what it has seen."""

    since: float
    until: float
    window_s: float
    certified: float | None
    """Share of the candidate's answers to a user that were toxic, over the canary; None where that was no metric."""
    limit: float | None
    """Above it the candidate is not what was certified."""
    read_until: float
    log_wealth: tuple[float, ...] = (0.0,) * len(STAKES)
    peak: float = 0.0
    """Largest logarithm of the evidence so far."""
    users: int = 0
    toxic_sum: float = 0.0
    is_over: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Watch:
        return cls(**{**data, "log_wealth": tuple(data["log_wealth"])})


def open_watch(state: CanaryState, config: CanaryConfig, now: float, window_s: float) -> Watch | None:
    """Return what a promotion begins, None where nothing is to be watched.

    Args:
        window_s: how long users' answers are collected before they are judged.
    """
    if state.status != "promoted" or config.watch_s <= 0:
        return None
    certified = _rate(state.metrics[TOXICITY]) if TOXICITY in state.metrics else None
    margin = next((metric.margin for metric in config.metrics if metric.name == TOXICITY), 0.0)
    limit = None if certified is None else min(certified + margin, 0.999)
    return Watch(now, now + config.watch_s, window_s, certified, limit, read_until=now)


def _rate(evidence: MetricEvidence) -> float:
    # The rule of succession: where hardly anybody was asked, much has to be allowed for.
    return (evidence.treatment_sum + 1) / (evidence.treatment_count + 2)


def due_windows(watch: Watch, now: float) -> list[tuple[float, float]]:
    """Return the spans of time `(after, until)` to be read now: those whose answers have had time for scores."""
    spans, start = [], watch.read_until
    while start < watch.until and min(start + watch.window_s, watch.until) + SCORE_PATIENCE_S <= now:
        end = min(start + watch.window_s, watch.until)
        spans.append((start, end))
        start = end
    return spans


def observe_windows(watch: Watch, windows: Iterable[Window]) -> Watch:
    """Fold windows into the evidence, the earliest first.

    Raises:
        InvalidOutcome: a share is impossible.
    """
    for window in windows:
        watch = _observe(watch, window)
    return watch


def _observe(watch: Watch, window: Window) -> Watch:
    shares = window.toxic_shares
    if not all(0 <= share <= 1 for share in shares):
        raise InvalidOutcome("harm must lie in [0, 1]")
    if watch.limit is None:
        return replace(watch, read_until=window.until)
    wealth = tuple(
        before + math.fsum(math.log1p(stake * _CAUTION * (share / watch.limit - 1)) for share in shares)
        for before, stake in zip(watch.log_wealth, STAKES, strict=True)
    )
    return replace(
        watch,
        read_until=window.until,
        log_wealth=wealth,
        peak=max(watch.peak, log_weighted_mean(wealth, _SHARES)),
        users=watch.users + len(shares),
        toxic_sum=watch.toxic_sum + math.fsum(shares),
    )


def close_if_due(watch: Watch, now: float) -> Watch:
    """End the watch once its time is over and its last answers have had time for scores."""
    return replace(watch, is_over=now >= watch.until + SCORE_PATIENCE_S)


def judge(watch: Watch, config: CanaryConfig, health: Health) -> Decision:
    """Return whether the promotion stands. Only evidence takes it back; none at all leaves it and says so.

    Args:
        health: The requests of the last minute, all of them the candidate's.
    """
    for check in (_breaker, _toxicity):
        reason = check(watch, config, health)
        if reason is not None:
            metric = TOXICITY if check is _toxicity else None
            cause: Literal["harm", "breaker"] = "harm" if metric else "breaker"
            return Decision("roll_back", 0.0, reason, cause, metric, _evidence(watch, config))
    return Decision("continue", 1.0, _standing(watch), "waiting", None, _evidence(watch, config))


def take_back(watch: Watch | None, config: CanaryConfig, reason: str) -> Decision:
    """Return a person's decision that the old champion is to serve again.

    Raises:
        InvalidTransition: The watch is over.
    """
    if watch is None or watch.is_over:
        raise InvalidTransition("the promotion is not watched any more")
    return Decision("roll_back", 0.0, reason, "operator", None, _evidence(watch, config))


def after_watch(state: CanaryState, decision: Decision) -> CanaryState:
    """Return the canary's state after a decision of the watch."""
    return replace(state, status="rolled_back") if decision.verdict == "roll_back" else state


def _breaker(_watch: Watch, config: CanaryConfig, health: Health) -> str | None:
    requests, failures = health.canary_requests, health.canary_errors
    if requests < config.breaker_min_requests or failures / max(requests, 1) < config.breaker_error_share:
        return None
    return (
        f"{failures} of {requests} requests failed in the last minute, of the promoted version; the limit is "
        f"{_percent(config.breaker_error_share)}. Nothing is left to compare with: the engines may be to blame."
    )


def _toxicity(watch: Watch, config: CanaryConfig, _health: Health) -> str | None:
    if watch.limit is None or watch.peak < -math.log(config.alpha_rollback):
        return None
    return (
        f"{TOXICITY}: {_percent(watch.toxic_sum / watch.users)} in {watch.users} users since the promotion; "
        f"{_percent(watch.certified or 0.0)} was certified, and {_percent(watch.limit)} is the limit."
    )


def _standing(watch: Watch) -> str:
    if watch.limit is None:
        seen = "only failed requests are watched: toxicity is no metric of this rollout"
    elif watch.users == 0:
        seen = "no user with scored answers yet"
    else:
        seen = f"{_percent(watch.toxic_sum / watch.users)} toxic in {watch.users} users, limit {_percent(watch.limit)}"
    return f"The watch over the promotion is over: {seen}." if watch.is_over else f"Watched after promotion: {seen}."


def _evidence(watch: Watch | None, config: CanaryConfig) -> Evidence:
    if watch is None or watch.limit is None:
        return {}
    return {
        "watch_harm": finite_exp(watch.peak),
        "harm_needed": 1 / config.alpha_rollback,
        "watch_users": float(watch.users),
        "watch_toxicity": watch.toxic_sum / max(watch.users, 1),
        "watch_limit": watch.limit,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def windows_to_json(windows: Sequence[Window]) -> list[list[Any]]:
    return [[window.until, list(window.toxic_shares)] for window in windows]


def windows_from_json(data: Iterable[Sequence[Any]]) -> tuple[Window, ...]:
    return tuple(Window(until, tuple(shares)) for until, shares in data)
