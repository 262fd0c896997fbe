"""The bets of `ab_testing.eprocess`, on many simulations at once, and the proof that they are the same bets.

A thousand times faster than user by user, since all simulations take each step together. `proof` runs the real classes
beside them on some of the simulations and compares the logarithm of every bet's wealth at every look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ab_testing.eprocess import (
    _CAUTION,
    _HARM_GRID,
    _MARGIN_GRID,
    _PRIOR_COUNT,
    _PRIOR_SUM,
    _RATIO_GRID,
    EventShareBet,
    HarmBet,
    NonInferiorityBet,
    _Grid,
)
from bench.ab_sums import Flags, Floats
from bench.ab_worlds import Users

TOLERANCE = 1e-9
_AT_ONCE = 128
"""Users whose factors are multiplied before a logarithm is taken: few enough that no product leaves the range."""
_LARGEST_LOG = 300.0
"""Evidence beyond this is not told apart; decisions are made at 3."""


class UnequalBets(Exception):
    """The fast bets and the real ones differ: nothing that was simulated with them counts."""


class Bets(Protocol):
    """One kind of bet on all simulations."""

    log_wealth: Floats
    """(sims, size of the grid)."""

    def update(self, users: Users) -> Floats:
        """Return the e-value after each of the users, (sims, users)."""
        ...


class _Stakes:
    """Bets that are made on each user, with the control's mean harm so far."""

    def __init__(self, sims: int, grid: _Grid) -> None:
        self.log_wealth: Floats = np.zeros((sims, len(grid.sizes)))
        self._grid = grid
        self._control_sum = np.zeros(sims)
        self._control_count = np.zeros(sims)

    def update(self, users: Users) -> Floats:
        """Return the e-value after each of the users."""
        width = users.harm.shape[1]
        parts = [self._update(users.part(first, first + _AT_ONCE)) for first in range(0, width, _AT_ONCE)]
        return np.concatenate([*parts, users.harm[:, :0]], axis=1)

    def _update(self, users: Users) -> Floats:
        payoff = self._payoff(users, self._means(users))
        if users.is_analysed is not None:
            payoff *= users.is_analysed
        e_values, growth = np.zeros_like(payoff), np.empty_like(payoff)
        for place, (size, log_share) in enumerate(zip(self._grid.sizes, self._grid.log_shares, strict=True)):
            np.multiply(payoff, size, out=growth)
            growth += 1
            np.multiply.accumulate(growth, axis=1, out=growth)
            before = self.log_wealth[:, place].copy()
            self.log_wealth[:, place] += np.log(growth[:, -1])
            growth *= np.exp(np.minimum(before, _LARGEST_LOG) + log_share)[:, None]
            e_values += growth
        return e_values

    def _means(self, users: Users) -> Floats:
        """The control's mean harm before each user."""
        is_control = ~users.is_treatment if users.is_analysed is None else ~users.is_treatment & users.is_analysed
        harm = users.harm * is_control
        sums, counts = np.cumsum(harm, axis=1), np.cumsum(is_control, axis=1, dtype=np.float64)
        means = (_PRIOR_SUM + self._control_sum[:, None] + sums - harm) / (
            _PRIOR_COUNT + self._control_count[:, None] + counts - is_control
        )
        self._control_sum = self._control_sum + sums[:, -1]
        self._control_count = self._control_count + counts[:, -1]
        return means

    def _payoff(self, users: Users, mean: Floats) -> Floats:
        raise NotImplementedError


class HarmBets(_Stakes):
    """`HarmBet`s."""

    def __init__(self, sims: int) -> None:
        super().__init__(sims, _HARM_GRID)

    def _payoff(self, users: Users, mean: Floats) -> Floats:
        stake = _CAUTION / np.maximum((1 - users.w) * mean, users.w * (1 - mean))
        return stake * (users.is_treatment - users.w) * (users.harm - mean)


class NonInferiorityBets(_Stakes):
    """`NonInferiorityBet`s."""

    def __init__(self, sims: int, margin: float) -> None:
        super().__init__(sims, _MARGIN_GRID)
        self._margin = margin

    def _payoff(self, users: Users, mean: Floats) -> Floats:
        w, gap = users.w, users.harm - mean
        excess = np.where(users.is_treatment, gap / w, -gap / (1 - w))
        largest = np.maximum((1 - mean) / w, mean / (1 - w)) - self._margin
        return -_CAUTION * (excess - self._margin) / largest


class EventShareBets:
    """`EventShareBet`s, fed each user's harm as an event."""

    def __init__(self, sims: int) -> None:
        self.log_wealth: Floats = np.zeros((sims, len(_RATIO_GRID.sizes)))
        self._shares = np.exp(np.array(_RATIO_GRID.log_shares))
        self._ratios = np.exp(np.array(_RATIO_GRID.sizes))

    def update(self, users: Users) -> Floats:
        """Return the e-value after each of the users."""
        width = users.harm.shape[1]
        parts = [self._update(users.part(first, first + _AT_ONCE)) for first in range(0, width, _AT_ONCE)]
        return np.concatenate([*parts, users.harm[:, :0]], axis=1)

    def _update(self, users: Users) -> Floats:
        happened = (users.harm > 0) if users.is_analysed is None else (users.harm > 0) & users.is_analysed
        order = np.cumsum(happened, axis=1, dtype=np.int64)
        on_treatment = _in_order(happened, users.is_treatment)
        on_control = _in_order(happened, ~users.is_treatment)
        share = self._ratios * users.w / (self._ratios * users.w + 1 - users.w)
        gains = on_treatment[..., None] * np.log(share / users.w)
        gains += on_control[..., None] * np.log((1 - share) / (1 - users.w))
        logs = self.log_wealth[:, None, :] + gains
        after_events = np.exp(np.minimum(logs, _LARGEST_LOG)) @ self._shares
        self.log_wealth = logs[:, -1, :]
        return np.take_along_axis(after_events, order, axis=1)


def _in_order(happened: Flags, mine: Flags) -> Floats:
    """Return how many of the first 0, 1, 2, ... events were mine, (sims, most events + 1)."""
    rows, columns = np.nonzero(happened)
    counts = happened.sum(axis=1)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((len(happened), int(counts.max(initial=0)) + 1))
    found[rows, places + 1] = mine[rows, columns]
    return np.cumsum(found, axis=1)


class Witness(NamedTuple):
    """What the fast bets said in one simulation: users since the last look, and the wealth at the look."""

    users: Users
    log_wealth: dict[str, Sequence[float]]


Real = HarmBet | NonInferiorityBet | EventShareBet


def proof(witnesses: Sequence[Witness], start: dict[str, Real]) -> float:
    """Run the real classes over the same users and return the largest difference of any log wealth at any look.

    Raises:
        UnequalBets: It is more than rounding.
    """
    bets, largest = dict(start), 0.0
    for users, log_wealth in witnesses:
        for f, is_treatment in _one_by_one(users):
            bets = {name: _fed(bet, f, is_treatment, users.w) for name, bet in bets.items()}
        largest = max(largest, *(_difference(bet, log_wealth[name]) for name, bet in bets.items()))
    if not largest <= TOLERANCE:
        raise UnequalBets(f"log wealth differs by {largest:.3g} between the real bets and the fast ones")
    return largest


def _one_by_one(users: Users) -> Iterator[tuple[float, bool]]:
    analysed = users.analysed[0]
    return zip(users.harm[0, analysed].tolist(), users.is_treatment[0, analysed].tolist(), strict=True)


def _fed(bet: Real, f: float, is_treatment: bool, w: float) -> Real:
    if isinstance(bet, EventShareBet):
        return bet.update(is_treatment, w) if f > 0 else bet
    return bet.update(f, is_treatment, w)


def _difference(bet: Real, log_wealth: Sequence[float]) -> float:
    """Of what decides, and of each bet, relative to a logarithm of thousands, which is a sum of as many roundings."""
    decides = abs(bet._replace(log_wealth=tuple(log_wealth)).log_e_value - bet.log_e_value)
    pairs = zip(bet.log_wealth, log_wealth, strict=True)
    return max(decides, *(abs(real - fast) / max(1.0, abs(real)) for real, fast in pairs))
