"""Twenty minutes of mixed traffic at 30 % of what the gateway can do: `python -m bench.soak --minutes 20`.

Whole answers and paced streams, kept and not kept; one client in ten leaves early and one request in twenty meets an
engine that fails. Looks at memory, threads and descriptors of every process of the gateway, and fits a line to the
worker's memory after the warm-up: nothing may grow. Of descriptors the fewest are compared, in the last third of that
time and before: open requests come and go, and only what leaks is there in every look.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bench.native_tools import Bodies, EngineOptions, Load, LoadResult, RunningLoad, Tools, compile_tools, write_bodies
from bench.pawl_gateway import make_key, pawl_configuration, pawl_serve
from bench.processes import Seat, choose_cores, cost_of, family, n_descriptors, n_threads, worker_of
from tests.servers import free_port

REPORT = Path("var/bench/soak.json")
ENGINE = EngineOptions(gap_us=2_000, service_us=5_000, n_chunks=64, fail_every=20)
SHARE = 0.3
STORED_SHARE = 0.1
"""Of the requests, those whose text is kept; the rest say `store: false`, so that the disk lasts for the whole run."""
ABANDON_SHARE = 0.1
WARMUP_SHARE = 0.25
"""Of the run, at its start: left out of the fit."""
LOOK_EVERY_S = 5.0
SLOPE_MB_PER_H = 1.0
LEAST_MINUTES = 10.0
"""In less time a slope says nothing: one page more after the warm-up is megabytes per hour."""
CALIBRATION_S, MIX_S = 4.0, 8.0
TRIED_SHARE = 0.25
"""Of the load that what it can do at most suggests, to see what it costs when it comes bit by bit."""
SETTLE_S = 0.5
"""At the start and at the end of the mix that is tried."""
THREADS_MORE, DESCRIPTORS_MORE = 2, 16
END_SHARE = 1 / 3
"""Of the time after the warm-up, at its end."""
MB = 1e6


class Look(NamedTuple):
    """The gateway at one moment."""

    at_s: float
    worker_mb: float
    all_mb: float
    threads: int
    descriptors: int


class Floor(NamedTuple):
    """The fewest descriptors before the last part of the run, and in it."""

    before: int
    at_the_end: int

    @property
    def is_level(self) -> bool:
        return self.at_the_end - self.before <= DESCRIPTORS_MORE


class Line(NamedTuple):
    """A straight line through the worker's memory."""

    mb_per_h: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found."""

    minutes: float
    whole_per_s: float
    streams_per_s: float
    answered: int
    abandoned: int
    statuses: dict[str, int]
    engine_failures: int
    """Answers that are not whole, as the fake engine was told to fail."""
    unexpected: int
    core_share: float
    worker_mb_first: float
    worker_mb_last: float
    slope_mb_per_h: float
    slope_standard_error: float
    all_slope_mb_per_h: float
    threads: tuple[int, int]
    """The fewest and the most after the warm-up."""
    descriptors: tuple[int, int]
    descriptors_floor: Floor
    looks: tuple[Look, ...]

    @property
    def is_faultless(self) -> bool:
        """Whether nothing grew and nothing failed that was not told to."""
        is_flat = self.threads[1] - self.threads[0] <= THREADS_MORE and self.descriptors_floor.is_level
        is_level = self.slope_mb_per_h < SLOPE_MB_PER_H or self.minutes < LEAST_MINUTES
        return is_level and is_flat and self.unexpected == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 when something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--share", type=float, default=SHARE, help="of the gateway's capacity")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pawl-soak-") as directory:
        outcome = run(Path(directory), 60 * options.minutes, options.share)
    report = asdict(outcome) | {"is_faultless": outcome.is_faultless}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "looks"}, indent=1))
    return 0 if outcome.is_faultless else 1


def run(directory: Path, seconds: float, share: float) -> Outcome:
    """Find out what it can do, then keep it at that share of it."""
    cores = choose_cores(os.sched_getaffinity(0))
    tools = replace(compile_tools(), engine_seat=Seat(cores.engine), load_seat=Seat(cores.load))
    port, engine_port = free_port(), free_port()
    configuration = pawl_configuration(directory, port, [f"http://127.0.0.1:{engine_port}"], {})
    headers = (f"authorization: Bearer {make_key(configuration)}",)
    with pawl_serve(configuration, directory, Seat(cores.gateway)) as pid:
        soak = Soak(tools, port, headers, write_bodies(directory), write_bodies(directory, is_stored=False))
        # How many streams weigh as much as a whole answer, and how much at most. Chunks that come bit by bit, failures
        # and departures cost more than that: what a little of the mix takes is the measure.
        with tools.running_engine(EngineOptions(is_written_singly=True), engine_port):
            whole, streams = soak.capacity()
        with tools.running_engine(ENGINE, engine_port):
            tried = share * TRIED_SHARE / 2
            taken = soak.share_taken(pid, whole * tried, streams * tried)
            running = soak.start(seconds, whole * tried * share / taken, streams * tried * share / taken)
            started, before = time.monotonic(), cost_of(pid)
            looks = _watch(pid, seconds)
            core_share = (cost_of(pid).cpu_s - before.cpu_s) / (time.monotonic() - started)
            results = [each.result() for each in running]
    return _outcome(seconds, looks, results, core_share)


@dataclass(frozen=True, slots=True)
class Soak:
    """The loads."""

    tools: Tools
    port: int
    headers: tuple[str, ...]
    stored: Bodies
    unstored: Bodies

    def capacity(self) -> tuple[float, float]:
        """Whole answers and streams per second when there is nothing but the one or the other."""
        load = Load(self.port, 64, CALIBRATION_S, headers=self.headers)
        whole = self.tools.run_load(replace(load, body=self.unstored.whole))
        streams = self.tools.run_load(replace(load, body=self.unstored.stream, n_events=ENGINE.n_chunks))
        return whole.per_s, streams.per_s

    def share_taken(self, pid: int, whole_per_s: float, streams_per_s: float) -> float:
        """Of the gateway's core, by this much of the mix."""
        running = self.start(MIX_S, whole_per_s, streams_per_s)
        time.sleep(SETTLE_S)
        started, before = time.monotonic(), cost_of(pid)
        time.sleep(MIX_S - 2 * SETTLE_S)
        taken = (cost_of(pid).cpu_s - before.cpu_s) / (time.monotonic() - started)
        for each in running:
            each.result()
        return taken

    def start(self, seconds: float, whole_per_s: float, streams_per_s: float) -> list[RunningLoad]:
        """Four open loops: whole answers and streams, kept and not kept."""
        load = Load(
            self.port,
            connections=2000,
            seconds=seconds,
            warmup_s=0.0,
            headers=self.headers,
            abandon_share=ABANDON_SHARE,
            upload_share=0.1,
        )
        whole_s, stream_s = ENGINE.service_us / 1e6, (ENGINE.service_us + ENGINE.n_chunks * ENGINE.gap_us) / 1e6
        loads = [
            part
            for bodies, kept in ((self.stored, STORED_SHARE), (self.unstored, 1 - STORED_SHARE))
            for part in (
                replace(load, body=bodies.whole, rate=whole_per_s * kept, abandon_within_s=whole_s),
                replace(
                    load,
                    body=bodies.stream,
                    rate=streams_per_s * kept,
                    n_events=ENGINE.n_chunks,
                    abandon_within_s=stream_s,
                ),
            )
        ]
        return [self.tools.start_load(replace(part, seed=seed)) for seed, part in enumerate(loads)]


def _watch(pid: int, seconds: float) -> list[Look]:
    started, looks = time.monotonic(), list[Look]()
    while (at_s := time.monotonic() - started) < seconds:
        cost, members = cost_of(pid), family(pid)
        worker = worker_of(pid)
        looks.append(
            Look(
                at_s,
                cost.resident_bytes / MB,
                cost.resident_bytes_of_all / MB,
                sum(map(n_threads, members)),
                n_descriptors(worker),
            )
        )
        time.sleep(min(LOOK_EVERY_S, seconds / 20))
    return looks


def fit(looks: Sequence[tuple[float, float]]) -> Line:
    """Least squares through (seconds, MB): the slope per hour, and its standard error for independent deviations.

    >>> round(fit([(0.0, 10.0), (1800.0, 11.0), (3600.0, 12.0)]).mb_per_h, 6)
    2.0
    """
    n = len(looks)
    mean_at, mean_mb = sum(at for at, _ in looks) / n, sum(mb for _, mb in looks) / n
    spread = sum((at - mean_at) ** 2 for at, _ in looks)
    slope = sum((at - mean_at) * (mb - mean_mb) for at, mb in looks) / spread
    rest = sum((mb - mean_mb - slope * (at - mean_at)) ** 2 for at, mb in looks)
    error = math.sqrt(rest / (n - 2) / spread) if n > 2 else math.inf
    return Line(3600 * slope, 3600 * error)


def floor_of(looks: Sequence[tuple[float, int]]) -> Floor:
    """The fewest descriptors of (seconds, descriptors), early and late.

    A machine that stood still lets requests pile up, and that is no leak; what is never closed is.

    >>> floor_of([(0.0, 60), (10.0, 950), (20.0, 900), (30.0, 61)]).is_level
    True
    >>> floor_of([(0.0, 60), (10.0, 70), (20.0, 80), (30.0, 90)])
    Floor(before=60, at_the_end=80)
    """
    ends_from = looks[-1][0] - END_SHARE * (looks[-1][0] - looks[0][0])
    early = [descriptors for at_s, descriptors in looks if at_s < ends_from]
    late = [descriptors for at_s, descriptors in looks if at_s >= ends_from]
    return Floor(min(early), min(late))


def _outcome(seconds: float, looks: Sequence[Look], results: Sequence[LoadResult], core_share: float) -> Outcome:
    warm = [look for look in looks if look.at_s >= WARMUP_SHARE * seconds]
    line = fit([(look.at_s, look.worker_mb) for look in warm])
    statuses = sum((Counter(result.statuses) for result in results), Counter[str]())
    unexpected = ("foreign", "timed_out", "not_connected", "unsent", "stray", "refused", "unfinished")
    threads, descriptors = [look.threads for look in warm], [look.descriptors for look in warm]
    return Outcome(
        minutes=seconds / 60,
        whole_per_s=results[0].per_s + results[2].per_s,
        streams_per_s=results[1].per_s + results[3].per_s,
        answered=sum(result.ok for result in results),
        abandoned=sum(result.abandoned for result in results),
        statuses=dict(statuses),
        engine_failures=sum(result.bad_status + result.bad_body + result.cut for result in results),
        unexpected=sum(getattr(result, name) for result in results for name in unexpected),
        core_share=core_share,
        worker_mb_first=warm[0].worker_mb,
        worker_mb_last=warm[-1].worker_mb,
        slope_mb_per_h=line.mb_per_h,
        slope_standard_error=line.standard_error,
        all_slope_mb_per_h=fit([(look.at_s, look.all_mb) for look in warm]).mb_per_h,
        threads=(min(threads), max(threads)),
        descriptors=(min(descriptors), max(descriptors)),
        descriptors_floor=floor_of([(look.at_s, look.descriptors) for look in warm]),
        looks=tuple(looks),
    )


if __name__ == "__main__":
    sys.exit(main())
