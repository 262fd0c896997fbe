"""What deciding costs while a canary runs: microseconds of one core, beside what they may be.

    python -m bench.ab_speed [--repeats R]

Eight metrics, two of which count events, in the last step with 2,000 users of both variants:

* a decision: `decide` on the evidence as it stands, every number of the record included;
* an update: `observe` of a batch of 500 matured users, divided by users and metrics: one user's outcome in one metric,
  that is, every bet that it takes part in. A user of all eight costs eight of them, and the bookkeeping once;
* the same of a batch of one user, not divided: eight updates and all of the bookkeeping, which is what a quiet canary
  does. The controller hands over, at each tick, whoever matured since the last one;
* an event: `observe_events`, one user's first harmful event in one metric;
* an assignment of a user never seen before to a side of the canary.

gbstats, where it is installed, decides eight ratio metrics from sums that are there already; how it gets them is not
timed. Processor time, not the clock's. Prints a table and writes var/bench/ab_speed.json; exits 1 if something costs
more than it may, by the best of its repeats: other processes on a machine only ever add.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ab_testing.assignment import assign, treatment_probability
from ab_testing.canary import (
    CanaryConfig,
    CanaryState,
    GuardrailMetric,
    Health,
    UserEvent,
    UserOutcome,
    apply,
    decide,
    launch,
    observe,
    observe_events,
    override,
)
from ab_testing.experiment import Route, canary_experiment

N_METRICS = 8
LAST_STEP = 2
USERS_BEFORE = 2000
BATCH = 500
N_UPDATES = BATCH * N_METRICS
UPDATE_US = 5.0
HARM_RATE = 0.1
METRICS = tuple(
    GuardrailMetric(f"harm {place}", 0.05, 1 / N_METRICS, "guardrail" if place else "primary", counts_events=place > 5)
    for place in range(N_METRICS)
)
CONFIG = CanaryConfig(METRICS)


class Cost(NamedTuple):
    """Of one thing done once, in microseconds."""

    what: str
    best_us: float
    median_us: float
    target_us: float | None

    @property
    def is_cheap(self) -> bool:
        return self.target_us is None or self.best_us <= self.target_us


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("var/bench/ab_speed.json"))
    arguments = parser.parse_args()
    costs = measure(arguments.repeats)
    print(table_of(costs))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([cost._asdict() for cost in costs], indent=1) + "\n")
    raise SystemExit(int(not all(cost.is_cheap for cost in costs)))


def measure(repeats: int) -> list[Cost]:
    """Return what everything costs here and now."""
    users = outcomes(USERS_BEFORE + BATCH, np.random.default_rng(20_262))
    seen, new = running_state(users[:USERS_BEFORE]), users[USERS_BEFORE:]
    event = UserEvent(METRICS[-1].name, "", True, new[0].treatment_probability, LAST_STEP)
    health, route, units = Health(), canary_route(), iter(range(10**9))
    measured = [
        _cost("decision on 8 metrics", lambda: decide(seen, CONFIG, 1e4, health), repeats, 50, target=100.0),
        _cost(
            "update, 1 metric of 1 of 500 users", lambda: observe(seen, CONFIG, new), repeats, 1, N_UPDATES, UPDATE_US
        ),
        _cost("8 updates, a user alone", lambda: observe(seen, CONFIG, new[:1]), repeats, 50, 1, N_METRICS * UPDATE_US),
        _cost("event, one user's first", lambda: observe_events(seen, CONFIG, [event]), repeats, 50),
        _cost("assignment of a new user", lambda: assign(route, f"user-{next(units)}"), repeats, 500, target=3.0),
    ]
    return measured if gbstats_version() is None else [*measured, _gbstats_cost(users, repeats)]


def outcomes(n_users: int, rng: np.random.Generator) -> list[UserOutcome]:
    """Users of the last step whom nothing harms more than others."""
    w = treatment_probability(CONFIG.steps[LAST_STEP])
    sides = (rng.random(n_users) < w).tolist()
    harms = (rng.random((n_users, N_METRICS)) < HARM_RATE).astype(float).tolist()
    names = [metric.name for metric in METRICS]
    return [
        UserOutcome(f"user-{place}", side, w, dict(zip(names, harm, strict=True)), LAST_STEP)
        for place, (side, harm) in enumerate(zip(sides, harms, strict=True))
    ]


def running_state(users: Sequence[UserOutcome]) -> CanaryState:
    """A canary in its last step that has seen these users."""
    state = launch(CONFIG, 0.0)
    for _ in range(LAST_STEP):
        state = apply(state, CONFIG, override(state, CONFIG, "advance", "to the last step"), 0.0)
    return observe(state, CONFIG, users)


def canary_route() -> Route:
    """A route with a canary at a tenth of the traffic."""
    experiment = canary_experiment("speed", "salt", champion="old", candidate="new", weight=0.1, phase=1)
    return Route("assistant", 1, "old", experiment)


def gbstats_version() -> str | None:
    try:
        return version("gbstats")
    except PackageNotFoundError:
        return None


def table_of(costs: Sequence[Cost]) -> str:
    """Return one line per cost."""
    lines = [f"{'what':38} {'best us':>9} {'median us':>10} {'at most':>8}"]
    lines += [
        f"{cost.what:38} {cost.best_us:9.2f} {cost.median_us:10.2f} "
        + ("       -" if cost.target_us is None else f"{cost.target_us:8.0f}")
        for cost in costs
    ]
    return "\n".join(lines)


def _cost(
    what: str, run: Callable[[], object], repeats: int, calls: int, parts: int = 1, target: float | None = None
) -> Cost:
    """Time `calls` calls at a time; each does `parts` of what is counted."""
    run()
    spent = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(calls):
            run()
        spent.append((time.process_time() - started) * 1e6 / calls / parts)
    return Cost(what, min(spent), statistics.median(spent), target)


def _gbstats_cost(users: Sequence[UserOutcome], repeats: int) -> Cost:
    tests = import_module("gbstats.frequentist.tests")
    config = tests.SequentialConfig(difference_type="absolute", alpha=0.05, sequential_tuning_parameter=5000)
    pairs = [[_gbstats_ratio(users, name, side) for side in (False, True)] for name in users[0].values]

    def decide_all() -> list[Any]:
        return [tests.SequentialTwoSidedTTest(*pair, config).compute_result() for pair in pairs]

    return _cost(f"gbstats {gbstats_version()}, 8 metrics from sums", decide_all, repeats, 5)


def _gbstats_ratio(users: Sequence[UserOutcome], name: str, side: bool) -> Any:
    models = import_module("gbstats.models.statistics")
    harms = [user.values[name] or 0.0 for user in users if user.is_treatment == side]
    n, total = len(harms), float(sum(harms))
    return models.RatioStatistic(
        n=n,
        m_statistic=models.SampleMeanStatistic(n=n, sum=total, sum_squares=total),
        d_statistic=models.SampleMeanStatistic(n=n, sum=4.0 * n, sum_squares=20.0 * n),
        m_d_sum_of_products=4.0 * total,
    )


if __name__ == "__main__":
    main()
