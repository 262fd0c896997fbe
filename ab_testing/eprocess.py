"""Evidence that may be looked at after every user: e-processes that bet on the known assignment probability.

An e-process starts at 1 and, while its null hypothesis holds, is expected to stay at or below 1. By Ville's inequality
it ever reaches 1/alpha with probability at most alpha, for any distribution of harm, any drift, any change of weights
and any number of looks. Three nulls are here:

* `HarmBet`: the treatment does not harm more than the control.
* `NonInferiorityBet`: the treatment harms more than the control by the margin or worse.
* `EventShareBet`: a harmful event falls on the treatment as often as chance assigns users to it.

What the guarantee asks for: one bet per user, made once; the probability that was in force when the user was first
seen; an outcome that matures at a time which does not depend on the variant.

Sources: Duan, Ramdas and Wasserman, "Interactive rank testing by betting" (CLeaR 2022); Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting" (JRSS-B 2024); Lindon and Malek, "Anytime-valid inference for
multinomial count data" (NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import NamedTuple, Self, cast

from ab_testing.errors import InvalidOutcome

METHOD = "betting-2"
"""Names the grids below and what is bet on. Stored evidence means something only together with them: change one,
change the name. Evidence that "betting-1" stored goes on as it is: the grids are the same, and nothing counted events.
"""

_CAUTION = 0.999
"""Never stake everything: one unlucky user must not end the process at zero."""
_PRIOR_SUM, _PRIOR_COUNT = 0.5, 1.0
"""Where the mean harm of the control starts, worth one user: what is bet on is known before the bet is made."""
_SPLIT_PRIOR = 100.0
"""Concentration of the prior around the intended split; 10000 is the usual default and slow to notice a fault."""
_ROUNDING = 1e-9
"""Far above what rounding may do to a payoff, or to a wealth of thousands of them."""
_LARGEST_LOG = 700.0
"""exp of more than this is not a finite number."""


class _Grid(NamedTuple):
    """Bet sizes that share the starting capital: nobody knows the best one beforehand."""

    sizes: tuple[float, ...]
    log_shares: tuple[float, ...]


def _grid(capital: Mapping[float, float]) -> _Grid:
    total = math.fsum(capital.values())
    return _Grid(tuple(capital), tuple(math.log(part / total) for part in capital.values()))


_HARM_GRID = _grid(dict.fromkeys((0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.6, 0.9), 1.0))
# Weighted to large stakes: they are best where neither side shows a harm, and waiting is then all that it costs.
_MARGIN_GRID = _grid({0.01: 1, 0.02: 1, 0.04: 1, 0.08: 1, 0.16: 1, 0.32: 1, 0.6: 2, 0.99: 4})
_LOG_RATIOS = tuple(0.25 * step for step in range(1, 17))
"""Rate ratios from 1.28 to 55, under a half-normal prior with scale 1.5 on their logarithm."""
_RATIO_GRID = _grid({ratio: math.exp(-0.5 * (ratio / 1.5) ** 2) for ratio in _LOG_RATIOS})


class HarmBet(NamedTuple):
    """Bets that the treatment is worse. Reaching 1/alpha is reason to roll back."""

    log_wealth: tuple[float, ...] = (0.0,) * len(_HARM_GRID.sizes)
    control_sum: float = 0.0
    control_count: int = 0

    def update(self, f: float, is_treatment: bool, w: float) -> HarmBet:
        """Return the evidence after one more user.

        Args:
            f: The user's harm, in [0, 1], up is worse.
            is_treatment: What the user saw.
            w: Probability of treatment that was in force when the user was first seen.

        Raises:
            InvalidOutcome: The harm or the probability is impossible.
        """
        check_outcome(f, w)
        return self.after(f, is_treatment, w)

    def after(self, f: float, is_treatment: bool, w: float) -> HarmBet:
        """As `update`, of an outcome that has been checked."""
        log_wealth, total, count = self
        mean = (_PRIOR_SUM + total) / (_PRIOR_COUNT + count)
        # The largest stake that cannot lose everything: the payoff's minimum is -(1-w)m or -w(1-m).
        in_treatment, in_control = (1 - w) * mean, w * (1 - mean)
        stake = _CAUTION / (in_treatment if in_treatment > in_control else in_control)
        wealth = _bet(log_wealth, _HARM_GRID.sizes, stake * (is_treatment - w) * (f - mean))
        return HarmBet(wealth, total, count) if is_treatment else HarmBet(wealth, total + f, count + 1)

    @property
    def log_e_value(self) -> float:
        return _log_average(self.log_wealth, _HARM_GRID)

    @property
    def e_value(self) -> float:
        return finite_exp(self.log_e_value)

    def merge(self, other: HarmBet) -> HarmBet:
        """Join the evidence of two disjoint groups of users that were bet on apart."""
        return HarmBet(
            _add(self.log_wealth, other.log_wealth),
            self.control_sum + other.control_sum,
            self.control_count + other.control_count,
        )

    def to_json(self) -> dict[str, object]:
        return {
            "log_wealth": list(self.log_wealth),
            "control_sum": self.control_sum,
            "control_count": self.control_count,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        return cls(
            _wealth_from_json(data, _HARM_GRID),
            float(cast(float, data["control_sum"])),
            int(cast(int, data["control_count"])),
        )


class NonInferiorityBet(NamedTuple):
    """Bets that the treatment is worse by less than `margin`. Reaching 1/alpha rules a harm of `margin` out."""

    margin: float
    log_wealth: tuple[float, ...] = (0.0,) * len(_MARGIN_GRID.sizes)
    control_sum: float = 0.0
    control_count: int = 0
    peak: float = 0.0
    """Largest log e-value so far, of those that could decide. It may stand for the e-value in a decision: that is what
    "at any time" means."""
    treatment_count: int = 0

    def update(self, f: float, is_treatment: bool, w: float) -> NonInferiorityBet:
        """Return the evidence after one more user; as `HarmBet.update`."""
        _check_margin(self.margin)
        check_outcome(f, w)
        return self.after(f, is_treatment, w)

    def after(self, f: float, is_treatment: bool, w: float, log_needed: float = 0.0) -> NonInferiorityBet:
        """As `update`, of an outcome and a margin that have been checked.

        Args:
            f: The user's harm.
            is_treatment: What the user saw.
            w: Probability of treatment.
            log_needed: Peaks below this need not be told apart.
        """
        margin, log_wealth, total, count, peak, treatment_count = self
        mean = (_PRIOR_SUM + total) / (_PRIOR_COUNT + count)
        excess = (f - mean) / w if is_treatment else (mean - f) / (1 - w)
        in_treatment, in_control = (1 - mean) / w, mean / (1 - w)
        # Positive: the larger of the two is never below 1.
        largest = (in_treatment if in_treatment > in_control else in_control) - margin
        payoff = -_CAUTION * (excess - margin) / largest
        wealth = _bet(log_wealth, _MARGIN_GRID.sizes, payoff)
        # Every stake loses what a negative payoff takes, and no mean is above its largest part.
        if payoff > -_ROUNDING and max(wealth) > (peak if peak > log_needed else log_needed):
            peak = max(peak, _log_average(wealth, _MARGIN_GRID))
        if is_treatment:
            return NonInferiorityBet(margin, wealth, total, count, peak, treatment_count + 1)
        return NonInferiorityBet(margin, wealth, total + f, count + 1, peak, treatment_count)

    @property
    def log_e_value(self) -> float:
        return _log_average(self.log_wealth, _MARGIN_GRID)

    @property
    def e_value(self) -> float:
        return finite_exp(self.log_e_value)

    def has_crossed(self, alpha: float) -> bool:
        """Whether the margin has been ruled out, now or earlier, at level `alpha`: by users of both variants."""
        return self.peak >= -math.log(alpha) and self.control_count > 0 and self.treatment_count > 0

    def to_json(self) -> dict[str, object]:
        return {
            "margin": self.margin,
            "log_wealth": list(self.log_wealth),
            "control_sum": self.control_sum,
            "control_count": self.control_count,
            "peak": self.peak,
            "treatment_count": self.treatment_count,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        return cls(
            _check_margin(float(cast(float, data["margin"]))),
            _wealth_from_json(data, _MARGIN_GRID),
            float(cast(float, data["control_sum"])),
            int(cast(int, data["control_count"])),
            float(cast(float, data["peak"])),
            int(cast(int, data.get("treatment_count", 1))),  # "betting-1" did not count them.
        )


class EventShareBet(NamedTuple):
    """Bets that rare harmful events fall on the treatment more often than users do.

    Feed it each user's first event, the moment it happens: there is nothing to wait for, and it works while the control
    has no event at all. Exact where the treatment changes nothing: whose first event comes next then has nothing to do
    with the coin that assigned, so each event is a fresh draw with probability `w`. A treatment that is merely no worse
    may still use up the users at risk later than the control does; keep it to events that at most one user in twenty
    ever has, which bounds that, and use `HarmBet` otherwise.
    """

    log_wealth: tuple[float, ...] = (0.0,) * len(_RATIO_GRID.sizes)
    events: int = 0

    def update(self, is_treatment: bool, w: float) -> EventShareBet:
        """Return the evidence after one more event; `w` is the probability of treatment in the user's own cohort.

        Raises:
            InvalidOutcome: The probability is impossible.
        """
        check_outcome(0.0, w)
        gains = (_share_gain(math.exp(ratio), is_treatment, w) for ratio in _RATIO_GRID.sizes)
        wealth = tuple(before + gain for before, gain in zip(self.log_wealth, gains, strict=True))
        return EventShareBet(wealth, self.events + 1)

    @property
    def log_e_value(self) -> float:
        return _log_average(self.log_wealth, _RATIO_GRID)

    @property
    def e_value(self) -> float:
        return finite_exp(self.log_e_value)

    def merge(self, other: EventShareBet) -> EventShareBet:
        """Join the evidence of two streams of events from different users."""
        return EventShareBet(_add(self.log_wealth, other.log_wealth), self.events + other.events)

    def to_json(self) -> dict[str, object]:
        return {"log_wealth": list(self.log_wealth), "events": self.events}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        return cls(_wealth_from_json(data, _RATIO_GRID), int(cast(int, data["events"])))


def upper_harm_bound(bets: Iterable[NonInferiorityBet], alpha: float) -> float | None:
    """Return the smallest margin that has been ruled out, or None.

    Wealth grows with the margin, user by user, so ruling out one margin rules out all larger ones: the bound is below
    the true harm with probability at most `alpha`, whenever it is read and however many margins the grid has.
    """
    return min((bet.margin for bet in bets if bet.has_crossed(alpha)), default=None)


def log_split_mismatch(control: int, treatment: int, w: float) -> float:
    """Return the log Bayes factor against units having been split with probability `w` of treatment.

    The Dirichlet-multinomial test of Lindon and Malek (2022), valid at every look; factors of phases multiply.
    """
    check_outcome(0.0, w)
    split = ((control, 1 - w), (treatment, w))
    evidence = math.lgamma(_SPLIT_PRIOR) - math.lgamma(_SPLIT_PRIOR + control + treatment)
    for count, share in split:
        prior = _SPLIT_PRIOR * share
        evidence += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return evidence


def log_weighted_mean(logs: Sequence[float], weights: Sequence[float]) -> float:
    """Return log(sum of weight * exp(log)) without overflow."""
    terms = [log + math.log(weight) for log, weight in zip(logs, weights, strict=True) if weight > 0]
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def finite_exp(log: float) -> float:
    """Return exp(log), cut off where it would not be a number that JSON can hold."""
    return math.exp(min(log, _LARGEST_LOG))


def check_outcome(f: float, w: float) -> None:
    """Refuse what cannot be bet on.

    Raises:
        InvalidOutcome: Harm outside [0, 1], or a probability that leaves nothing to chance; NaN is both.
    """
    if not 0 <= f <= 1:
        raise InvalidOutcome(f"harm must lie in [0, 1], got {f}")
    if not 0 < w < 1:
        raise InvalidOutcome(f"probability of treatment must lie between 0 and 1, got {w}")


def _check_margin(margin: float) -> float:
    if not 0 < margin < 1:
        raise InvalidOutcome(f"a margin lies between 0 and 1, got {margin}")
    return margin


def _bet(log_wealth: tuple[float, ...], sizes: tuple[float, ...], payoff: float) -> tuple[float, ...]:
    # Written out, for this is where the time goes: a loop over the eight stakes takes twice as long.
    log1p = math.log1p
    a, b, c, d, e, f, g, h = log_wealth
    p, q, r, s, t, u, v, w = sizes
    return (
        a + log1p(p * payoff),
        b + log1p(q * payoff),
        c + log1p(r * payoff),
        d + log1p(s * payoff),
        e + log1p(t * payoff),
        f + log1p(u * payoff),
        g + log1p(v * payoff),
        h + log1p(w * payoff),
    )


def _log_average(log_wealth: Sequence[float], grid: _Grid) -> float:
    terms: list[float] = list(map(add, log_wealth, grid.log_shares))
    top = max(terms)
    return top + math.log(math.fsum(map(math.exp, [term - top for term in terms])))


def _share_gain(ratio: float, is_treatment: bool, w: float) -> float:
    share = ratio * w / (ratio * w + 1 - w)
    return math.log(share / w) if is_treatment else math.log((1 - share) / (1 - w))


def _add(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _wealth_from_json(data: Mapping[str, object], grid: _Grid) -> tuple[float, ...]:
    wealth = tuple(float(value) for value in cast(Sequence[float], data["log_wealth"]))
    if len(wealth) != len(grid.sizes) or not all(map(math.isfinite, wealth)):
        raise InvalidOutcome("stored evidence does not fit this version's grid of bets")
    return wealth
