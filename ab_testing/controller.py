"""The canary controller: looks at what users did, decides, and moves traffic, one versioned write at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import structlog

from ab_testing.canary import Decision, apply, decide, launch, override, weight_of
from ab_testing.experiment import Route, canary_experiment
from ab_testing.replay import Inputs, learn, learn_after
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import (
    CONTROLLER,
    Rollout,
    insert_rollout,
    newest_rollout,
    running_rollout,
    save_progress,
)
from ab_testing.route_store import load_route
from ab_testing.sightings import look, look_after
from ab_testing.watch import after_watch, judge, open_watch, take_back
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict, StaleWrite
from pawl.settings import RolloutSettings

log = structlog.get_logger()

Action = Literal["advance", "hold", "resume", "roll_back", "abort"]
MOST_ATTEMPTS = 5
"""Of a person's order: every tick of the worker rewrites the rollout, and one may come between reading and writing."""


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


class _Order(NamedTuple):
    """What a person wants done."""

    action: Action
    reason: str
    actor: str
    epoch: int
    rollout_id: str | None

    def is_of(self, rollout: Rollout) -> bool:
        """Whether this rollout is meant; without an id, whichever there is."""
        return self.rollout_id in (None, rollout.id)


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
        """Look at what is new, decide, and act on it; None when nothing is being rolled out or watched.

        Raises:
            StaleWrite: another process acted meanwhile; nothing was changed.
        """
        rollout = running_rollout(self._database, alias)
        if rollout is None:
            return self._look_after(alias, epoch)
        now = self._clock()
        seen = look(self._database, rollout, now)
        observed = learn(rollout.state, rollout.config, seen.inputs)
        decision = decide(observed, rollout.config, now, seen.inputs.health)
        state = apply(observed, rollout.config, decision, now)
        after = replace(
            rollout,
            state=state,
            cursor=seen.cursor,
            reading=seen.reading,
            watch=open_watch(state, rollout.config, now, rollout.maturity_s),
            updated_at=now,
        )
        self._act(rollout, after, decision, CONTROLLER, epoch, seen.inputs)
        return Tick(after, decision, len(seen.inputs.outcomes))

    def _look_after(self, alias: str, epoch: int) -> Tick | None:
        rollout = watched_rollout(self._database, alias)
        if rollout is None or rollout.watch is None:
            return None
        now = self._clock()
        inputs = look_after(self._database, rollout, rollout.watch, now)
        watch = learn_after(rollout.watch, inputs, now)
        decision = judge(watch, rollout.config, inputs.health)
        after = replace(rollout, state=after_watch(rollout.state, decision), watch=watch, updated_at=now)
        if watch != rollout.watch or decision.verdict != "continue":
            self._act(rollout, after, decision, CONTROLLER, epoch, inputs)
        return Tick(after, decision, watch.users - rollout.watch.users)

    def act(
        self, alias: str, action: Action, reason: str, *, actor: str, epoch: int, rollout_id: str | None = None
    ) -> Tick | None:
        """Do what a person orders; None when nothing is being rolled out.

        Args:
            rollout_id: the one that is meant: if another one has taken its place meanwhile, that is left alone.

        Raises:
            StaleWrite: others kept writing meanwhile, or hold a later lease; nothing was changed.
        """
        order = _Order(action, reason, actor, epoch, rollout_id)
        for _ in range(MOST_ATTEMPTS - 1):
            try:
                return self._act_once(alias, order)
            except StaleWrite as exc:
                log.info("order_repeated", alias=alias, action=action, reason=str(exc))
        return self._act_once(alias, order)

    def _act_once(self, alias: str, order: _Order) -> Tick | None:
        rollout = running_rollout(self._database, alias)
        if rollout is None:
            return self._take_back(alias, order)
        if not order.is_of(rollout):
            return None
        now = self._clock()
        decision = override(rollout.state, rollout.config, order.action, order.reason)
        state = apply(rollout.state, rollout.config, decision, now)
        watch = open_watch(state, rollout.config, now, rollout.maturity_s)
        after = replace(rollout, state=state, watch=watch, updated_at=now)
        self._act(rollout, after, decision, order.actor, order.epoch)
        return Tick(after, decision, 0)

    def _take_back(self, alias: str, order: _Order) -> Tick | None:
        """Of a promotion that is watched a person may only order the end."""
        rollout = watched_rollout(self._database, alias)
        if rollout is None or order.action != "roll_back" or not order.is_of(rollout):
            return None
        decision = take_back(rollout.watch, rollout.config, order.reason)
        after = replace(rollout, state=after_watch(rollout.state, decision), updated_at=self._clock())
        self._act(rollout, after, decision, order.actor, order.epoch)
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
        if after.state.is_final and after.cursor is not None:  # Nobody is counted any more: no name need stay.
            after = replace(after, cursor=(after.cursor[0], ""))
        moves = weight_of(before.state, before.config) != weight_of(after.state, after.config)
        current = load_route(self._database, before.alias) if moves else None
        if before.state.status == "promoted" and moves and not _stands(before, current):
            raise StaleWrite(f"the route of {before.alias} has moved on since {before.id}")
        route = route_of(after, current) if current else None
        is_ordered = actor != CONTROLLER
        is_news = (before.state, before.cursor, before.watch) != (after.state, after.cursor, after.watch)
        recorded = decision if is_ordered or is_news else None
        kept = None if inputs is None else inputs.to_json()
        save_progress(
            self._database, before, after, decision=recorded, route=route, actor=actor, epoch=epoch, inputs=kept
        )
        if decision.verdict not in ("continue", "hold"):
            log.info("rollout_decision", rollout=after.id, verdict=decision.verdict, reason=decision.reason)
        if after.state.status != before.state.status and after.state.is_final:
            self._on_end(after, decision)


def watched_rollout(database: Database, alias: str) -> Rollout | None:
    """The alias's promoted rollout whose old champion may still come back, if nothing has followed it."""
    rollout = newest_rollout(database, alias)
    if rollout is None or rollout.state.status != "promoted" or rollout.watch is None or rollout.watch.is_over:
        return None
    return rollout if _stands(rollout, load_route(database, alias)) else None


def _stands(promoted: Rollout, route: Route | None) -> bool:
    """Whether nothing has followed a promotion: no other version, and no experiment."""
    return route is not None and route.champion == promoted.candidate and route.experiment is None
