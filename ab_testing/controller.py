"""The canary controller: looks at what users did, decides, and moves traffic, one versioned write at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from ab_testing.canary import Decision, Health, apply, decide, launch, observe, override, weight_of
from ab_testing.canary_state import CanaryConfig, GuardrailMetric
from ab_testing.errors import InvalidCanary
from ab_testing.experiment import CONTROL, TREATMENT, Route, canary_experiment
from ab_testing.outcomes import (
    HARMFUL_COMPLIANCE,
    OVER_REFUSAL,
    SCORED_METRICS,
    THUMBS_DOWN,
    TOXICITY,
    Matured,
    is_unscored,
    matured_users,
)
from ab_testing.replay import Inputs
from ab_testing.rollout_store import CONTROLLER, Rollout, insert_rollout, running_rollout, save_progress
from ab_testing.route_store import load_route
from feedback.store import Exposure, experiment_rows, experiment_units
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict, StaleWrite
from pawl.settings import RolloutSettings

log = structlog.get_logger()

Action = Literal["advance", "hold", "resume", "roll_back", "abort"]
HEALTH_WINDOW_S = 60.0
UNUSED_MARGIN = 0.5
"""Of a metric that can only roll back."""
SCORE_PATIENCE_S = 60.0
"""How long a matured user may wait for scores before the scorer counts as missing."""
HARD_FAILURE = "upstream_error"
MOST_ATTEMPTS = 5
"""Of a person's order: every tick of the worker rewrites the rollout, and one may come between reading and writing."""


def canary_config(settings: RolloutSettings) -> CanaryConfig:
    """The rules of a rollout, frozen at its launch: half of the rollback evidence is for safety.

    Raises:
        ConfigurationError: the settings contradict each other.
    """
    compliance = settings.harmful_compliance_margin
    metrics = (
        GuardrailMetric(THUMBS_DOWN, settings.thumbs_margin, 0.4, "primary"),
        GuardrailMetric(TOXICITY, settings.toxicity_margin, 0.25),
        GuardrailMetric(HARMFUL_COMPLIANCE, compliance or UNUSED_MARGIN, 0.25, "guardrail" if compliance else "signal"),
        GuardrailMetric(OVER_REFUSAL, settings.over_refusal_margin, 0.1),
    )
    try:
        return CanaryConfig(
            metrics=metrics,
            steps=tuple(settings.steps),
            alpha_rollback=settings.alpha_rollback,
            alpha_promote=settings.alpha_promote,
            harm_budget=settings.harm_budget,
            min_dwell_s=settings.min_dwell_s,
            min_users=tuple(settings.min_users),
            breaker_error_share=settings.breaker_error_share,
            breaker_min_requests=settings.breaker_min_requests,
            max_time_s=settings.max_time_s,
        )
    except InvalidCanary as exc:
        raise ConfigurationError(f"rollout: {exc}") from exc


def start_rollout(
    database: Database,
    settings: RolloutSettings,
    route: Route,
    candidate: str,
    *,
    now: float,
    epoch: int,
    actor: str = CONTROLLER,
    is_forced: bool = False,
) -> Rollout:
    """Send the first users of `route.alias` to `candidate`.

    Args:
        actor: Who ordered it, and `is_forced` whether against the gate, for the audit trail.

    Raises:
        ConfigurationError: the alias has a fixed split, or the candidate is the champion already.
        NegativeVerdict: the alias has a running rollout.
    """
    if route.experiment is not None and route.experiment.is_canary:
        raise NegativeVerdict(f"{route.alias} has a running rollout: {route.experiment.key}")
    if route.experiment is not None:
        raise ConfigurationError(f"{route.alias} has the experiment {route.experiment.key!r} running")
    if candidate == route.champion:
        raise ConfigurationError(f"{candidate} is the champion of {route.alias} already")
    config = canary_config(settings)
    rollout = Rollout(
        id=f"ro_{secrets.token_hex(6)}",
        alias=route.alias,
        champion=route.champion,
        candidate=candidate,
        config=config,
        state=launch(config, now),
        maturity_s=settings.maturity_s,
        cursor=None,
        created_at=now,
        updated_at=now,
    )
    first_route = route_of(rollout, route, salt=secrets.token_hex(16))
    insert_rollout(database, rollout, first_route, epoch=epoch, actor=actor, is_forced=is_forced)
    log.info("rollout_started", rollout=rollout.id, alias=route.alias, candidate=candidate)
    return rollout


def route_of(rollout: Rollout, current: Route, *, salt: str | None = None) -> Route:
    """The route that a rollout's state asks for; its version is the one it replaces."""
    if rollout.state.status == "promoted":
        return Route(rollout.alias, current.version, rollout.candidate, None)
    if rollout.state.is_final:
        return Route(rollout.alias, current.version, rollout.champion, None)
    kept_salt = salt or (current.experiment.salt if current.experiment else "")
    experiment = canary_experiment(
        rollout.id,
        kept_salt,
        champion=rollout.champion,
        candidate=rollout.candidate,
        weight=weight_of(rollout.state, rollout.config),
        phase=rollout.state.step,
    )
    return Route(rollout.alias, current.version, rollout.champion, experiment)


@dataclass(frozen=True)
class Tick:
    """What one look at a rollout led to."""

    rollout: Rollout
    decision: Decision
    n_new_users: int


class Controller:
    """Looks after the rollouts of all aliases. One process at a time holds the lease to call `tick`."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        on_end: Callable[[Rollout, Decision], None] = lambda _rollout, _decision: None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._on_end = on_end

    def tick(self, alias: str, *, epoch: int) -> Tick | None:
        """Count the users that have matured, decide, and act on it; None when nothing is being rolled out.

        Raises:
            StaleWrite: another process acted meanwhile; nothing was changed.
        """
        rollout = running_rollout(self._database, alias)
        if rollout is None:
            return None
        now = self._clock()
        rows = experiment_rows(self._database, rollout.id)
        matured = matured_users(
            rows,
            dict(experiment_units(self._database, rollout.id)),
            cursor=rollout.cursor,
            maturity_s=rollout.maturity_s,
            now=now,
        )
        observed = observe(rollout.state, rollout.config, matured.outcomes)
        health = health_of(rows, matured, rollout, now)
        decision = decide(observed, rollout.config, now, health)
        after = replace(
            rollout,
            state=apply(observed, rollout.config, decision, now),
            cursor=matured.cursor,
            updated_at=now,
        )
        self._act(rollout, after, decision, CONTROLLER, epoch, Inputs(health, matured.outcomes))
        return Tick(after, decision, len(matured.outcomes))

    def act(self, alias: str, action: Action, reason: str, *, actor: str, epoch: int) -> Tick | None:
        """Do what a person orders; None when nothing is being rolled out.

        Raises:
            StaleWrite: others kept writing meanwhile, or hold a later lease; nothing was changed.
        """
        for _ in range(MOST_ATTEMPTS - 1):
            try:
                return self._act_once(alias, action, reason, actor, epoch)
            except StaleWrite as exc:
                log.info("order_repeated", alias=alias, action=action, reason=str(exc))
        return self._act_once(alias, action, reason, actor, epoch)

    def _act_once(self, alias: str, action: Action, reason: str, actor: str, epoch: int) -> Tick | None:
        rollout = running_rollout(self._database, alias)
        if rollout is None:
            return None
        now = self._clock()
        decision = override(rollout.state, rollout.config, action, reason)
        after = replace(rollout, state=apply(rollout.state, rollout.config, decision, now), updated_at=now)
        self._act(rollout, after, decision, actor, epoch)
        return Tick(after, decision, 0)

    def _act(
        self,
        before: Rollout,
        after: Rollout,
        decision: Decision,
        actor: str,
        epoch: int,
        inputs: Inputs | None = None,
    ) -> None:
        """Recorded is whatever is news or changes the state, for `replay` makes the state again from the records."""
        moves = weight_of(before.state, before.config) != weight_of(after.state, after.config)
        current = load_route(self._database, before.alias) if moves else None
        route = route_of(after, current) if current else None
        is_ordered = actor != CONTROLLER
        recorded = decision if is_ordered or before.state != after.state or before.cursor != after.cursor else None
        kept = None if inputs is None else inputs.to_json()
        save_progress(
            self._database, before, after, decision=recorded, route=route, actor=actor, epoch=epoch, inputs=kept
        )
        if decision.verdict not in ("continue", "hold"):
            log.info("rollout_decision", rollout=after.id, verdict=decision.verdict, reason=decision.reason)
        if after.state.is_final:
            self._on_end(after, decision)


def health_of(rows: Sequence[Exposure], matured: Matured, rollout: Rollout, now: float) -> Health:
    """Hard failures of the last minute in both variants, and metrics that nobody measures.

    A treatment request that had to be answered by the control failed too: otherwise a version that no engine can serve
    would be judged by the champion's answers, and promoted for them.
    """
    recent = [row for row in rows if row.created_at > now - HEALTH_WINDOW_S]
    canary = [has_failed(row) for row in recent if row.assigned_variant == TREATMENT]
    control = [has_failed(row) for row in recent if row.assigned_variant == CONTROL]
    is_scorer_late = matured.is_waiting_for_scores and any(
        is_unscored(row) and row.created_at < now - rollout.maturity_s - SCORE_PATIENCE_S for row in rows
    )
    return Health(
        canary_requests=len(canary),
        canary_errors=sum(canary),
        control_requests=len(control),
        control_errors=sum(control),
        missing=SCORED_METRICS if is_scorer_late else (),
    )


def has_failed(row: Exposure) -> bool:
    """Whether a request got no answer from the variant it was assigned."""
    return row.status == HARD_FAILURE or row.served_variant != row.assigned_variant
