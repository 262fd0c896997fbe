"""What an assignment costs, and whether a million users are divided as promised.

    python -m bench.assignment [--json FILE]

Prints the cost of each kind of assignment (the best of many short runs, since a busy machine only ever adds), of which
none may be above 3 us, then the checks: shares within three standard deviations, a canary that only grows along its
ramp, no analysed user who changes sides, and how many users move when one variant alone gives up traffic, with and
without a slot table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import sqrt
from pathlib import Path

from ab_testing import assignment
from ab_testing.assignment import assign, split_variant
from ab_testing.experiment import Experiment, Holdout, LayerRange, Route, Variant, canary_experiment, reweighed
from ab_testing.slot_table import new_table

N_USERS = 1_000_000
N_TIMED = 500
N_REPEATS = 800
TARGET_US = 3.0
STEPS = (0.01, 0.1, 0.5)
SPLIT = Experiment("tone", "salt", (Variant("control", "m0", 0.9), Variant("treatment", "m1", 0.1)))
THREE = Experiment("three", "salt", (Variant("a", "m0", 0.5), Variant("b", "m1", 0.3), Variant("c", "m2", 0.2)))
DONORS = {"a": 50.0, "b": 50.0, "c": 0.0}
MOVED = {"a": 40.0, "b": 50.0, "c": 10.0}
HOLDOUT = Holdout(0.05, "salt")


@dataclass(frozen=True)
class Check:
    """One promise, and what was seen of it."""

    name: str
    seen: str
    holds: bool


def canary(weight: float) -> Route:
    """A canary at this weight."""
    return Route("assistant", 1, "m0", canary_experiment("r7", "salt", champion="m0", candidate="m1", weight=weight))


def routes() -> dict[str, Route]:
    """The kinds of assignment that are timed."""
    slots = replace(SPLIT, slots=new_table({"control": 0.9, "treatment": 0.1}))
    layered = replace(SPLIT, layer=LayerRange("checkout", 0, 9000))
    return {
        "nothing runs": Route("assistant", 1, "m0"),
        "split in two": Route("assistant", 1, "m0", SPLIT),
        "split in three": Route("assistant", 1, "m0", THREE),
        "slot table": Route("assistant", 1, "m0", slots),
        "canary": canary(0.1),
        "split in two, in a layer, with a hold-out": Route("assistant", 1, "m0", layered, holdout=HOLDOUT),
        "canary with a hold-out": replace(canary(0.1), holdout=HOLDOUT),
    }


def cost_us(call: Callable[[str], object], n_repeats: int = N_REPEATS) -> float:
    """Microseconds for one user: the best of many short runs."""
    users = list(user_names(N_TIMED))
    best = float("inf")
    for _ in range(n_repeats):
        started = time.perf_counter()
        for user in users:
            call(user)
        best = min(best, time.perf_counter() - started)
    return best / N_TIMED * 1e6


def user_names(n: int) -> Iterator[str]:
    """So many users."""
    return (f"user-{number}" for number in range(n))


def check_shares(n: int) -> Check:
    """Shares of a split are within three standard deviations."""
    counts = Counter(split_variant(THREE, user).name for user in user_names(n))
    off = {each.name: deviations(counts[each.name], n, each.weight) for each in THREE.variants}
    seen = ", ".join(f"{name} {value:+.2f} s.d." for name, value in off.items())
    return Check(f"shares of {n} users", seen, all(abs(value) < 3 for value in off.values()))


def deviations(count: int, n: int, share: float) -> float:
    """How many standard deviations a count is off."""
    return (count - n * share) / sqrt(n * share * (1 - share))


def check_ramp(n: int) -> Check:
    """A canary only grows, and no analysed user changes sides."""
    ramp = [canary(weight) for weight in STEPS]
    left = switched = 0
    for user in user_names(n):
        seen = [assign(route, user) for route in ramp]
        for before, after in pairwise(seen):
            left += before.variant == "treatment" != after.variant
            switched += before.is_analysed and (after.variant, after.is_analysed) != (before.variant, True)
    return Check(
        f"a canary's ramp over {n} users", f"{left} left it, {switched} analysed switched", not left + switched
    )


def check_donor(n: int, name: str, before: Experiment, *, may_stray: bool) -> Check:
    """How many users move when one variant alone gives a tenth of all users to another."""
    after = reweighed(before, MOVED)
    moves = Counter((split_variant(before, user).name, split_variant(after, user).name) for user in user_names(n))
    moved = sum(count for (old, new), count in moves.items() if old != new)
    astray = moved - moves["a", "c"]
    seen = f"{moved / n:.2%} moved, {astray / n:.2%} of all users not from a to c"
    is_exact = not astray and abs(deviations(moved, n, 0.1)) < 3
    return Check(f"50/50/0 to 40/50/10 by {name}", seen, is_exact or may_stray)


def donors(slots: Mapping[str, float] | None) -> Experiment:
    """Two halves and a variant without users."""
    variants = tuple(Variant(name, name, weight) for name, weight in DONORS.items())
    return Experiment("ramp", "salt", variants, slots=new_table(slots) if slots else None)


def checks(n: int) -> list[Check]:
    """Every promise, looked at over `n` users."""
    return [
        check_shares(n),
        check_ramp(n // 4),
        check_donor(n // 4, "hash", donors(None), may_stray=True),
        check_donor(n // 4, "slots", donors(DONORS), may_stray=False),
    ]


def main() -> int:
    """Print the table; 1 if a promise is broken or an assignment costs too much."""
    parser = argparse.ArgumentParser(description="The cost and the promises of assignment.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    how = "interpreted" if str(assignment.__file__).endswith(".py") else "compiled"
    costs = {name: cost_us(partial(assign, route)) for name, route in routes().items()}
    for name, cost in costs.items():
        print(f"{name:<45}{cost:6.2f} us  {how}")
    found = checks(N_USERS)
    for check in found:
        print(f"{check.name:<45}{check.seen}: {'holds' if check.holds else 'BROKEN'}")
    if arguments.json:
        told = {"how": how, "cost_us": costs, "checks": {each.name: each.seen for each in found}}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if all(check.holds for check in found) and max(costs.values()) <= TARGET_US else 1


if __name__ == "__main__":
    sys.exit(main())
