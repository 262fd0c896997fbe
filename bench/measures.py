"""What is measured of a gateway, and one measurement: the load, and what the gateway's processes used meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from bench.native_tools import Bodies, EngineOptions, Load, LoadResult, RunningLoad, Tools
from bench.processes import Seat, busy_s, cost_of
from bench.servers import NotReady
from bench.targets import Overload, Place, Running, Target

MB = 1e6
N_EVENTS = 64
PACED_CONNECTIONS = 1000
PACED_GAP_US = 30_000
"""33,000 chunks a second over 1,000 streams: about six tenths of a core for vLLM's router."""
PACED_S = N_EVENTS * PACED_GAP_US / 1e6
"""How long one paced stream takes."""
OVERLOAD = Overload(at_once=32, in_line=32)
SERVICE_US = 50_000
CAPACITY_PER_S = OVERLOAD.at_once * 1e6 / SERVICE_US
OVERLOAD_FACTORS = (0.5, 1.0, 3.0)
HEALTH_PER_S = 20.0
LOOKS_UNTIL = 0.9
"""The part of the window over which the gateway's cost is taken, so that the load is still on at its end."""
WARM = Load(0, connections=4, seconds=0.5, warmup_s=0.0)
SETTLE_S = 0.5

Kind = Literal["throughput", "latency", "paced", "overload"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One load on a gateway."""

    name: str
    title: str
    kind: Kind
    connections: int
    is_stream: bool = False
    rate: float | None = None
    ramp_s: float = 0.0
    warmup_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Suite:
    """Measures that share a fake engine and a freshly started gateway."""

    name: str
    engine: EngineOptions
    measures: tuple[Measure, ...]
    overload: Overload | None = None


def _whole(connections: int) -> Measure:
    return Measure(f"whole_{connections}", f"Whole answers, {connections} connections", "throughput", connections)


def _streams(connections: int, name: str = "streams", remark: str = "") -> Measure:
    title = f"Streams of {N_EVENTS} chunks{remark}, {connections} connections"
    return Measure(f"{name}_{connections}", title, "throughput", connections, is_stream=True)


def _overloaded(factor: float) -> Measure:
    title = f"Open loop at {factor:g} x the engine's capacity of {CAPACITY_PER_S:g}/s"
    return Measure(f"overload_{factor:g}", title, "overload", 4000, rate=factor * CAPACITY_PER_S)


_PACED = Measure(
    "paced",
    f"{PACED_CONNECTIONS} open streams, one chunk each {PACED_GAP_US / 1000:g} ms",
    "paced",
    PACED_CONNECTIONS,
    is_stream=True,
    ramp_s=PACED_S,
    warmup_s=2 * PACED_S,
)

SUITES = (
    Suite("saturation", EngineOptions(), tuple(map(_whole, (32, 128, 256)))),
    Suite("streams", EngineOptions(), tuple(map(_streams, (32, 128)))),
    Suite(
        "singly",
        EngineOptions(is_written_singly=True),
        (_streams(32, "singly", " that the engine writes one by one"),),
    ),
    Suite("latency", EngineOptions(), (Measure("latency", "Whole answers, one connection", "latency", 1),)),
    Suite("paced", EngineOptions(gap_us=PACED_GAP_US), (_PACED,)),
    Suite(
        "overload",
        EngineOptions(service_us=SERVICE_US, limit=OVERLOAD.at_once),
        tuple(map(_overloaded, OVERLOAD_FACTORS)),
        OVERLOAD,
    ),
)
MEASURES = {measure.name: measure for suite in SUITES for measure in suite.measures}


class Use(NamedTuple):
    """What the gateway took while the load was on. Shares are of one core."""

    share: float
    background_share: float
    """Of processes that run only when the core is free, such as the drain of the records."""
    others_share: float
    """Of everybody else on the gateway's core: other people's work, and interrupts."""
    resident_mb: float
    """Of the worker, at the end."""
    resident_all_mb: float
    idle_mb: float
    """Of the worker, after a few requests and before the load."""


NO_USE = Use(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, or why there is none."""

    round: int
    target: str
    measure: str
    load: LoadResult | None
    use: Use = NO_USE
    health: LoadResult | None = None
    """Of an overload: what the gateway's health check took meanwhile."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    tools: Tools
    bodies: Bodies
    directory: Path
    seat: Seat
    """The gateway's."""
    core: int
    seconds: float
    """Of each window."""


def measure_suite(bench: Bench, suite: Suite, target: Target, round_number: int) -> Iterator[Sample]:
    """Start the engine and the gateway, take every measure of the suite, stop them."""
    directory = bench.directory / f"{round_number}-{suite.name}-{target.name.replace(', ', '-').replace(' ', '-')}"
    directory.mkdir(parents=True)
    try:
        with bench.tools.running_engine(suite.engine) as engine_port:
            place = Place(engine_port, directory, bench.seat, suite.overload)
            with target.running(place) as running:
                idle_mb = _warm_up(bench, running)
                for measure in suite.measures:
                    yield _measure(
                        bench, measure, running, Sample(round_number, target.name, measure.name, None), idle_mb
                    )
    except NotReady as exc:
        for measure in suite.measures:
            yield Sample(round_number, target.name, measure.name, None, problem=str(exc))


def _warm_up(bench: Bench, running: Running) -> float:
    bench.tools.run_load(replace(WARM, port=running.port, body=bench.bodies.whole, headers=running.headers))
    time.sleep(SETTLE_S)
    return cost_of(running.pid).resident_bytes / MB if running.pid else 0.0


def load_of(bench: Bench, measure: Measure, running: Running) -> Load:
    """The load that a measure puts on a gateway."""
    return Load(
        port=running.port,
        connections=measure.connections,
        seconds=bench.seconds,
        warmup_s=measure.warmup_s,
        body=bench.bodies.stream if measure.is_stream else bench.bodies.whole,
        headers=running.headers,
        n_events=N_EVENTS if measure.is_stream else None,
        min_bytes=700,
        expect='"finish_reason"',
        rate=measure.rate,
        ramp_s=measure.ramp_s,
    )


def _measure(bench: Bench, measure: Measure, running: Running, sample: Sample, idle_mb: float) -> Sample:
    probe = _start_health_probe(bench, running) if measure.kind == "overload" else None
    load = bench.tools.start_load(load_of(bench, measure, running))
    load.wait_until_warm()
    use = _watch(bench, running, idle_mb)
    return replace(sample, load=load.result(), use=use, health=probe.result() if probe else None)


def _start_health_probe(bench: Bench, running: Running) -> RunningLoad:
    probe = Load(
        running.port,
        connections=32,
        seconds=bench.seconds,
        path=running.health_path,
        headers=running.headers,
        rate=HEALTH_PER_S,
    )
    return bench.tools.start_load(probe)


def _watch(bench: Bench, running: Running, idle_mb: float) -> Use:
    if running.pid is None:
        time.sleep(bench.seconds * LOOKS_UNTIL)
        return NO_USE
    started, before, busy_before = time.monotonic(), cost_of(running.pid), busy_s(bench.core)
    time.sleep(bench.seconds * LOOKS_UNTIL)
    took, after, busy_after = time.monotonic() - started, cost_of(running.pid), busy_s(bench.core)
    share = (after.cpu_s - before.cpu_s) / took
    background = (after.background_cpu_s - before.background_cpu_s) / took
    return Use(
        share,
        background,
        max(0.0, (busy_after - busy_before) / took - share - background),
        after.resident_bytes / MB,
        after.resident_bytes_of_all / MB,
        idle_mb,
    )


def chosen_suites(names: Sequence[str]) -> list[Suite]:
    """Those named, or all; in the order in which they are listed here."""
    return [suite for suite in SUITES if not names or suite.name in names]
