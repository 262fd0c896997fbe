"""Before a canary starts: how many users, events and minutes its verdicts will take.

The evidence is followed along its expected path: each user multiplies a bet by a factor whose mean logarithm is known
once the rates are (Kelly's growth rate; for events it is the divergence of the harmed share from the intended one). A
real canary scatters around that, by a factor of two either way: this is for planning and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ab_testing.assignment import treatment_probability
from ab_testing.canary_state import CanaryConfig, GuardrailMetric
from ab_testing.eprocess import EventShareBet, HarmBet, NonInferiorityBet
from ab_testing.errors import InvalidCanary
from ab_testing.experiment import CANARY_RESERVE

MOST_USERS = 1e9
"""What takes more is out of reach."""
_ROUNDS = 4
"""How often the control's mean, which the bets start from a guess of, is looked up for the users found before."""


class HarmRates(NamedTuple):
    """How often users see one harm."""

    base: float
    """Share of users, in the control."""
    harmed: float | None = None
    """That of a treatment that shall be found out; None where nobody asks."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What it takes to roll a harmful canary back, were all its users seen in one step."""

    metric: str
    step: int
    weight: float
    """Share of all traffic."""
    by_events: bool
    """Whether first events get there sooner than matured users."""
    canary_events: float
    canary_users: float
    users: float
    """Of all traffic."""
    minutes: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step takes of a canary that does no harm."""

    step: int
    weight: float
    users: float
    """Of all traffic."""
    minutes: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect of a rollout."""

    detections: tuple[Detection, ...]
    """By metric and step; a harm that a step cannot show is left out."""
    steps: tuple[StepTime, ...]
    """Up to the promotion of a canary that changes nothing, or to the step that it would not get past."""
    is_promotable: bool
    """Whether it would get past all of them."""

    @property
    def users_to_promote(self) -> float | None:
        return math.fsum(step.users for step in self.steps) if self.is_promotable else None

    @property
    def minutes_to_promote(self) -> float | None:
        return math.fsum(step.minutes for step in self.steps) if self.is_promotable else None


def forecast(
    config: CanaryConfig, rates: Mapping[str, HarmRates], traffic_per_hour: float, *, maturity_s: float = 0.0
) -> Forecast:
    """Return what a rollout with these rules will probably take.

    Args:
        config: The rules.
        rates: By metric; one that is left out is thought to be zero.
        traffic_per_hour: New users an hour, of all traffic.
        maturity_s: How long after the first answer a user's outcome counts; events do not wait for it.

    Raises:
        InvalidCanary: A rate is no share, names no metric, or there is no traffic.
    """
    _check(config, rates, traffic_per_hour)
    plan = _Plan(config, rates, traffic_per_hour / 60, maturity_s / 60)
    found = (_detection(plan, metric, step) for metric in config.metrics for step in range(len(config.steps)))
    steps, is_promotable = _promotion(plan)
    return Forecast(tuple(one for one in found if one is not None), steps, is_promotable)


class _Plan(NamedTuple):
    config: CanaryConfig
    rates: Mapping[str, HarmRates]
    users_per_minute: float
    maturity_min: float

    def base(self, metric: GuardrailMetric) -> float:
        rates = self.rates.get(metric.name)
        return 0.0 if rates is None else rates.base


def _check(config: CanaryConfig, rates: Mapping[str, HarmRates], traffic_per_hour: float) -> None:
    if not 0 < traffic_per_hour < math.inf:
        raise InvalidCanary("a forecast needs traffic")
    if unknown := sorted(rates.keys() - {metric.name for metric in config.metrics}):
        raise InvalidCanary(f"no metric is called {', '.join(unknown)}")
    for name, (base, harmed) in rates.items():
        if not 0 <= base <= 1 or not 0 <= (base if harmed is None else harmed) <= 1:
            raise InvalidCanary(f"the rates of {name} must lie between 0 and 1")


def _detection(plan: _Plan, metric: GuardrailMetric, step: int) -> Detection | None:
    rates = plan.rates.get(metric.name)
    if rates is None or rates.harmed is None or metric.weight <= 0:
        return None
    harmed, weight = rates.harmed, plan.config.steps[step]
    w, weights = treatment_probability(weight), plan.config.harm_weights[metric.name]
    log_alpha = math.log(plan.config.alpha_rollback)
    by_users = _users_to_harm(rates.base, harmed, w, -log_alpha - math.log(weights.users))
    by_events = (
        _users_to_share(rates.base, harmed, w, -log_alpha - math.log(weights.events)) if weights.events else None
    )
    routes = [
        (users / (weight + CANARY_RESERVE) / plan.users_per_minute + wait, users, is_event)
        for users, wait, is_event in ((by_users, plan.maturity_min, False), (by_events, 0.0, True))
        if users is not None
    ]
    if not routes:
        return None
    minutes, users, is_event = min(routes)
    return Detection(
        metric.name, step, weight, is_event, w * users * harmed, w * users, users / (weight + CANARY_RESERVE), minutes
    )


def _users_to_harm(base: float, harmed: float, w: float, log_needed: float) -> float | None:
    """Return analysed users until the bet on users is expected to reach what is needed."""

    def users(control: int) -> float | None:
        start = HarmBet(control_sum=base * control, control_count=control)
        growth = _mean(lambda f, z: start.update(f, z, w).log_wealth, base, harmed, w)
        return _first(lambda n: HarmBet(tuple([n * each for each in growth])).log_e_value, log_needed)

    return _with_known_control(users, w)


def _users_to_share(base: float, harmed: float, w: float, log_needed: float) -> float | None:
    """Return analysed users until the bet on events is expected to reach what is needed."""
    happening = w * harmed + (1 - w) * base
    if happening <= 0:
        return None
    share = w * harmed / happening
    sides = [EventShareBet().update(is_treatment, w).log_wealth for is_treatment in (True, False)]
    growth = [share * treatment + (1 - share) * control for treatment, control in zip(*sides, strict=True)]
    events = _first(lambda n: EventShareBet(tuple([n * each for each in growth])).log_e_value, log_needed)
    return None if events is None else events / happening


def _with_known_control(users: Callable[[int], float | None], w: float) -> float | None:
    """Solve for users whose own control gives the mean that they were bet on with."""
    control = 200
    for _ in range(_ROUNDS):
        found = users(control)
        if found is None:
            return None
        control = max(1, round(found * (1 - w) / 2))
    return found


def _mean(factors: Callable[[float, bool], Sequence[float]], control: float, treatment: float, w: float) -> list[float]:
    """Return the mean logarithm of a user's factors: harm is all or nothing, the hardest case for a given mean."""
    cases = [
        (side * happens, factors(f, is_treatment))
        for is_treatment, side, rate in ((True, w, treatment), (False, 1 - w, control))
        for f, happens in ((1.0, rate), (0.0, 1 - rate))
    ]
    return [math.fsum(chance * logs[place] for chance, logs in cases) for place in range(len(cases[0][1]))]


def _first(log_e_value: Callable[[float], float], log_needed: float) -> float | None:
    """Return the first n at which the evidence suffices: it is convex along its expected path, so there is one."""
    low, high = 0.0, 1.0
    while log_e_value(high) < log_needed:
        low, high = high, 2 * high
        if high > MOST_USERS:
            return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if log_e_value(middle) < log_needed else (low, middle)
    return high


def _promotion(plan: _Plan) -> tuple[tuple[StepTime, ...], bool]:
    config = plan.config
    bounds = [_Path(metric, NonInferiorityBet(margin)) for metric in config.metrics if metric.role == "primary"
              for margin in config.bound_margins]  # fmt: skip
    certify = [_Path(metric, NonInferiorityBet(metric.margin)) for metric in config.metrics if metric.role != "signal"]
    done: list[StepTime] = []
    for step, weight in enumerate(config.steps):
        counted = certify if weight >= config.certify_from else []
        is_last = step == len(config.steps) - 1
        asked = certify if is_last else _asked_of(bounds, config.harm_budget / config.steps[step + 1])
        analysed = _users_to_rule_out(plan, asked, treatment_probability(weight))
        if analysed is None:
            return tuple(done), False
        users, minutes = _duration(plan, step, analysed, before=math.fsum(one.minutes for one in done))
        done.append(StepTime(step, weight, users, minutes))
        seen = users * (weight + CANARY_RESERVE)
        bounds = [path.after(plan, seen, treatment_probability(weight)) for path in bounds]
        certify = [path.after(plan, seen, treatment_probability(weight)) for path in certify] if counted else certify
    return tuple(done), True


class _Path(NamedTuple):
    """A margin bet somewhere along its expected path."""

    metric: GuardrailMetric
    bet: NonInferiorityBet

    def growth(self, plan: _Plan, w: float) -> list[float]:
        base, control = plan.base(self.metric), 1000
        start = NonInferiorityBet(self.bet.margin, control_sum=base * control, control_count=control)
        return _mean(lambda f, z: start.update(f, z, w).log_wealth, base, base, w)

    def after(self, plan: _Plan, users: float, w: float) -> _Path:
        pairs = zip(self.bet.log_wealth, self.growth(plan, w), strict=True)
        return self._replace(bet=self.bet._replace(log_wealth=tuple([start + users * each for start, each in pairs])))


def _asked_of(bounds: Sequence[_Path], allowed: float) -> list[_Path]:
    """Return, per primary metric, the widest margin that the budget of the next step allows."""
    widest: dict[str, _Path] = {}
    for path in bounds:
        before = widest.get(path.metric.name)
        if path.bet.margin <= allowed + 1e-12 and (before is None or path.bet.margin > before.bet.margin):
            widest[path.metric.name] = path
    return list(widest.values())


def _users_to_rule_out(plan: _Plan, paths: Sequence[_Path], w: float) -> float | None:
    """Return analysed users until all margins are ruled out, None where one never is."""
    log_needed = -math.log(plan.config.alpha_promote)
    needed = [_users_on(plan, path, w, log_needed) for path in paths]
    known = [users for users in needed if users is not None]
    return max(known, default=0.0) if len(known) == len(needed) else None


def _users_on(plan: _Plan, path: _Path, w: float, log_needed: float) -> float | None:
    if path.bet.log_e_value >= log_needed:
        return 0.0
    growth = path.growth(plan, w)

    def log_e_value(n: float) -> float:
        pairs = zip(path.bet.log_wealth, growth, strict=True)
        return path.bet._replace(log_wealth=tuple([start + n * each for start, each in pairs])).log_e_value

    return _first(log_e_value, log_needed)


def _duration(plan: _Plan, step: int, analysed: float, *, before: float) -> tuple[float, float]:
    """Return users of all traffic and minutes of a step that evidence, users, dwell and bake time all end."""
    config = plan.config
    weight, least = config.steps[step], config.min_users[step]
    users = max(analysed / (weight + CANARY_RESERVE), least / weight, least / CANARY_RESERVE)
    minutes = max(users / plan.users_per_minute + plan.maturity_min, config.min_dwell_s / 60)
    if step == len(config.steps) - 1:
        minutes = max(minutes, config.bake_s / 60 - before)
    return max(users, minutes * plan.users_per_minute), minutes
