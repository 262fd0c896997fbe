"""What a look at a canary costs once it has left a million interactions: `python -m bench.rollout_tick`.

Each database gets users who come anew all the time and come back some twenty times, half of them analysed. Then the
controller ticks while a few hundred interactions come in between two ticks, and for comparison everything is read
again, as a controller would that remembers nothing but whom it has counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from ab_testing.assignment import treatment_probability
from ab_testing.canary_state import launch
from ab_testing.controller import Controller, route_of
from ab_testing.experiment import CONTROL, TREATMENT, Route
from ab_testing.outcomes import Matured, matured_users
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import Reading, Rollout, get_rollout, insert_rollout
from feedback.store import experiment_rows
from pawl.database import Database, open_database, upgrade
from pawl.schema import interactions, scores
from pawl.settings import DatabaseSettings, RolloutSettings
from tests.servers import private_postgresql

OUT = Path("var/bench/rollout_tick.json")
START = 1_700_000_000.0
SPAN_S = 13 * 86_400.0
TICK_S = 10.0
ALIAS, CANARY = "assistant", "ro_bench"
VISITS = 20
"""Of each user."""
AT_ONCE = 500
"""Users who come and go at the same time."""
WEIGHT = 0.1
PHASE = 1


class Cost(NamedTuple):
    """How long looks took, in milliseconds."""

    name: str
    what: str
    n_looks: int
    median_ms: float
    worst_ms: float


def main() -> None:
    """Measure on the databases asked for; exit 1 if a tick found something else than reading everything."""
    given = arguments()
    costs = [cost for name in given.databases for cost in measure(name, given.rows, given.new, given.ticks)]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([cost._asdict() for cost in costs], indent=1))
    table = Table("database", "look", "looks", "median ms", "worst ms", box=None, header_style="bold")
    for cost in costs:
        table.add_row(cost.name, cost.what, str(cost.n_looks), f"{cost.median_ms:.1f}", f"{cost.worst_ms:.1f}")
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000, help="interactions before the first tick")
    parser.add_argument("--new", type=int, default=300, help="interactions between two ticks")
    parser.add_argument("--ticks", type=int, default=20)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    return parser.parse_args()


def measure(name: str, n_rows: int, n_new: int, n_ticks: int) -> Iterator[Cost]:
    """Costs on one database."""
    with database_of(name) as database:
        rollout = begin(database, n_rows)
        told = time.monotonic()
        print(f"{name}: {n_rows} interactions stored", file=sys.stderr)
        spent: list[float] = []
        for number in range(n_ticks):
            now = tell(database, n_rows + number * n_new, n_new, number)
            controller = Controller(database, clock=lambda moment=now: moment)  # type: ignore[misc]
            spent.append(timed(lambda: controller.tick(ALIAS, epoch=0)))  # noqa: B023 - called at once
        yield cost_of(name, "what is new", spent)
        found = get_rollout(database, rollout.id)
        everything: list[float] = []
        counted = read_everything(database, rollout, now, everything)
        yield cost_of(name, "everything", everything)
        n_users = sum(count.control + count.treatment for count in found.state.phases)
        if (n_users, found.cursor) != (len(counted.outcomes), counted.cursor):
            sys.exit(f"{name}: {n_users} users were counted up to {found.cursor}, {len(counted.outcomes)} should be")
        print(f"{name}: done in {time.monotonic() - told:.0f} s", file=sys.stderr)


def read_everything(database: Database, rollout: Rollout, now: float, spent: list[float]) -> Matured:
    """The users of all ticks at once, from all records."""
    found: list[Matured] = []

    def look() -> None:
        rows = experiment_rows(database, rollout.id)
        found.append(
            matured_users(
                rows,
                dict(zones(database)),
                rollout.config.metrics,
                cursor=rollout.cursor,
                maturity_s=rollout.maturity_s,
                now=now,
            )
        )

    spent.append(timed(look))
    return found[0]


def zones(database: Database) -> Iterator[tuple[str, bool]]:
    """Each unit's first exposure, the earliest last of all, so that it stands in a mapping."""
    i = interactions.c
    query = sa.select(i.unit_id, i.is_analysed).where(i.experiment == CANARY)
    with database.read() as connection:
        for unit_id, is_analysed in connection.execute(query.order_by(i.created_at.desc(), i.id.desc())):
            yield unit_id, bool(is_analysed)


def timed(look: Callable[[], object]) -> float:
    started = time.perf_counter()
    look()
    return 1000 * (time.perf_counter() - started)


def cost_of(name: str, what: str, spent: list[float]) -> Cost:
    cost = Cost(name, what, len(spent), statistics.median(spent), max(spent))
    print(f"{name}, {what}: median {cost.median_ms:.1f} ms over {len(spent)}", file=sys.stderr)
    return cost


@contextmanager
def database_of(name: str) -> Iterator[Database]:
    """An empty one with the current schema."""
    with ExitStack() as stack:
        if name == "sqlite":
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pawl-tick-"))
            url = f"sqlite:///{directory}/pawl.db"
        else:
            url = stack.enter_context(private_postgresql()).create_database("tick")
        database = stack.enter_context(closing(open_database(DatabaseSettings(url=url))))
        upgrade(database)
        yield database


def begin(database: Database, n_rows: int) -> Rollout:
    """A rollout in its second step that has counted everybody so far, and the records of it."""
    config = canary_config(RolloutSettings(maturity_s=TICK_S))
    end = START + SPAN_S
    rollout = Rollout(
        CANARY, ALIAS, "base", "base--r0001", config, launch(config, START), TICK_S, (end, ""), START, START,
        Reading(end, end),
    )  # fmt: skip
    insert_rollout(database, rollout, route_of(rollout, Route(ALIAS, 0, "base"), salt="bench"), epoch=0)
    with database.write() as connection:
        store(connection, 0, n_rows, START, SPAN_S)
    if not database.is_sqlite:  # Which PostgreSQL does by itself, in time.
        with database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE")
    return rollout


def tell(database: Database, n_before: int, n_new: int, tick: int) -> float:
    """What comes in between two ticks; returns when the next look is."""
    since = START + SPAN_S + tick * TICK_S
    with database.write() as connection:
        store(connection, n_before, n_new, since, TICK_S)
    return since + TICK_S


def store(connection: sa.Connection, n_before: int, n_rows: int, since: float, span_s: float) -> None:
    """Interactions and their scores, made by the database itself."""
    numbers = sa.select(sa.literal(n_before + 1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < n_before + n_rows))
    n = numbers.c.n
    at = since + span_s * sa.cast(n - n_before, sa.Double) / n_rows
    # Who comes moves on slowly, so that new users come all the time, and everybody comes back.
    user = sa.cast(n / VISITS, sa.Integer) + (n % AT_ONCE * 7919) % AT_ONCE
    place = user % 100
    likely = treatment_probability(WEIGHT)
    variant = sa.case((place < 100 * WEIGHT, TREATMENT), else_=CONTROL)
    values = {
        "id": sa.cast(n, sa.String), "completion_id": sa.cast(n, sa.String), "route": "chat.completions",
        "created_at": at, "alias": ALIAS, "key_id": "", "unit_id": "user-" + sa.cast(user, sa.String),
        "experiment": CANARY, "assigned_variant": variant, "served_variant": variant,
        "probability": sa.case((place < 100 * WEIGHT, likely), else_=1 - likely),
        "is_analysed": place < 100 * (WEIGHT + 0.5), "phase": PHASE, "route_version": 1, "model": "base",
        "completion": '{"role": "assistant", "content": "Yes."}', "status": "ok", "http_status": 200,
        "is_complete": True, "is_stored": True, "latency_ms": 10.0,
    }  # fmt: skip
    columns = [value if isinstance(value, sa.ColumnElement) else sa.literal(value) for value in values.values()]
    connection.execute(interactions.insert().from_select(list(values), sa.select(*columns).select_from(numbers)))
    scored = sa.select(
        sa.cast(n, sa.String), sa.literal(0.01), n % 997 == 0, sa.literal("comply"), sa.false(), sa.literal("x"), at
    ).select_from(numbers)
    names = ["interaction_id", "toxicity", "is_toxic", "response", "is_harmful_prompt", "scorer", "scored_at"]
    connection.execute(scores.insert().from_select(names, scored))


if __name__ == "__main__":
    main()
