"""Clients that leave at every moment, a hundred thousand times: `python -m bench.cancellations --cancellations 100000`.

Each request carries a number of its own, which the fake engine sends back in every piece of its answer. Most clients
leave at a random moment: while they still send, while their request waits in line, before the first byte, or in the
middle of the stream. Then: no answer and no record may hold another request's number, the engine must have stopped
within a second, and the gateway must be as empty as before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx2

from bench.ledger import read_client_logs, read_engine_log, read_stored, settle, stop_delays_s
from bench.native_tools import EngineOptions, Load, LoadResult, Tools, compile_tools, write_bodies
from bench.pawl_gateway import make_key, pawl_configuration, pawl_serve
from bench.processes import ANYWHERE, n_descriptors, n_threads, worker_of
from pawl.database import open_database
from pawl.settings import DatabaseSettings
from tests.servers import free_port

REPORT = Path("var/bench/cancellations.json")
CONNECTIONS = 256
AT_ONCE = 128
"""Requests that the gateway sends to the engine at once; the other half waits in its queue."""
ENGINE = EngineOptions(gap_us=4_000, service_us=15_000, n_chunks=40)
STREAM_S = 0.18
ABANDON_SHARE = 0.9
ABANDON_WITHIN_S = 0.35
"""Longer than a stream takes in the gateway's queue and at the engine, so that no moment is left out."""
UPLOAD_SHARE = 0.2
MORE_NUMBERS = 1_000_000
"""Between the numbers of two parts: `started` leaves out what began outside the window."""
CHUNK_S = 20.0
"""The load runs in parts of so long until there are enough cancellations."""
STOPS_WITHIN_S = 1.0
EMPTY_WITHIN_S = 20.0
DRAIN_WITHIN_S = 600.0
GAUGES = ("pawl_requests_in_flight", "pawl_queue_waiting", "pawl_replica_requests_running")


@dataclass(frozen=True, slots=True)
class Level:
    """What a gateway holds at one moment."""

    descriptors: int
    threads: int
    gauges: float
    """Requests in flight, waiting and running, all together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found."""

    cancellations: int
    by_moment: dict[str, int]
    answered: int
    foreign_answers: int
    """Answers with another request's number."""
    mixed_records: int
    errors: dict[str, int]
    stored: int
    doubled: int
    seen_by_engine: int
    """Of the cancelled, those the engine had begun."""
    stop_p50_s: float
    stop_p99_s: float
    stop_max_s: float
    before: Level
    after: Level
    serves_after: bool
    """As many requests at once as before are answered."""
    seconds: float

    @property
    def is_faultless(self) -> bool:
        """Whether nothing was mixed up, left running or left open."""
        is_empty = self.after.gauges == 0 and self.after.descriptors <= self.before.descriptors + AT_ONCE
        is_clean = not (self.foreign_answers or self.mixed_records or self.doubled or any(self.errors.values()))
        return is_clean and is_empty and self.serves_after and self.stop_max_s <= STOPS_WITHIN_S


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 when anything was mixed up or left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancellations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lane", choices=("fast", "asgi"), default="fast")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pawl-cancel-") as directory:
        outcome = run(Path(directory), options.cancellations, options.seed, is_fast_lane=options.lane == "fast")
    report = asdict(outcome) | {"lane": options.lane, "is_faultless": outcome.is_faultless}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if outcome.is_faultless else 1


def run(directory: Path, cancellations: int, seed: int, *, is_fast_lane: bool) -> Outcome:
    """Cancel so many requests; compare what everybody saw."""
    started = time.monotonic()
    tools, engine_log = compile_tools(), directory / "engine.log"
    with tools.running_engine(replace(ENGINE, log=engine_log)) as engine_port:
        serving = {"fast_lane": is_fast_lane, "replicas": {"max_concurrency": AT_ONCE}}
        configuration = pawl_configuration(directory, free_port(), [f"http://127.0.0.1:{engine_port}"], serving)
        headers = (f"authorization: Bearer {make_key(configuration)}",)
        with pawl_serve(configuration, directory, ANYWHERE) as pid:
            gateway = Gateway(configuration["serving"]["port"], pid, headers, tools, directory)
            gateway.ask(AT_ONCE, seconds=1.0)  # so that every lazy part is there and the pool is full
            before = gateway.wait_until_empty()
            results = gateway.cancel(cancellations, seed)
            after = gateway.wait_until_empty()
            serves_after = gateway.ask(AT_ONCE, seconds=2.0).errors == 0
            httpx2.get(f"http://127.0.0.1:{engine_port}/stats")  # writes out its log
            database = open_database(DatabaseSettings(url=configuration["database"]["url"]))
            n_answered = sum(result.ok for result in results)
            settle(database, lambda n: n >= n_answered, within_s=DRAIN_WITHIN_S)
        # A gateway that stops brings the last records over.
        stored = read_stored(database)
        database.close()
    ended = read_client_logs(directory.glob("client-*.log"))
    delays = sorted(stop_delays_s(ended, read_engine_log(engine_log))) or [0.0]
    moments = Counter(end.how for end in ended.values())
    answered = moments.pop("ok", 0)
    return Outcome(
        cancellations=sum(moments.values()),
        by_moment=dict(moments),
        answered=answered,
        foreign_answers=sum(result.foreign for result in results),
        mixed_records=stored.n_mixed,
        errors=_errors(results),
        stored=len(stored.rows),
        doubled=stored.doubled,
        seen_by_engine=len(delays),
        stop_p50_s=delays[len(delays) // 2],
        stop_p99_s=delays[len(delays) * 99 // 100],
        stop_max_s=delays[-1],
        before=before,
        after=after,
        serves_after=serves_after,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway under test."""

    port: int
    pid: int
    headers: tuple[str, ...]
    tools: Tools
    directory: Path
    far_numbers: Iterator[int] = field(default_factory=lambda: itertools.count(5 * 10**7, MORE_NUMBERS))
    """Beyond those of the cancelled."""

    def ask(self, connections: int, *, seconds: float) -> LoadResult:
        """Clients that stay until they are answered."""
        bodies = write_bodies(self.directory)
        load = Load(
            self.port,
            connections,
            seconds,
            warmup_s=0.5,
            body=bodies.stream,
            headers=self.headers,
            n_events=ENGINE.n_chunks,
            n_numbers=10**8,
            first_number=next(self.far_numbers),
        )
        return self.tools.run_load(load)

    def cancel(self, cancellations: int, seed: int) -> list[LoadResult]:
        """Clients that mostly do not, until there were enough of them."""
        results: list[LoadResult] = []
        while sum(result.abandoned for result in results) < cancellations:
            part = len(results)
            asked = sum(result.started for result in results) + part * MORE_NUMBERS
            results.append(self.tools.run_load(self._cancelling(part, asked, seed + part)))
            print(f"part {part}: {results[-1].abandoned} cancelled, {results[-1].ok} answered", file=sys.stderr)
        return results

    def _cancelling(self, part: int, first_number: int, seed: int) -> Load:
        bodies = write_bodies(self.directory)
        return Load(
            self.port,
            CONNECTIONS,
            CHUNK_S,
            warmup_s=0.0,
            body=bodies.stream,
            headers=self.headers,
            n_events=ENGINE.n_chunks,
            abandon_share=ABANDON_SHARE,
            abandon_within_s=ABANDON_WITHIN_S,
            upload_share=UPLOAD_SHARE,
            is_nonce_checked=True,
            log=self.directory / f"client-{part}.log",
            n_numbers=10**8,
            first_number=first_number,
            seed=seed,
        )

    def wait_until_empty(self) -> Level:
        """The level once nothing is in flight any more, or after a while what is left."""
        deadline = time.monotonic() + EMPTY_WITHIN_S
        while (level := self.level()).gauges and time.monotonic() < deadline:
            time.sleep(0.5)
        return level

    def level(self) -> Level:
        """What it holds now."""
        name, value = self.headers[0].split(": ", 1)
        text = httpx2.get(f"http://127.0.0.1:{self.port}/metrics", headers={name: value}).text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(GAUGES)]
        worker = worker_of(self.pid)
        return Level(n_descriptors(worker), n_threads(worker), sum(float(sample[1]) for sample in samples))


def _errors(results: Sequence[LoadResult]) -> dict[str, int]:
    names = ("bad_status", "cut", "bad_body", "timed_out", "not_connected", "stray", "refused")
    return {name: sum(getattr(result, name) for result in results) for name in names}


if __name__ == "__main__":
    sys.exit(main())
