"""PostgreSQL stopped under load, with keys required: `python -m bench.outage --minutes 10`.

Clients keep asking before, during and after. Nothing that was answered may be lost or stored twice, nobody may be told
that a good key is not one, and the gateway may not gather connections while it waits for the database.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.ledger import Ended, lost, read_client_logs, read_stored, settle
from bench.native_tools import EngineOptions, Load, compile_tools, write_bodies
from bench.pawl_gateway import make_key, pawl_configuration, pawl_serve
from bench.processes import ANYWHERE, family, n_descriptors
from pawl.database import open_database
from pawl.settings import DatabaseSettings
from tests.servers import PostgreSQL, free_port, private_postgresql

REPORT = Path("var/bench/outage.json")
ENGINE = EngineOptions(gap_us=2_000, service_us=5_000, n_chunks=32)
RATE = 100.0
"""Whole answers, and as many streams, per second."""
CONNECTIONS = 200
AROUND_S = 15.0
"""Of load before the outage and after it."""
LOOK_EVERY_S = 1.0
DRAIN_WITHIN_S = 600.0
DESCRIPTORS_MORE = 50
"""What the gateway may hold more during the outage than before: a pool's worth of connections, not one per request."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found."""

    outage_s: float
    asked: int
    acknowledged: int
    lost: int
    doubled: int
    mixed_records: int
    statuses: dict[str, int]
    not_answered: int
    """Requests that ended in any way but a whole answer."""
    descriptors_before: int
    descriptors_most: int
    caught_up_s: float
    """From the database's return until it had every record."""
    seconds: float

    @property
    def is_faultless(self) -> bool:
        """Whether everything was answered, and every answer is stored once."""
        is_bounded = self.descriptors_most <= self.descriptors_before + DESCRIPTORS_MORE
        return not (self.lost or self.doubled or self.mixed_records or self.not_answered) and is_bounded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 when anything was lost, doubled or refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long PostgreSQL stays away")
    parser.add_argument("--rate", type=float, default=RATE, help="whole answers, and as many streams, per second")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pawl-outage-") as directory, private_postgresql() as server:
        outcome = run(Path(directory), server, outage_s=60 * options.minutes, rate=options.rate)
    report = asdict(outcome) | {"is_faultless": outcome.is_faultless}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if outcome.is_faultless else 1


def run(directory: Path, server: PostgreSQL, *, outage_s: float, rate: float) -> Outcome:
    """Take the database away under load; hold what was answered against what it has at the end."""
    started = time.monotonic()
    tools = compile_tools()
    with tools.running_engine(ENGINE) as engine_port:
        configuration = pawl_configuration(
            directory,
            free_port(),
            [f"http://127.0.0.1:{engine_port}"],
            {},
            database_url=server.create_database("outage"),
        )
        headers = (f"authorization: Bearer {make_key(configuration)}",)
        with pawl_serve(configuration, directory, ANYWHERE) as pid:
            port = configuration["serving"]["port"]
            running = [tools.start_load(load) for load in loads(directory, port, headers, outage_s, rate)]
            before, most = _through_the_outage(server, pid, outage_s)
            returned = time.monotonic()
            results = [each.result() for each in running]
            acknowledged = [nonce for nonce, end in _ended(directory).items() if end.how == "ok"]
            database = open_database(DatabaseSettings(url=configuration["database"]["url"]))
            settle(database, lambda n: n >= len(acknowledged), within_s=DRAIN_WITHIN_S)
            caught_up_s = time.monotonic() - returned
        stored = read_stored(database)
        database.close()
    statuses = sum((Counter(result.statuses) for result in results), Counter[str]())
    return Outcome(
        outage_s=outage_s,
        asked=sum(result.started for result in results),
        acknowledged=len(acknowledged),
        lost=len(lost(acknowledged, stored)),
        doubled=stored.doubled,
        mixed_records=stored.n_mixed,
        statuses=dict(statuses),
        not_answered=sum(result.errors + result.refused for result in results),
        descriptors_before=before,
        descriptors_most=most,
        caught_up_s=caught_up_s,
        seconds=time.monotonic() - started,
    )


def loads(directory: Path, port: int, headers: tuple[str, ...], outage_s: float, rate: float) -> list[Load]:
    """Whole answers and streams, open loop, with numbers that do not overlap."""
    bodies = write_bodies(directory)
    seconds = 2 * AROUND_S + outage_s
    return [
        Load(
            port,
            CONNECTIONS,
            seconds,
            warmup_s=0.0,
            body=body,
            headers=headers,
            n_events=n_events,
            rate=rate,
            is_nonce_checked=True,
            log=directory / f"client-{index}.log",
            n_numbers=10**8,
            first_number=index * 10**7,
            seed=index + 1,
        )
        for index, (body, n_events) in enumerate(((bodies.whole, None), (bodies.stream, ENGINE.n_chunks)))
    ]


def _through_the_outage(server: PostgreSQL, pid: int, outage_s: float) -> tuple[int, int]:
    """Wait, stop the database, wait, start it; returns the descriptors held before, and the most while it was away."""
    time.sleep(AROUND_S)
    before = _descriptors(pid)
    server.stop()
    print(f"the database is away for {outage_s:g} s", file=sys.stderr, flush=True)
    most, until = 0, time.monotonic() + outage_s
    while time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        most = max(most, _descriptors(pid))
    server.start()
    print("it is back", file=sys.stderr, flush=True)
    return before, most


def _descriptors(pid: int) -> int:
    return sum(map(n_descriptors, family(pid)))


def _ended(directory: Path) -> dict[str, Ended]:
    return read_client_logs(directory.glob("client-*.log"))


if __name__ == "__main__":
    sys.exit(main())
