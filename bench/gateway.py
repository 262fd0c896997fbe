"""Pawl's gateway against others, one core each: `python -m bench.gateway --rounds 5`.

The gateway under test has one core to itself; the fake engine and the load generator have the others. Every round
measures every gateway once, in an order drawn anew, so that a machine that grows slower or faster meets all alike.
Prints tables of medians and ratios; writes them and every raw figure under var/bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from bench.gateway_tables import checks_of, report, rows_of
from bench.measures import SUITES, Bench, Sample, chosen_suites, measure_suite
from bench.native_tools import compile_tools, write_bodies
from bench.processes import Seat, choose_cores, prefer
from bench.targets import TARGETS, Target

OUT = Path("var/bench/gateway.json")
QUICK = {"rounds": 1, "seconds": 1.0}
"""One short round, without the peer that takes longest to start: to see that everything works, not to quote."""
SLOW_TO_START = "litellm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 for a missed threshold (of a quick run: for an error), 2 when nothing could be measured."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    say = partial(print, file=sys.stderr, flush=True)
    targets = chosen_targets(options.targets, is_quick=options.quick)
    for target in TARGETS:
        if reason := target.why_missing():
            say(f"left out: {target.name}: {reason} (scripts/install_bench.sh)")
    started = time.monotonic()
    samples: list[Sample] = []
    for sample in run(options, targets):
        samples.append(sample)
        say(line_of(sample, time.monotonic() - started))
        write_raw(options.out, options, samples)
    if not samples:
        return 2
    rows = rows_of(samples)
    text = report(rows, about_machine(options))
    options.out.with_suffix(".md").write_text(text)
    print(text)
    if options.quick:
        return 1 if any(row.errors or row.problem for row in rows.values()) else 0
    return 1 if any(check.is_met is False for check in checks_of(rows)) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    suites = ",".join(suite.name for suite in SUITES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--only", type=_names, default=[], help=f"some of {suites}")
    parser.add_argument("--targets", type=_names, default=[], help=f"some of {';'.join(t.name for t in TARGETS)}")
    parser.add_argument("--quick", action="store_true", help="one short round, without LiteLLM")
    parser.add_argument("--seed", type=int, default=20_260, help="of the order in which gateways are measured")
    parser.add_argument("--nice", type=int, default=0, help="of all that is measured; -15 where others use the machine")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - {suite.name for suite in SUITES}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {suites}")
    if unknown := set(options.targets) - {target.name for target in TARGETS}:
        parser.error(f"no such gateway: {', '.join(sorted(unknown))}")
    if options.quick:
        vars(options).update(QUICK)
    options.cores = choose_cores(os.sched_getaffinity(0))
    return options


def _names(text: str) -> list[str]:
    """Split at semicolons where there are any, since a gateway's name may hold a comma.

    >>> _names("saturation,streams"), _names("pawl;pawl, records off"), _names("pawl, records off;")
    (['saturation', 'streams'], ['pawl', 'pawl, records off'], ['pawl, records off'])
    """
    return [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]


def chosen_targets(names: Sequence[str], *, is_quick: bool) -> list[Target]:
    """Those named, else all, that are installed."""
    wanted = names or [target.name for target in TARGETS if not (is_quick and target.name == SLOW_TO_START)]
    return [target for target in TARGETS if target.name in wanted and target.why_missing() is None]


def run(options: argparse.Namespace, targets: Sequence[Target]) -> Iterator[Sample]:
    """Every round: every part, with the gateways in an order drawn anew."""
    usable, cores = os.sched_getaffinity(0), options.cores
    engine_seat, load_seat = Seat(cores.engine, options.nice), Seat(cores.load, options.nice)
    tools = replace(compile_tools(), engine_seat=engine_seat, load_seat=load_seat)
    os.sched_setaffinity(0, {cores.load})  # this process only waits and looks, but not on the gateway's core
    prefer(os.getpid(), options.nice)  # the engine and the load generator are of the same session
    rng = random.Random(options.seed)
    directory = Path(tempfile.mkdtemp(prefix="pawl-bench-"))
    seat = Seat(cores.gateway, options.nice)
    bench = Bench(tools, write_bodies(directory), directory, seat, cores.gateway, options.seconds)
    try:
        for round_number in range(options.rounds):
            for suite in chosen_suites(options.only):
                for target in rng.sample(targets, len(targets)):
                    yield from measure_suite(bench, suite, target, round_number)
    finally:
        os.sched_setaffinity(0, usable)
        prefer(os.getpid(), 0)
        shutil.rmtree(directory, ignore_errors=True)


def line_of(sample: Sample, elapsed_s: float) -> str:
    """One line while it runs."""
    head = f"{elapsed_s:6.0f} s  round {sample.round}  {sample.measure:12} {sample.target:18}"
    if sample.load is None:
        return f"{head} {sample.problem}"
    load, use = sample.load, sample.use
    errors = f"  ERRORS {load.errors} {dict(load.statuses)}" if load.errors else ""
    return (
        f"{head} {load.per_s:10,.1f}/s  p99 {load.latency.p99_us / 1000:9.2f} ms  core {100 * use.share:4.0f} %{errors}"
    )


def write_raw(out: Path, options: argparse.Namespace, samples: Sequence[Sample]) -> None:
    """Every figure, rewritten after every sample: a run that is cut short leaves what it had."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = {"about": about_machine(options), "samples": [to_json(sample) for sample in samples]}
    out.write_text(json.dumps(raw, indent=1) + "\n")


def to_json(sample: Sample) -> dict[str, object]:
    """Times by name."""
    data = asdict(sample)
    for part in (data["load"], data["health"]):
        if part is not None:
            part.update({name: value._asdict() for name, value in part.items() if hasattr(value, "_asdict")})
    return data | {"use": sample.use._asdict()}


def about_machine(options: argparse.Namespace) -> Mapping[str, str]:
    """What a reader has to know to judge the figures."""
    cores = options.cores
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, loopback",
        "cores": f"gateway on {cores.gateway}, fake engine on {cores.engine}, load generator on {cores.load}",
        "rounds": f"{options.rounds}, interleaved, medians; windows of {options.seconds:g} s",
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
