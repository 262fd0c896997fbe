"""Whole canaries: users through the real state machine, until it promotes, rolls back or has no more users."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ab_testing.assignment import treatment_probability
from ab_testing.canary import Health, apply, decide, weight_of
from ab_testing.canary_state import (
    CanaryConfig,
    CanaryState,
    GuardrailMetric,
    PhaseCount,
    UserEvent,
    UserOutcome,
    launch,
    observe,
    observe_assigned,
    observe_events,
)
from ab_testing.experiment import CANARY_RESERVE

_LOOK_EVERY = 10
"""Users of all traffic between two looks."""

METRICS = (
    GuardrailMetric("thumbs_down", margin=0.05, weight=0.4, role="primary"),
    GuardrailMetric("toxic", margin=0.05, weight=0.3, counts_events=True),
    GuardrailMetric("harmful_complied", margin=0.05, weight=0.3, counts_events=True),
)
DEFAULT = CanaryConfig(METRICS, min_dwell_s=0.0)
# Without the other verdict in the way, each kind of error has the whole life of the canary to happen. One bound is
# kept, for speed: the ramp is forced, so nothing is decided by it.
_ONLY_ROLLBACK = replace(DEFAULT, alpha_promote=1e-9, bound_margins=(0.02,))
_ONLY_PROMOTE = replace(DEFAULT, alpha_rollback=1e-9, bound_margins=(0.02,))


class Rates(NamedTuple):
    """Probability of harm per user, by metric, in the order of `METRICS`."""

    control: tuple[float, ...]
    treatment: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world to run canaries in."""

    name: str
    rates: Rates
    users: int
    """Users of all traffic after which a run is given up."""
    config: CanaryConfig = DEFAULT
    drift: float = 0.0
    """Relative change of every rate from the first to the last user."""
    is_forced: bool = False
    """Take each next step after an equal share of the users, whatever the evidence says."""
    error: str | None = None
    """The final status that would be a mistake in this world, bounded by 5 %."""


SCENARIOS = (
    Scenario(
        "no worse, rates fall by a third while ramping",
        Rates((0.24, 0.01, 0.10), (0.24, 0.01, 0.10)), 3000, _ONLY_ROLLBACK, -0.33, True, "rolled_back",
    ),
    Scenario(
        "no worse, rates double while ramping",
        Rates((0.12, 0.01, 0.05), (0.12, 0.01, 0.05)), 3000, _ONLY_ROLLBACK, 1.0, True, "rolled_back",
    ),
    Scenario(
        "at the margin, common harm (20 % + 5 points)",
        Rates((0.20, 0.0, 0.0), (0.25, 0.0, 0.0)), 3000, _ONLY_PROMOTE, 0.0, True, "promoted",
    ),
    Scenario(
        "at the margin, rare harm (0.5 % + 5 points)",
        Rates((0.20, 0.005, 0.0), (0.10, 0.055, 0.0)), 3000, _ONLY_PROMOTE, 0.0, True, "promoted",
    ),
    Scenario("bad canary (12 % to 85 %)", Rates((0.12, 0.002, 0.05), (0.85, 0.002, 0.05)), 4000),
    Scenario("toxic canary (0 % to 30 %)", Rates((0.12, 0.0, 0.05), (0.12, 0.30, 0.05)), 4000),
    Scenario("good canary (60 % to 12 %)", Rates((0.60, 0.002, 0.002), (0.12, 0.002, 0.002)), 4000),
)  # fmt: skip


class Run(NamedTuple):
    """How one simulated canary ended."""

    status: str
    users_by_step: tuple[int, ...]
    canary_users: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What many runs of one scenario have in common."""

    name: str
    sims: int
    ended: dict[str, float]
    """Share of runs by final status; "ramp" and "certify" are runs whose users ran out."""
    error: str | None
    error_rate: float | None
    median_users_by_step: tuple[float, ...]
    median_users: float
    """Of all traffic, among runs that ended."""
    median_canary_users: float

    @property
    def allowed(self) -> float:
        """5 % and three standard errors of the simulation."""
        return 0.05 + 3 * math.sqrt(0.05 * 0.95 / self.sims)

    def row(self) -> str:
        """A line for people."""
        if self.error_rate is not None:
            error = math.sqrt(max(self.error_rate, 1 / self.sims) * (1 - self.error_rate) / self.sims)
            result = f"{self.error} {self.error_rate:6.1%} ± {error:.1%} (allowed 5 %, with noise {self.allowed:.1%})"
        else:
            ended = ", ".join(f"{status} {share:.0%}" for status, share in self.ended.items())
            steps = " + ".join(f"{users:.0f}" for users in self.median_users_by_step)
            result = f"{ended}; median users {steps} = {self.median_users:.0f}, canary {self.median_canary_users:.0f}"
        return f"{self.name:48} {result}"

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in Summary.__slots__}


def simulate(scenario: Scenario, rng: np.random.Generator) -> Run:
    """Run one canary until it ends or the users run out."""
    config = scenario.config
    state = launch(config, 0.0)
    users_by_step = [0] * len(config.steps)
    for seen in range(_LOOK_EVERY, scenario.users + 1, _LOOK_EVERY):
        users_by_step[state.step] += _LOOK_EVERY
        users = list(_outcomes(scenario, state.step, weight_of(state, config), seen, rng))
        state = observe_assigned(state, config, _assigned(users))
        state = observe(observe_events(state, config, _events(users)), config, users)
        decision = decide(state, config, float(seen), Health())
        state = apply(state, config, decision, float(seen))
        if state.is_final or state.status == "hold":
            break
        state = _forced(state, scenario, seen)
    return Run(state.status, tuple(users_by_step), sum(count.treatment for count in state.phases))


def summarise(scenario: Scenario, runs: Sequence[Run]) -> Summary:
    """Return the error rate of the scenario, or else how fast it ended."""
    ended = Counter(run.status for run in runs)
    finished = [run for run in runs if run.status in ("promoted", "rolled_back")] or list(runs)
    by_step = zip(*(run.users_by_step for run in finished), strict=True)
    return Summary(
        name=scenario.name,
        sims=len(runs),
        ended={status: count / len(runs) for status, count in sorted(ended.items())},
        error=scenario.error,
        error_rate=None if scenario.error is None else ended[scenario.error] / len(runs),
        median_users_by_step=tuple(statistics.median(users) for users in by_step),
        median_users=statistics.median(sum(run.users_by_step) for run in finished),
        median_canary_users=statistics.median(run.canary_users for run in finished),
    )


def run_scenario(scenario: Scenario, *, sims: int, seed: int) -> Summary:
    """Simulate one world `sims` times, the same way for the same seed."""
    seeds = np.random.SeedSequence([seed, *scenario.name.encode()]).spawn(sims)
    return summarise(scenario, [simulate(scenario, np.random.default_rng(child)) for child in seeds])


def _assigned(users: Iterable[UserOutcome]) -> Iterator[PhaseCount]:
    for user in users:
        yield PhaseCount(user.phase, user.treatment_probability, not user.is_treatment, user.is_treatment)


def _events(users: Iterable[UserOutcome]) -> Iterator[UserEvent]:
    for user in users:
        for name, harm in user.values.items():
            if harm:
                yield UserEvent(name, user.unit, user.is_treatment, user.treatment_probability, user.phase)


def _forced(state: CanaryState, scenario: Scenario, seen: int) -> CanaryState:
    if not scenario.is_forced:
        return state
    steps = len(scenario.config.steps)
    return replace(state, step=min(steps - 1, seen * steps // scenario.users))


def _outcomes(
    scenario: Scenario, step: int, weight: float, seen: int, rng: np.random.Generator
) -> Iterator[UserOutcome]:
    scale = 1 + scenario.drift * seen / scenario.users
    for unit, (place, *luck) in enumerate(rng.random((_LOOK_EVERY, 1 + len(METRICS))).tolist()):
        if CANARY_RESERVE <= place < 1 - weight:
            continue  # the rest of the ramp: served, not analysed
        is_treatment = place >= 1 - weight
        rates = scenario.rates.treatment if is_treatment else scenario.rates.control
        values = {
            metric.name: float(drawn < rate * scale) for metric, drawn, rate in zip(METRICS, luck, rates, strict=True)
        }
        yield UserOutcome(f"{seen}-{unit}", is_treatment, treatment_probability(weight), values, step)
