"""What is known about one metric of a canary, and how a metric's evidence of harm counts towards a rollback.

Evidence may be averaged only along one order of information. All users' bets are made in the order in which users
mature, so their weighted mean is an e-process again. A bet on an event is made earlier: by the time its user matures,
the event has given away which side the user is on, and a mean of the two, looked at in between, is no e-process of
anything (Choe and Ramdas, "Combining evidence across filtrations", 2024). So the weights are split: part of an
event-counting metric's weight stays with the users' mean, the rest is a bet of its own, and the larger one decides.
By Ville's inequality and a union bound, the probability of ever reaching 1/alpha is at most alpha times the sum of the
weights, which is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from ab_testing.eprocess import EventShareBet, HarmBet, NonInferiorityBet, check_outcome, log_weighted_mean

EVENT_WEIGHT = 0.8
"""Part of an event-counting metric's weight that is bet on events: rare harms show there first."""


class MetricEvidence(NamedTuple):
    """What is known about one metric."""

    harm: HarmBet
    certify: NonInferiorityBet
    bound: tuple[NonInferiorityBet, ...] = ()
    treatment_sum: float = 0.0
    treatment_count: int = 0
    events: EventShareBet = EventShareBet()

    def to_json(self) -> dict[str, object]:
        return {
            "harm": self.harm.to_json(),
            "certify": self.certify.to_json(),
            "bound": [bet.to_json() for bet in self.bound],
            "treatment_sum": self.treatment_sum,
            "treatment_count": self.treatment_count,
            "events": self.events.to_json(),
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
            EventShareBet.from_json(cast(Mapping[str, object], data["events"]))
            if "events" in data
            else EventShareBet(),
        )


class MetricTally:
    """The evidence on one metric while users are being added to it."""

    __slots__ = ("_bound", "_certify", "_count", "_events", "_is_required", "_log_needed", "_sum", "harm")

    def __init__(self, evidence: MetricEvidence, *, is_required: bool, log_needed: float) -> None:
        """Start from what is known.

        Args:
            evidence: What is known.
            is_required: Whether promotion waits for this metric: otherwise nobody asks what its margin bet says.
            log_needed: Margins that such evidence rules out stay ruled out: more users are not bet on.
        """
        self.harm, self._certify, self._bound, self._sum, self._count, self._events = evidence
        self._is_required = is_required
        self._log_needed = log_needed

    def add(self, f: float, is_treatment: bool, w: float, *, certifies: bool) -> None:
        """Bet on one more user.

        Args:
            f: The user's harm, in [0, 1], up is worse.
            is_treatment: What the user saw.
            w: Probability of treatment that was in force when the user was first seen.
            certifies: Whether the user was randomised at a share of traffic that counts towards promotion.

        Raises:
            InvalidOutcome: The harm or the probability is impossible.
        """
        check_outcome(f, w)
        needed = self._log_needed
        self.harm = self.harm.after(f, is_treatment, w)
        if certifies and self._is_required and _is_open(self._certify, needed):
            self._certify = self._certify.after(f, is_treatment, w, needed)
        if self._bound:
            self._bound = tuple(
                [bet.after(f, is_treatment, w, needed) if _is_open(bet, needed) else bet for bet in self._bound]
            )
        if is_treatment:
            self._sum += f
            self._count += 1

    def frozen(self) -> MetricEvidence:
        return MetricEvidence(self.harm, self._certify, self._bound, self._sum, self._count, self._events)


def _is_open(bet: NonInferiorityBet, log_needed: float) -> bool:
    """Whether more users can still change what the bet says."""
    return bet.peak < log_needed or not (bet.control_count and bet.treatment_count)


class HarmWeights(NamedTuple):
    """How one metric's weight is split over the two kinds of bets."""

    users: float
    events: float


def harm_weights(weight: float, *, counts_events: bool) -> HarmWeights:
    """Return what a metric's bets count for: together its weight.

    >>> harm_weights(0.25, counts_events=False)
    HarmWeights(users=0.25, events=0.0)
    """
    return (
        HarmWeights((1 - EVENT_WEIGHT) * weight, EVENT_WEIGHT * weight) if counts_events else HarmWeights(weight, 0.0)
    )


class LogHarm(NamedTuple):
    """Logarithms of the evidence of harm."""

    overall: float
    """What decides about a rollback."""
    by_metric: dict[str, float]
    """Each metric's bets, the larger at its part of the metric's weight, were that weight one."""


def log_harm(evidence: Mapping[str, MetricEvidence], weights: Mapping[str, HarmWeights]) -> LogHarm:
    """Return the evidence of harm as it is now."""
    users = {name: evidence[name].harm.log_e_value for name in weights}
    events = {name: evidence[name].events.log_e_value for name, weight in weights.items() if weight.events > 0}
    overall = log_users_mean(list(users.values()), list(weights.values()))
    by_metric = dict(users)
    for name, log in events.items():
        overall = max(overall, log + math.log(weights[name].events))
        by_metric[name] = max(users[name] + math.log(1 - EVENT_WEIGHT), log + math.log(EVENT_WEIGHT))
    return LogHarm(overall, by_metric)


def log_users_mean(logs: Sequence[float], weights: Sequence[HarmWeights]) -> float:
    """Return the logarithm of the weighted mean of all metrics' bets on users."""
    return log_weighted_mean(logs, [weight.users for weight in weights])
