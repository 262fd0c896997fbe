"""How much poison the defence lets into a training set, and what it costs in honest pairs.

    python -m bench.poison [--pairs N] [--seed S] [--quick]

Mixes attacks into four weeks of honest traffic (both in `bench/poison_world.py`) and runs the defence with its default
settings, the application's key named: on pairs, and on single thumbs (KTO), of which honest users give two up for one
down and attackers up alone. Prints a table, writes var/bench/poison.json, and exits 1 if a bound is broken:

- of what one account injects at most a tenth gets in, and that is less than 0.1 % of the set;
- accounts under one key have at most the key's share of the set;
- less than 3 % of the honest pairs are lost. Lost is every honest pair that is kept out, except for those that wait by
  rule and come in later: pairs of newcomers, and edits that a reviewer has to look at. They have a column of their own.

Attackers are never newcomers here: their accounts have been known for three months.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.poison_world import (
    APPLICATION,
    ATTACKS,
    BRIGADE,
    FALSE_FACT,
    NOW,
    SCATTERED,
    SLOW_DRIP,
    TRIGGER,
    Attack,
    World,
    honest_world,
    poison,
    single_thumb,
)
from feedback.poisoning.defence import Defended, SideTables, defend
from feedback.poisoning.identities import key_of
from feedback.poisoning.reasons import QUARANTINED, Reason
from feedback.poisoning.singles import DefendedSingles, defend_singles
from pawl.settings import DefenceSettings

SHARES = (0.001, 0.005, 0.01, 0.05)
ACCOUNTS = (1, 5, 50)
MOST_FROM_ONE_ACCOUNT = 0.1
MOST_OF_THE_SET = 0.001
MOST_LOST = 0.03
WAITING = (Reason.NEWCOMER, Reason.UNCORROBORATED_EDIT)


class Scenario(NamedTuple):
    """An attack of a size."""

    attack: Attack
    n_accounts: int
    share: float
    """Of the honest pairs, how many are injected."""
    is_single: bool = False
    """Every vote is a single thumb."""

    @property
    def name(self) -> str:
        return f"{self.attack.name}{', single thumbs' * self.is_single}"


SCENARIOS = tuple(Scenario(attack, n, share) for attack in ATTACKS for n in ACCOUNTS for share in SHARES)
SINGLES = tuple(Scenario(attack, n, share, is_single=True) for attack in ATTACKS for n in ACCOUNTS for share in SHARES)
SWARM = Scenario(BRIGADE, 500, 0.15)
"""Far more than was asked for, so that the key's cap has something to hold."""
ALL = (*SCENARIOS, SWARM, *SINGLES)
QUICK = (
    Scenario(TRIGGER, 1, 0.005),
    Scenario(TRIGGER, 50, 0.05),
    Scenario(FALSE_FACT, 1, 0.005),
    Scenario(BRIGADE, 50, 0.01),
    Scenario(SLOW_DRIP, 1, 0.05),
    Scenario(SCATTERED, 1, 0.005),
    SWARM,
    Scenario(TRIGGER, 1, 0.01, is_single=True),
    Scenario(BRIGADE, 500, 0.15, is_single=True),
)


class Fates(NamedTuple):
    """What became of votes, whether they are pairs or single thumbs."""

    accepted: Sequence[tuple[str, str]]
    """Id and key of each."""
    held: Mapping[str, Reason]
    """What would wait for a reviewer, by id."""
    n_refused: int


class Outcome(NamedTuple):
    """What became of poison and of honest pairs in a scenario."""

    attack: str
    accounts: int
    injected: int
    got_in: int
    of_set: float
    """The share of poison in the set that would be trained on."""
    of_key: float
    """The share of the attackers' key in it."""
    stopped_by: dict[str, int]
    """What kept poison out: the reasons of the quarantine, and `caps` for what was refused."""
    lost: float
    """Of the honest pairs."""
    waiting: float


def run(world: World, scenario: Scenario, seed: int, settings: DefenceSettings) -> Outcome:
    """Mix one attack into the honest world and defend."""
    rng = np.random.default_rng([seed, *scenario.attack.name.encode(), scenario.n_accounts])
    n_injected = round(scenario.share * len(world.pairs))
    attack = poison(rng, world.language, scenario.attack, scenario.n_accounts, n_injected)
    tables = SideTables(NOW, world.first_seen | attack.first_seen)
    if scenario.is_single:
        thumbs = [single_thumb(pair, is_liked=int(pair.id, 16) % 3 > 0) for pair in world.pairs]
        thumbs += [single_thumb(pair, is_liked=True) for pair in attack.pairs]
        fates = _fates_of_singles(defend_singles(thumbs, tables, settings))
    else:
        fates = _fates_of_pairs(defend(world.pairs + attack.pairs, tables, settings))
    return _outcome(scenario, {pair.id for pair in attack.pairs}, fates)


def _fates_of_pairs(defended: Defended) -> Fates:
    accepted = [(pair.id, key_of(pair.principals[0])) for pair in defended.accepted]
    return Fates(accepted, {held.pair.id: held.reason for held in defended.quarantined}, defended.refused.total())


def _fates_of_singles(defended: DefendedSingles) -> Fates:
    accepted = [(example.id, key_of(example.principals[0])) for example in defended.accepted]
    held = {name: reason for name, reason in defended.left_out.items() if reason in QUARANTINED}
    return Fates(accepted, held, len(defended.left_out) - len(held))


def _outcome(scenario: Scenario, bad: set[str], fates: Fates) -> Outcome:
    got_in = sum(name in bad for name, _ in fates.accepted)
    held = Counter((name in bad, reason) for name, reason in fates.held.items())
    n_held_bad = sum(n for (is_bad, _), n in held.items() if is_bad)
    n_honest = len(fates.accepted) + len(fates.held) + fates.n_refused - len(bad)
    n_waiting = sum(held[False, reason] for reason in WAITING)
    n_set = max(1, len(fates.accepted))
    stopped = {reason.value: n for (is_bad, reason), n in sorted(held.items()) if is_bad}
    return Outcome(
        attack=scenario.name,
        accounts=scenario.n_accounts,
        injected=len(bad),
        got_in=got_in,
        of_set=got_in / n_set,
        of_key=sum(key == scenario.attack.key for _, key in fates.accepted) / n_set,
        stopped_by=stopped | {"caps": len(bad) - got_in - n_held_bad},
        lost=1 - (len(fates.accepted) - got_in + n_waiting) / n_honest,
        waiting=n_waiting / n_honest,
    )


def broken_bounds(outcome: Outcome, settings: DefenceSettings) -> Iterator[str]:
    """What an outcome should not have been."""
    name = f"{outcome.attack}, {outcome.accounts} accounts, {outcome.injected} pairs"
    if outcome.accounts == 1 and outcome.got_in > MOST_FROM_ONE_ACCOUNT * outcome.injected:
        yield f"{name}: {outcome.got_in} got in"
    if outcome.accounts == 1 and outcome.of_set >= MOST_OF_THE_SET:
        yield f"{name}: {outcome.of_set:.2%} of the set is poison"
    if outcome.attack.startswith(BRIGADE.name) and outcome.of_key > settings.caps.key_share:
        yield f"{name}: the key has {outcome.of_key:.1%} of the set"
    if outcome.lost >= MOST_LOST:
        yield f"{name}: {outcome.lost:.1%} of the honest pairs are lost"


def _table(outcomes: Sequence[Outcome]) -> Table:
    columns = ("attack", "accounts", "injected", "got in", "of the set", "stopped by", "honest lost", "honest waiting")
    table = Table(*columns, box=None, header_style="bold")
    for each in outcomes:
        stopped = ", ".join(f"{reason} {n}" for reason, n in each.stopped_by.items() if n)
        table.add_row(
            each.attack,
            str(each.accounts),
            str(each.injected),
            str(each.got_in),
            f"{each.of_set:.2%}",
            stopped,
            f"{each.lost:.2%}",
            f"{each.waiting:.2%}",
        )
    return table


def main() -> None:
    """Run the scenarios; exit 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000, help="honest pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} scenarios instead of {len(ALL)}")
    options = parser.parse_args()
    settings = DefenceSettings(application_keys=[APPLICATION])
    world = honest_world(np.random.default_rng(options.seed), options.pairs)
    scenarios = QUICK if options.quick else ALL
    outcomes = [run(world, scenario, options.seed, settings) for scenario in scenarios]
    Console(width=160).print(_table(outcomes))
    path = Path("var/bench/poison.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([each._asdict() for each in outcomes], indent=2))
    problems = [problem for each in outcomes for problem in broken_bounds(each, settings)]
    for problem in problems:
        print(f"broken: {problem}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
