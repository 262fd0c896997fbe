"""Which worlds the error rates are measured in, which verdicts count there, and one batch of simulations of a world."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ab_testing.eprocess import EventShareBet, HarmBet, NonInferiorityBet
from ab_testing.evidence import harm_weights
from bench.ab_bets import Bets, EventShareBets, HarmBets, NonInferiorityBets, Real, Witness, proof
from bench.ab_rivals import (
    ALPHA,
    Agreement,
    Test,
    compare_with_gbstats,
    compare_with_reports,
    gbstats_sequential,
    gbstats_version,
    sequence,
    tutorial,
)
from bench.ab_sums import Flags, Floats
from bench.ab_worlds import LOOKS, Clustered, Crossing, Latency, Look, OneShot, Returning, Users, World

Question = Literal["rollback", "promotion", "delay"]
RAMP = (0.01, 0.10, 0.50)
NEVER = LOOKS
_NEEDED = 1 / ALPHA
_COMPARED = 4
"""Simulations of each first batch on which gbstats itself is called."""


@dataclass(frozen=True, slots=True)
class Study:
    """A world, what is asked of it, and which of our verdicts must hold."""

    question: Question
    world: World
    margin: float
    """Harm that must not be promoted; a report's prior is half of it."""
    judged: tuple[str, ...]
    """Columns that the limit is for; of a delay, the one that the canary goes by."""
    published: float | None = None
    """Of a delay: canary users, the best column of the table that set the goal."""
    is_event: bool = True
    """Whether harm comes as events, for the event-share bet."""

    @property
    def name(self) -> str:
        return self.world.name


class First(NamedTuple):
    """When a verdict first came, one value per simulation."""

    look: npt.NDArray[np.int64]
    """`NEVER` where it did not come."""
    canary_users: Floats
    """At that look, or at the last one."""
    canary_events: Floats
    """Ours: at that very user; others: at that look."""


class Batch(NamedTuple):
    """Some simulations of one study."""

    firsts: Mapping[str, First]
    gbstats: Agreement
    bets_differ_by: float
    """From the real classes, log wealth at any look."""
    sequences_differ_by: float
    """From the reports' own function."""


def _constant(w: float) -> tuple[float, ...]:
    return (w,) * LOOKS


def _ramp() -> tuple[float, ...]:
    return tuple(RAMP[look * len(RAMP) // LOOKS] for look in range(LOOKS))


_HARM = ("harm bet",)
_ALL = ("harm bet", "event share", "canary")
_SHOWN = (*_ALL, "reporting sequence")

NULLS = (
    Study("rollback", OneShot("S1 independent 20 %, 50/50", _constant(0.5), 200, 0.2, 0.2), 0.05, _SHOWN),
    Study("rollback", Clustered("S2a clustered ratio, users enrol once", 0.5, 100), 0.05, _SHOWN),
    Study("rollback", Returning("S2c cohort grows and returns", 0.5, 60), 0.05, _SHOWN),
    Study(
        "rollback", Latency("S3 latency, 1 %, tests see seconds", 0.01, 1000, tests_see_log=False), 0.4,
        ("harm bet", "benefit side"), is_event=False,
    ),
    Study(
        "rollback", Latency("S3 latency, 1 %, tests see logarithms", 0.01, 1000), 0.4,
        ("harm bet", "benefit side", "reporting sequence"), is_event=False,
    ),
    *(
        Study("rollback", OneShot(f"S4 harm {rate:.1%}, {w:.0%} canary", _constant(w), users, rate, rate), 0.01, _ALL)
        for w, users in ((0.01, 1000), (0.10, 500))
        for rate in (0.001, 0.005, 0.05)
    ),
    Study("rollback", OneShot("S5 ramp 1-10-50 %, rate 20 %", _ramp(), 800, 0.2, 0.2), 0.05, _SHOWN),
    Study("rollback", OneShot("S5 ramp 1-10-50 %, rate falls 24-20 %", _ramp(), 800, 0.24, 0.24, -1 / 6), 0.05, _SHOWN),
    Study("rollback", Crossing("S9 returning users cross, rate falls 24-20 %", RAMP, 60, -1 / 6), 0.05, _SHOWN),
)  # fmt: skip


def _at_margin(what: str, rate: float, margin: float, w: float, per_look: int) -> Study:
    name = f"{what} {rate:.1%} + {100 * margin:g} points, " + ("50/50" if w == 0.5 else f"{w:.0%} canary")
    return Study("promotion", OneShot(name, _constant(w), per_look, rate, rate + margin), margin, ("margin bet",))


AT_THE_MARGIN = (
    _at_margin("toxic", 0.005, 0.005, 0.01, 2000),
    _at_margin("toxic", 0.005, 0.005, 0.10, 1000),
    _at_margin("toxic", 0.005, 0.005, 0.50, 600),
    _at_margin("slow", 0.05, 0.01, 0.10, 1000),
    _at_margin("thumbs down", 0.20, 0.02, 0.50, 600),
)


def _harmful(name: str, rates: tuple[float, float], w: float, per_look: int, published: float) -> Study:
    return Study("delay", OneShot(name, _constant(w), per_look, *rates), 0.01, ("canary",), published)


NEW_HARM = _harmful("0 to 1.2 %, 10 %: none in the control", (0.0, 0.012), 0.10, 400, 218)
DELAYS = (
    _harmful("0.5 to 2 %, 1 % canary", (0.005, 0.02), 0.01, 2000, 293),
    _harmful("0.5 to 1.5 %, 10 % canary", (0.005, 0.015), 0.10, 1000, 801),
    _harmful("0.5 to 1 %, 50/50", (0.005, 0.01), 0.50, 800, 4976),
    NEW_HARM,
    _harmful("5 to 10 % past p95, 1 % canary", (0.05, 0.10), 0.01, 2000, 208),
    Study("delay", OneShot("20 to 25 %, 10 % canary", _constant(0.10), 600, 0.20, 0.25), 0.05, _HARM, 771),
    Study("delay", Latency("latency x 1.5, 1 % canary", 0.01, 1000, 1.5), 0.4, _HARM, 110, is_event=False),
)
STUDIES = (*NULLS, *AT_THE_MARGIN, *DELAYS)


def run_batch(study: Study, seed: np.random.SeedSequence, sims: int, proven: int, compared: int = 0) -> Batch:
    """Simulate a study.

    Args:
        study: What to simulate.
        seed: Of this batch alone.
        sims: How many simulations.
        proven: On how many of them the real classes are run beside the fast bets.
        compared: On how many of them gbstats is called, where it is installed.
    """
    bets = _bets(study, sims)
    log = _Log(sims)
    witnesses: list[list[Witness]] = [[] for _ in range(proven)]
    gbstats, sequences = Agreement(), 0.0
    compared = compared if gbstats_version() else 0
    with np.errstate(over="ignore"):
        for number, look in enumerate(study.world.looks(np.random.default_rng(seed), sims)):
            evidence = _evidence(study, {name: bet.update(_seen_by(name, look.users)) for name, bet in bets.items()})
            log.hear(number, look, evidence)
            tests = _tests(study, look)
            log.judge(number, look, _verdicts(study, tests))
            if compared:
                places = range(min(sims, compared))
                gbstats = gbstats.plus(compare_with_gbstats(look.right_unit, tests["gbstats"], places, study.margin))
            gap = compare_with_reports(
                look.report, tests["reporting sequence"], study.margin / 2, range(min(sims, _COMPARED))
            )
            sequences = max(sequences, gap)
            for place, seen in enumerate(witnesses):
                seen.append(_witness(place, look.users, bets))
    largest = max([_proof(study, seen) for seen in witnesses], default=0.0)
    return Batch(log.firsts, gbstats, largest, sequences)


def joined(batches: list[Batch]) -> Batch:
    """Return all simulations of a study together."""
    gbstats = Agreement()
    for batch in batches:
        gbstats = gbstats.plus(batch.gbstats)
    firsts = {
        name: First(*(np.concatenate(parts) for parts in zip(*(batch.firsts[name] for batch in batches), strict=True)))
        for name in batches[0].firsts
    }
    return Batch(
        firsts,
        gbstats,
        max(batch.bets_differ_by for batch in batches),
        max(batch.sequences_differ_by for batch in batches),
    )


class _Log:
    """Keeps the first time of each verdict."""

    def __init__(self, sims: int) -> None:
        self._sims = sims
        self._events = np.zeros(sims)
        self.firsts: dict[str, First] = {}

    def hear(self, number: int, look: Look, evidence: Mapping[str, Floats]) -> None:
        """Note what the bets said after each user since the last look: a peak between looks counts."""
        users = look.users
        events = users.is_treatment & (users.harm > 0) & users.analysed
        so_far = self._events[:, None] + np.cumsum(events, axis=1)
        for name, e_values in evidence.items():
            reached = e_values >= _NEEDED
            places = reached.argmax(axis=1) if reached.shape[1] else np.zeros(self._sims, dtype=np.int64)
            at = np.take_along_axis(so_far, places[:, None], axis=1)[:, 0] if reached.shape[1] else self._events
            self._note(name, number, np.any(reached, axis=1, keepdims=True)[:, 0], look.canary_users, at)
        self._events = self._events + events.sum(axis=1)

    def judge(self, number: int, look: Look, verdicts: Mapping[str, Flags]) -> None:
        """Note what the tests say at a look."""
        for name, verdict in verdicts.items():
            self._note(name, number, verdict, look.canary_users, look.canary_events)

    def _note(self, name: str, number: int, said: Flags, users: Floats, events: Floats) -> None:
        before = self.firsts.get(name) or First(np.full(self._sims, NEVER), np.zeros(self._sims), np.zeros(self._sims))
        is_open = before.look == NEVER
        is_first = said & is_open
        self.firsts[name] = First(
            np.where(is_first, number, before.look),
            np.where(is_open, users, before.canary_users),
            np.where(is_open, events, before.canary_events),
        )


def _bets(study: Study, sims: int) -> dict[str, Bets]:
    if study.question == "promotion":
        return {"margin bet": NonInferiorityBets(sims, study.margin)}
    found: dict[str, Bets] = {"harm bet": HarmBets(sims)}
    if study.is_event:
        found["event share"] = EventShareBets(sims)
    if "benefit side" in study.judged:
        found["benefit side"] = HarmBets(sims)
    return found


def _real(study: Study) -> dict[str, Real]:
    if study.question == "promotion":
        return {"margin bet": NonInferiorityBet(study.margin)}
    return {"harm bet": HarmBet(), "event share": EventShareBet()} if study.is_event else {"harm bet": HarmBet()}


def _seen_by(name: str, users: Users) -> Users:
    return users._replace(harm=1 - users.harm) if name == "benefit side" else users


def _evidence(study: Study, e_values: dict[str, Floats]) -> dict[str, Floats]:
    """Add what the canary goes by in a metric that counts events: the larger bet, each at its part of the weight."""
    if not study.is_event or study.question == "promotion":
        return e_values
    users, events = harm_weights(1.0, counts_events=True)
    canary = np.maximum(users * e_values["harm bet"], events * e_values["event share"])
    return e_values | {"canary": canary}


def _tests(study: Study, look: Look) -> dict[str, Test]:
    events = look.right_unit if study.world.is_share else None
    found = {
        "tutorial": tutorial(look.right_unit),
        "gbstats": gbstats_sequential(look.right_unit),
        "reporting sequence": sequence(look.report, study.margin / 2, events),
    }
    if look.interactions is not None:
        found["tutorial, per interaction"] = tutorial(look.interactions)
        found["gbstats, per interaction"] = gbstats_sequential(look.interactions)
    return found


def _verdicts(study: Study, tests: Mapping[str, Test]) -> dict[str, Flags]:
    if study.question == "promotion":
        return {name: test.upper < study.margin for name, test in tests.items()}
    if study.question == "delay":
        return {name: test.says_harm for name, test in tests.items()}
    either = {name: test.rejects for name, test in tests.items()}
    return either | {f"{name}, harm side": test.says_harm for name, test in tests.items()}


def _witness(place: int, users: Users, bets: Mapping[str, Bets]) -> Witness:
    one = slice(place, place + 1)
    analysed = None if users.is_analysed is None else users.is_analysed[one].copy()
    alone = Users(users.is_treatment[one].copy(), users.harm[one].copy(), users.w, analysed)
    return Witness(alone, {name: bet.log_wealth[place].tolist() for name, bet in bets.items()})


def _proof(study: Study, seen: list[Witness]) -> float:
    return proof(seen, _real(study))


def allowed(sims: int) -> float:
    """5 % and three standard errors of the simulation."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / sims)
