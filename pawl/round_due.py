"""Whether a round should start now, and why not: a pure function from what is known."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """What a check came to, in one word for metrics."""

    UNFINISHED = "unfinished"
    """Due: a round that was killed goes on."""
    ALARM = "alarm"
    """Due before its time."""
    ENOUGH = "enough"
    """Due: there are enough new pairs, and the last round is long enough ago."""
    ROLLOUT_OPEN = "rollout_open"
    """Not due: another candidate is being tried on users, and there is one canary at a time."""
    FEW_PAIRS = "few_pairs"
    """Not due."""
    TOO_SOON = "too_soon"
    """Not due: the last round has only just been."""
    NEW_SCHEDULE = "new_schedule"
    """Not due: the schedule is seen for the first time, and begins with its next moment."""


@dataclass(frozen=True)
class Facts:
    """What is known when somebody asks."""

    n_new: int
    """Pairs that no promoted model has learned from, as they would be trained on."""
    left_out: str
    """Pairs that are not trained on, by reason: without them "0 new pairs" would be a riddle."""
    hours_since_last: float | None
    """Since the last round began; None when there was none."""
    unfinished_run: str | None
    open_rollout: str | None
    alarms: tuple[str, ...] = ()
    """Alerts that are firing, of those that count."""


@dataclass(frozen=True)
class Needs:
    """What a round needs."""

    min_pairs: int
    interval_hours: float
    alarm_min_pairs: int


@dataclass(frozen=True)
class Decision:
    """Whether a round is due."""

    is_due: bool
    code: Code
    reason: str
    """For people."""


def decide(facts: Facts, needs: Needs) -> Decision:
    """Whether a round should start now.

    A round that was begun is always brought to its end. An open rollout holds everything else up. An alarm waives the
    time between rounds, and all but a small number of the pairs.
    """
    if facts.unfinished_run:
        return Decision(True, Code.UNFINISHED, f"run {facts.unfinished_run} is unfinished")
    if facts.open_rollout:
        reason = f"rollout {facts.open_rollout} is open: what would be trained now could not be tried before it ends"
        return Decision(False, Code.ROLLOUT_OPEN, reason)
    least, setting = needs.min_pairs, "retrain.min_pairs"
    if facts.alarms:
        least, setting = min(least, needs.alarm_min_pairs), "retrain.alarms.min_pairs"
    if facts.n_new < least:
        return Decision(False, Code.FEW_PAIRS, _too_few(facts, least, setting))
    if facts.alarms:
        return Decision(True, Code.ALARM, f"{', '.join(facts.alarms)} is firing; {facts.n_new} new pairs")
    if facts.hours_since_last is not None and facts.hours_since_last < needs.interval_hours:
        reason = f"the last round was {facts.hours_since_last:.1f} hours ago"
        return Decision(False, Code.TOO_SOON, f"{reason}, retrain.interval_hours is {needs.interval_hours:g}")
    return Decision(True, Code.ENOUGH, f"{facts.n_new} new pairs, retrain.min_pairs is {needs.min_pairs}")


def _too_few(facts: Facts, least: int, setting: str) -> str:
    others = f"; left out: {facts.left_out}" if facts.left_out else ""
    alarms = f", though {', '.join(facts.alarms)} is firing" if facts.alarms else ""
    return f"{facts.n_new} new pairs, {setting} is {least}{alarms}{others}"
