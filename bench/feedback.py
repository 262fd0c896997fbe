"""How much feedback one gateway process takes in, durably, on SQLite: `python -m bench.feedback --rounds 3`.

The gateway has one core to itself, the load generator another. Each round rates completions that the database has and
completions that it does not have yet, and beside them asks for the gateway's health and for completions, in an order
drawn anew. Every vote is on another completion, and is on disk before it is answered. At the end the votes that were
acknowledged are looked for in the database.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from bench.native_tools import EngineOptions, Load, LoadResult, Tools, compile_tools, write_bodies
from bench.pawl_gateway import ALIAS, make_key, pawl_configuration, pawl_serve
from bench.processes import Seat, choose_cores, cost_of, prefer
from feedback.recording import Exchange, parse_interaction
from feedback.store import interaction_row, save_records
from pawl import ids
from pawl.api_keys import parse_credential
from pawl.clock import now
from pawl.database import Database, open_database
from pawl.schema import feedback_events
from pawl.secrets import signing_secret
from pawl.settings import AuthSettings, DatabaseSettings
from tests.servers import free_port

OUT = Path("var/bench/feedback.json")
WANTED_PER_S = 2000.0
"""What one process must hold, to the issue that asked for it."""
CONNECTIONS = 64
MOST_PER_S = 8000
"""Of votes that are made ready, so that none is sent twice."""
WARM_UP_S = 0.5
BATCH_ROWS = 1000
DRAINED_WITHIN_S = 300.0
N_USERS = 5000
STORED, KEYED, EARLY = "feedback", "feedback, with a key", "feedback, early"
"""On completions that the database has, without and with an `Idempotency-Key`; on those that it does not have yet."""
HEALTH, COMPLETIONS = "health", "completions"
MEASURES = (STORED, KEYED, EARLY, HEALTH, COMPLETIONS)
VOTES = frozenset({STORED, KEYED, EARLY})
QUICK: dict[str, Any] = {"rounds": 1, "seconds": 1.5, "most_per_s": 2000}
"""To see that everything works, not to quote."""


class Sample(NamedTuple):
    """One window."""

    measure: str
    load: LoadResult
    core_share: float
    """Of the gateway's core that its processes used."""


@dataclass(frozen=True)
class Place:
    """A running gateway and all that is needed to put a load on it."""

    tools: Tools
    directory: Path
    port: int
    pid: int
    key: str
    secret: bytes
    database: Database


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 for errors, lost votes or (but for a quick run) too few requests a second."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with tempfile.TemporaryDirectory(prefix="pawl-feedback-") as directory:
        samples, lost, drained_s = run(options, Path(directory))
    show(samples, lost, drained_s)
    write(options.out, samples, lost, drained_s)
    is_quick_enough = options.quick or median_per_s(samples, STORED) >= WANTED_PER_S
    return 0 if lost == 0 and is_quick_enough and not any(sample.load.errors for sample in samples) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each window")
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--most-per-s", type=int, default=MOST_PER_S, help="for how many votes a second to prepare")
    parser.add_argument("--quick", action="store_true", help="one short round, no threshold")
    parser.add_argument("--nice", type=int, default=0, help="of all that is measured; -15 where others use the machine")
    parser.add_argument("--seed", type=int, default=20_264, help="of the order in which things are measured")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


def run(options: argparse.Namespace, directory: Path) -> tuple[list[Sample], int, float]:
    """Every round; then how many acknowledged votes are missing, and how long the last ones took to arrive."""
    rng = random.Random(options.seed)
    samples: list[Sample] = []
    n_acknowledged = 0
    with running_gateway(options, directory) as place:
        for _ in range(options.rounds):
            for measure in rng.sample(MEASURES, len(MEASURES)):
                sample = measured(place, measure, options)
                samples.append(sample)
                n_acknowledged += sample.load.ok if measure in VOTES else 0
                print(line_of(sample), file=sys.stderr, flush=True)
        started = time.monotonic()
        n_stored = wait_for_votes(place.database, n_acknowledged)
        return samples, max(0, n_acknowledged - n_stored), time.monotonic() - started


@contextmanager
def running_gateway(options: argparse.Namespace, directory: Path) -> Iterator[Place]:
    """`pawl serve` on a core of its own, before a fake engine, with keys required."""
    usable, cores = os.sched_getaffinity(0), choose_cores(os.sched_getaffinity(0))
    load_seat = Seat(cores.load, options.nice)
    tools = replace(compile_tools(), engine_seat=Seat(cores.engine, options.nice), load_seat=load_seat)
    port = free_port()
    os.sched_setaffinity(0, {cores.load})
    prefer(os.getpid(), options.nice)
    try:
        with tools.running_engine(EngineOptions()) as engine_port:
            configuration = pawl_configuration(directory, port, [f"http://127.0.0.1:{engine_port}"], {})
            key = make_key(configuration)
            with pawl_serve(configuration, directory, Seat(cores.gateway, options.nice)) as pid:
                secret = signing_secret(AuthSettings(), Path(configuration["state_dir"]))
                database = open_database(DatabaseSettings(url=configuration["database"]["url"]))
                yield Place(tools, directory, port, pid, key, secret, database)
                database.close()
    finally:
        os.sched_setaffinity(0, usable)
        prefer(os.getpid(), 0)


def measured(place: Place, measure: str, options: argparse.Namespace) -> Sample:
    """One window of one load."""
    load = load_of(place, measure, options)
    before, started = cost_of(place.pid).cpu_s, time.monotonic()
    result = place.tools.run_load(load)
    return Sample(measure, result, (cost_of(place.pid).cpu_s - before) / (time.monotonic() - started))


def load_of(place: Place, measure: str, options: argparse.Namespace) -> Load:
    """What is sent; votes are made ready first."""
    headers = (f"authorization: Bearer {place.key}",)
    load = Load(place.port, options.connections, options.seconds, WARM_UP_S, headers=headers)
    if measure == HEALTH:
        return replace(load, path="/health/live", expect='"ok"')
    if measure == COMPLETIONS:
        return replace(load, body=write_bodies(place.directory).whole, expect='"finish_reason"', min_bytes=700)
    n_votes = int(options.most_per_s * (options.seconds + WARM_UP_S))
    rated = make_completions(place, n_votes, is_stored=measure != EARLY)
    if measure == KEYED:
        load = replace(load, headers=(*headers, f"idempotency-key: {os.urandom(4).hex()}-@@@@@@@@"))
    votes = write_votes(place.directory, rated)
    return replace(load, path="/v1/feedback", bodies=votes, n_numbers=n_votes, expect='"feedback"')


def make_completions(place: Place, n: int, *, is_stored: bool) -> list[str]:
    """Suffixes of genuine ids; the database has the completions, or has not seen them yet."""
    key = parse_credential(place.key)
    assert key is not None
    owners = [ids.Principal(key.id, f"user-{number % N_USERS:08}") for number in range(n)]
    at = now()
    made = [ids.make_completion_suffix(place.secret, ids.uuid7(at, os.urandom(10)), owner) for owner in owners]
    if is_stored:
        for start in range(0, n, BATCH_ROWS):
            part = zip(made[start : start + BATCH_ROWS], owners[start : start + BATCH_ROWS], strict=True)
            save_records(place.database, [row_of(suffix, owner, at) for suffix, owner in part], [], [])
    return made


def row_of(suffix: str, owner: ids.Principal, at: float) -> dict[str, Any]:
    """An interaction as the drain would have written it."""
    facts = Exchange(
        id=suffix,
        completion_id=f"chatcmpl-{suffix}",
        route="chat.completions",
        created_at=at,
        alias=ALIAS,
        key_id=owner.key_id,
        user_id=owner.user,
        unit_id=f"{owner.key_id}/{owner.user}",
        experiment=None,
        assigned_variant="control",
        served_variant="control",
        probability=1.0,
        is_analysed=True,
        phase=0,
        route_version=0,
        model="base-model",
        regenerate_of=None,
        is_stream=False,
        is_stored=True,
    )
    question = {"model": ALIAS, "messages": [{"role": "user", "content": "How do I water a fern?"}]}
    answer = {"choices": [{"index": 0, "message": {"content": "Keep it moist."}, "finish_reason": "stop"}]}
    return interaction_row(parse_interaction(facts, json.dumps(question).encode(), json.dumps(answer).encode()))


def write_votes(directory: Path, rated: Sequence[str]) -> Path:
    """A body per line, all equally long, as the load generator wants them."""
    path = directory / "votes"
    with path.open("w") as file:
        for number, suffix in enumerate(rated):
            vote = {
                "completion_id": f"chatcmpl-{suffix}",
                "type": "thumbs",
                "value": "up" if number % 3 else "down",
                "user": f"user-{number % N_USERS:08}",
            }
            file.write(json.dumps(vote).ljust(180) + "\n")
    return path


def wait_for_votes(database: Database, n: int) -> int:
    """Votes in the database, once there are `n` or waiting is over."""
    deadline, found = time.monotonic() + DRAINED_WITHIN_S, -1
    while found < n and time.monotonic() < deadline:
        time.sleep(0.2)
        with database.read() as connection:
            counted = connection.execute(sa.select(sa.func.count()).select_from(feedback_events))
            found = int(counted.scalar_one())
    return found


def median_per_s(samples: Sequence[Sample], measure: str) -> float:
    return statistics.median(sample.load.per_s for sample in samples if sample.measure == measure)


def line_of(sample: Sample) -> str:
    """One line while it runs."""
    load = sample.load
    errors = f"  ERRORS {load.errors} {dict(load.statuses)}" if load.errors else ""
    p99_ms = load.latency.p99_us / 1000
    return (
        f"{sample.measure:20} {load.per_s:9,.1f}/s  p99 {p99_ms:8.2f} ms  core {100 * sample.core_share:4.0f} %{errors}"
    )


def show(samples: Sequence[Sample], lost: int, drained_s: float) -> None:
    """The table."""
    table = Table("what", "requests/s", "p50 ms", "p99 ms", "core", "errors", box=None, header_style="bold")
    for measure in MEASURES:
        own = [sample for sample in samples if sample.measure == measure]
        table.add_row(
            measure,
            f"{median_per_s(own, measure):,.0f}",
            f"{statistics.median(sample.load.latency.p50_us for sample in own) / 1000:.2f}",
            f"{statistics.median(sample.load.latency.p99_us for sample in own) / 1000:.2f}",
            f"{100 * statistics.median(sample.core_share for sample in own):.0f} %",
            str(sum(sample.load.errors for sample in own)),
        )
    console = Console()
    console.print(table)
    console.print(f"acknowledged and not in the database: {lost}; the last one was there after {drained_s:.1f} s")


def write(out: Path, samples: Sequence[Sample], lost: int, drained_s: float) -> None:
    """Every figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = [
        {
            "measure": sample.measure,
            "per_s": sample.load.per_s,
            "p50_ms": sample.load.latency.p50_us / 1000,
            "p99_ms": sample.load.latency.p99_us / 1000,
            "core_share": sample.core_share,
            "errors": sample.load.errors,
            "statuses": dict(sample.load.statuses),
        }
        for sample in samples
    ]
    out.write_text(json.dumps({"samples": raw, "lost": lost, "drained_s": drained_s}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
