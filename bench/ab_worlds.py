"""Worlds to run experiments in, many simulations at once: who comes at each look, what they see, how they fare.

A world tells of the same users twice: to the bets, user by user in the order in which they mature, and to the tests
that look at sums. Nothing in a world depends on what a test says, so that all of them see the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ab_testing.assignment import treatment_probability
from ab_testing.experiment import CANARY_RESERVE
from bench.ab_sums import (
    Cells,
    Estimate,
    Flags,
    Floats,
    Pair,
    Sums,
    clustered_by_user,
    pooled_by_variant,
    ratio_pair,
    row_pair,
    stratified,
    value_pair,
)

LOOKS = 50


class Users(NamedTuple):
    """Users who mature between two looks, of all simulations; arrays are (sims, users)."""

    is_treatment: Flags
    harm: Floats
    """In [0, 1], up is worse."""
    w: float
    """Probability of treatment that was in force when they were first seen."""
    is_analysed: Flags | None = None
    """None where everybody is."""

    def part(self, first: int, last: int) -> Users:
        analysed = None if self.is_analysed is None else self.is_analysed[:, first:last]
        return self._replace(
            is_treatment=self.is_treatment[:, first:last], harm=self.harm[:, first:last], is_analysed=analysed
        )

    @property
    def analysed(self) -> Flags:
        return np.ones_like(self.is_treatment) if self.is_analysed is None else self.is_analysed


class Look(NamedTuple):
    """All that is known at one look."""

    users: Users
    """Only the new ones."""
    right_unit: Pair
    """All so far, users as units, phases pooled."""
    interactions: Pair | None
    """All so far, interactions as units; None where users have one each."""
    report: Estimate
    """Stratified by phase, clustered by user."""
    canary_users: Floats
    canary_events: Floats
    """Canary users with any harm so far."""


class World(Protocol):
    """Where simulated users come from."""

    @property
    def name(self) -> str: ...

    @property
    def is_share(self) -> bool:
        """Whether the metric counts events, so that a report waits for thirty of them."""
        ...

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]: ...


@dataclass(frozen=True, slots=True)
class OneShot:
    """Every user comes once and is harmed or not."""

    name: str
    weights: tuple[float, ...]
    """Probability of treatment at each look."""
    per_look: int
    control: float
    treatment: float
    drift: float = 0.0
    """Relative change of both rates from the first to the last look."""
    is_share: bool = True

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]:
        phases: dict[float, Pair] = {}
        for look, w in enumerate(self.weights):
            seen = rng.random((sims, self.per_look), dtype=np.float32) < w
            scale = 1 + self.drift * look / (len(self.weights) - 1)
            luck = rng.random((sims, self.per_look), dtype=np.float32)
            harm = (luck < np.where(seen, self.treatment * scale, self.control * scale)).astype(np.float64)
            yield _plain_look(phases, Users(seen, harm, w), harm)


@dataclass(frozen=True, slots=True)
class Latency:
    """Every user waits once, for a lognormal time; the bets see its logarithm, clipped at three standard deviations."""

    name: str
    w: float
    per_look: int
    slowdown: float = 1.0
    sigma: float = 1.5
    tests_see_log: bool = True
    is_share: bool = False

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]:
        phases: dict[float, Pair] = {}
        for _ in range(LOOKS):
            seen = rng.random((sims, self.per_look), dtype=np.float32) < self.w
            log = rng.standard_normal((sims, self.per_look)) * self.sigma + np.log(self.slowdown) * seen
            harm = np.clip(log / (6 * self.sigma) + 0.5, 0.0, 1.0)
            yield _plain_look(phases, Users(seen, harm, self.w), log if self.tests_see_log else np.exp(log))


@dataclass(frozen=True, slots=True)
class Tastes:
    """How users differ: each has a rate of their own, from a beta distribution."""

    rate: float = 0.20
    concentration: float = 3.6
    """Intraclass correlation 1 / 4.6: at 6.2 interactions per user a design effect of about 2.3."""
    extra: float = 5.2
    """Interactions per user beyond the first, Poisson."""

    def draw(self, rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        return rng.beta(self.rate * self.concentration, (1 - self.rate) * self.concentration, shape)


@dataclass(frozen=True, slots=True)
class Clustered:
    """Users come once, with several interactions that resemble each other."""

    name: str
    w: float
    per_look: int
    tastes: Tastes = Tastes()
    is_share: bool = True

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]:
        users: Pair | None = None
        rows: Pair | None = None
        shape = (sims, self.per_look)
        canary_events = np.zeros(sims)
        for _ in range(LOOKS):
            seen = rng.random(shape, dtype=np.float32) < self.w
            tries = 1 + rng.poisson(self.tastes.extra, shape)
            x = rng.binomial(tries, self.tastes.draw(rng, shape)).astype(np.float64)
            d = tries.astype(np.float64)
            new_users, new_rows = ratio_pair(x, d, seen), row_pair(x, d, seen)
            users = new_users if users is None else users.plus(new_users)
            rows = new_rows if rows is None else rows.plus(new_rows)
            canary_events = canary_events + ((x > 0) & seen).sum(axis=1)
            batch = Users(seen, x / d, self.w)
            yield Look(batch, users, rows, stratified([users]), users.treatment.n, canary_events)


@dataclass(frozen=True, slots=True)
class Returning:
    """The cohort grows at each look and everybody comes back; a user matures after some looks."""

    name: str
    w: float
    per_look: int
    tastes: Tastes = Tastes()
    returns: float = 1.0
    """Interactions of a user per look, Poisson."""
    matures_after: int = 5
    is_share: bool = True

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]:
        shape = (sims, self.per_look * LOOKS)
        seen, taste = rng.random(shape, dtype=np.float32) < self.w, self.tastes.draw(rng, shape)
        x, d = np.zeros(shape), np.zeros(shape)
        for look in range(LOOKS):
            known, first_new = (look + 1) * self.per_look, look * self.per_look
            more = rng.poisson(self.returns, (sims, known))
            more[:, first_new:] += 1
            d[:, :known] += more
            x[:, :known] += rng.binomial(more, taste[:, :known])
            so_far = (x[:, :known], d[:, :known], seen[:, :known])
            users = ratio_pair(*so_far)
            events = ((so_far[0] > 0) & so_far[2]).sum(axis=1).astype(np.float64)
            batch = self._matured(look, x, d, seen)
            yield Look(batch, users, row_pair(*so_far), stratified([users]), users.treatment.n, events)

    def _matured(self, look: int, x: Floats, d: Floats, seen: Flags) -> Users:
        first = (look + 1 - self.matures_after) * self.per_look
        if first < 0:
            return Users(seen[:, :0], x[:, :0], self.w)
        ones = slice(first, first + self.per_look)
        return Users(seen[:, ones].copy(), x[:, ones] / d[:, ones], self.w)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Users stay, come back in every phase, and cross into the canary as it grows, while the base rate falls.

    The bets are told what the platform tells them: of users in the canary or in the reserved control when first seen,
    by what they did then. All the others, the crossing ones among them, are served and not analysed.
    """

    name: str
    ramp: tuple[float, ...]
    per_look: int
    drift: float
    tastes: Tastes = Tastes(rate=0.24)
    returns: float = 0.3
    is_share: bool = True

    def looks(self, rng: np.random.Generator, sims: int) -> Iterator[Look]:
        shape = (sims, self.per_look * LOOKS)
        place, taste = rng.random(shape), self.tastes.draw(rng, shape)
        cells = [(np.zeros(shape), np.zeros(shape), place >= 1 - w) for w in self.ramp]
        for look in range(LOOKS):
            phase = look * len(self.ramp) // LOOKS
            known, first_new = (look + 1) * self.per_look, look * self.per_look
            more = rng.poisson(self.returns, (sims, known))
            more[:, first_new:] += 1
            rate = taste[:, :known] * (1 + self.drift * look / (LOOKS - 1))
            x, d, _ = cells[phase]
            d[:, :known] += more
            x[:, :known] += rng.binomial(more, rate)
            so_far = [Cells(x[:, :known], d[:, :known], seen[:, :known]) for x, d, seen in cells[: phase + 1]]
            yield self._look(so_far, place[:, first_new:known], self.ramp[phase])

    def _look(self, phases: list[Cells], place: Floats, weight: float) -> Look:
        pooled = pooled_by_variant(phases)
        x, d, canary = phases[-1]
        new = slice(x.shape[1] - self.per_look, None)
        analysed = (place < CANARY_RESERVE) | canary[:, new]
        batch = Users(canary[:, new].copy(), x[:, new] / d[:, new], treatment_probability(weight), analysed)
        rows = Pair(*(Sums(arm.d, arm.x, arm.x) for arm in pooled if arm.d is not None))
        harmed = np.zeros(canary.shape, dtype=np.bool_)
        for cells in phases:
            harmed[:, : cells.x.shape[1]] |= (cells.x > 0) & cells.is_treatment
        events = harmed.sum(axis=1).astype(np.float64)
        return Look(batch, pooled, rows, clustered_by_user(phases), pooled.treatment.n, events)


def _plain_look(phases: dict[float, Pair], users: Users, value: Floats) -> Look:
    """Add users with one value each to their phase, and return what is known then."""
    new = value_pair(value, users.is_treatment)
    before = phases.get(users.w)
    phases[users.w] = new if before is None else before.plus(new)
    pairs = list(phases.values())
    pooled = pairs[0]
    for pair in pairs[1:]:
        pooled = pooled.plus(pair)
    return Look(users, pooled, None, stratified(pairs), pooled.treatment.n, pooled.treatment.x)
