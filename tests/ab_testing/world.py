"""Synthetic users who come through the routing table of a real database, for tests of the controller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from ab_testing.assignment import assign
from ab_testing.canary import Decision
from ab_testing.controller import Controller, Tick, start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_store import Rollout
from ab_testing.route_store import load_route
from feedback.interactions import Status
from pawl.database import Database
from pawl.settings import RolloutSettings
from tests.pawl.records import save, save_with_scores, served, thumb

ALIAS = "assistant"
BASE, CANDIDATE = "base-model", "base-model--r0001-1a2b3c4d"
SETTINGS = RolloutSettings(
    min_dwell_s=60.0,
    maturity_s=10.0,
    harm_budget=0.1,
    thumbs_margin=0.2,
    toxicity_margin=0.2,
    harmful_compliance_margin=0.2,
    over_refusal_margin=0.2,
    min_users=[2, 5, 20],
)
"""Wide margins, so that a few thousand users decide."""
START = 1_000_000.0


@dataclass
class World:
    """A database, a clock that only tests move, and users who thumb down as often as their model deserves."""

    database: Database
    now: float = START
    n_users: int = 0
    ended: list[tuple[Rollout, Decision]] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    settings: RolloutSettings = SETTINGS

    def controller(self, clock: Callable[[], float] | None = None) -> Controller:
        on_end = lambda rollout, decision: self.ended.append((rollout, decision))  # noqa: E731
        return Controller(self.database, clock=clock or (lambda: self.now), on_end=on_end)

    def start(self, candidate: str = CANDIDATE, *, epoch: int = 1) -> Rollout:
        route = self.route() or Route(ALIAS, 0, BASE)
        return start_rollout(self.database, self.settings, route, candidate, now=self.now, epoch=epoch)

    def route(self) -> Route | None:
        return load_route(self.database, ALIAS)

    def visit(
        self,
        n_users: int,
        down: Mapping[str, float],
        *,
        are_scored: bool = True,
        failing: Collection[str] = (),
    ) -> None:
        """New users ask one question each within a second, as the routing table says; then their time passes."""
        route = self.route()
        assert route is not None
        interactions, events = [], []
        for unit in range(self.n_users, self.n_users + n_users):
            assigned = assign(route, f"user-{unit}")
            interactions.append(
                served(
                    unit,
                    created_at=self.now + (unit - self.n_users) / n_users,
                    unit_id=f"user-{unit}",
                    experiment=assigned.experiment,
                    assigned_variant=assigned.variant,
                    served_variant=assigned.variant,
                    probability=assigned.probability,
                    is_analysed=assigned.is_analysed,
                    phase=assigned.phase,
                    model=assigned.model,
                    status=Status.UPSTREAM_ERROR if assigned.model in failing else Status.OK,
                )
            )
            if self.rng.random() < down[assigned.model]:
                events.append(thumb(unit, "down", at=self.now + 1))
        self.n_users += n_users
        (save_with_scores if are_scored else save)(self.database, interactions, events)
        self.now += SETTINGS.min_dwell_s + SETTINGS.maturity_s + 1

    def tick(self, *, epoch: int = 1) -> Tick:
        tick = self.controller().tick(ALIAS, epoch=epoch)
        assert tick is not None
        return tick
