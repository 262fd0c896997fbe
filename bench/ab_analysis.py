"""How long a report takes from raw rows, beside tea-tasting and gbstats, and whether every table gives the same bytes.

    python -m bench.ab_analysis [--rows N ...] [--repeats R]

Eight ratio metrics in two variants, twenty rows per user, rows in random order. Ours uses two cores and assumes what
an interaction store gives: whole-number users, variants as small integers, float64 columns. gbstats takes aggregates
only, so polars makes them for it. Packages that are not installed are left out; an environment of their own will do
(`pip install tea-tasting polars pandas pyarrow scipy pydantic`, then `pip install --no-deps gbstats==0.8.0`).
Prints a table and writes var/bench/ab_analysis.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ab_testing.analysis import Report, analyse, ratio
from ab_testing.analysis.tables import Table

Columns = dict[str, npt.NDArray[np.generic]]
Estimates = list[tuple[float, float]]
"""Effect and lower end of its interval, per metric."""

Answer = TypeVar("Answer")

ROWS_PER_USER = 20
NUMERATORS = tuple(f"x{number}" for number in range(8))
METRICS = tuple(ratio(name, name) for name in NUMERATORS)
PACKAGES = ("numpy", "pandas", "polars", "pyarrow", "tea-tasting", "gbstats")


class Spent(NamedTuple):
    """On one run."""

    wall_s: float
    cpu_s: float


class Timing(NamedTuple):
    """How long one way took."""

    name: str
    rows: int
    median_s: float
    best_s: float
    cpu_s: float
    """Processor seconds of the process, median: what remains to compare on a busy machine."""
    largest_difference: float
    """From ours on NumPy, of any estimate or end of an interval."""
    digest: str = ""
    """Of the report's bytes."""


def make_table(rows: int, seed: int) -> Columns:
    """Half shares, half amounts; users differ."""
    rng = np.random.default_rng(seed)
    users = rows // ROWS_PER_USER
    user, taste = rng.integers(0, users, rows), rng.beta(2, 8, users)
    columns: Columns = {"user_id": user, "variant": (user % 2).astype(np.int8)}
    for number, name in enumerate(NUMERATORS):
        chance = taste[user]
        is_share = number % 2 == 0
        columns[name] = (rng.random(rows) < chance).astype(np.float64) if is_share else rng.random(rows) * chance
    return columns


def ours(table: Table) -> Report:
    """One call."""
    return analyse(table, METRICS, control="0")


def floor(table: Columns) -> list[npt.NDArray[np.float64]]:
    """What no report in NumPy can be faster than: every column added up by user, and nothing else."""
    return [np.bincount(table["user_id"], weights=table[name]).astype(np.float64, copy=False) for name in NUMERATORS]


def estimates_of(report: Report) -> Estimates:
    """What the peers can be compared with."""
    return [(effect.estimate, effect.interval.lower) for effect in report if effect.estimate and effect.interval]


def with_tea_tasting(frame: Any) -> Estimates:
    """From rows to users by the data frame itself, from users to effects by tea-tasting."""
    tt = import_module("tea_tasting")
    found = tt.Experiment({name: tt.RatioOfMeans(name, "rows") for name in NUMERATORS}).analyze(_users(frame))
    return [(float(found[name].effect_size), float(found[name].effect_size_ci_lower)) for name in NUMERATORS]


def with_gbstats(frame: Any) -> Estimates:
    """From rows to sums by polars, from sums to effects by gbstats."""
    pl = import_module("polars")
    tests, models = import_module("gbstats.frequentist.tests"), import_module("gbstats.models.statistics")
    n = pl.col("rows").cast(pl.Float64)
    sums = [n.sum().alias("n"), (n * n).sum().alias("nn"), pl.len().alias("users")]
    for name in NUMERATORS:
        x = pl.col(name)
        sums += [x.sum(), (x * x).sum().alias(name + "xx"), (x * n).sum().alias(name + "xn")]
    arms = _users(frame).group_by("variant").agg(sums).sort("variant").to_dicts()
    config = tests.FrequentistConfig(difference_type="absolute")
    found = []
    for name in NUMERATORS:
        pair = [_gbstats_ratio(models, arm, name) for arm in arms]
        result = tests.TwoSidedTTest(*pair, config).compute_result()
        found.append((float(result.expected), float(result.ci[0])))
    return found


def _gbstats_ratio(models: Any, arm: dict[str, float], name: str) -> Any:
    users = arm["users"]
    return models.RatioStatistic(
        n=users,
        m_statistic=models.SampleMeanStatistic(n=users, sum=arm[name], sum_squares=arm[name + "xx"]),
        d_statistic=models.SampleMeanStatistic(n=users, sum=arm["n"], sum_squares=arm["nn"]),
        m_d_sum_of_products=arm[name + "xn"],
    )


def _users(frame: Any) -> Any:
    if frame.__class__.__module__.startswith("polars"):
        pl = import_module("polars")
        return frame.group_by("user_id", "variant").agg([pl.col(*NUMERATORS).sum(), pl.len().alias("rows")])
    groups = frame.groupby(["user_id", "variant"], sort=False)
    return groups[list(NUMERATORS)].sum().assign(rows=groups.size()).reset_index()


def time_ours(name: str, table: Table, reference: Estimates, rows: int, repeats: int) -> Timing:
    """Time one kind of table."""
    seconds, report = _timed(lambda: ours(table), repeats)
    digest = hashlib.sha256(report.to_json().encode()).hexdigest()[:16]
    return _timing(name, rows, seconds, estimates_of(report), reference)._replace(digest=digest)


def time_peer(
    name: str, run: Callable[[Any], Estimates], frame: Any, reference: Estimates, rows: int, repeats: int
) -> Timing:
    """Time one peer."""
    seconds, found = _timed(lambda: run(frame), repeats)
    return _timing(name, rows, seconds, found, reference)


def run_all(rows: int, repeats: int, seed: int) -> list[Timing]:
    """Time all that is installed on one table."""
    table = make_table(rows, seed)
    reference = estimates_of(ours(table))
    seconds, _ = _timed(lambda: floor(table), repeats)
    timings = [_timing("floor: sums per user", rows, seconds, reference, reference)]
    timings += [time_ours("pawl, NumPy", table, reference, rows, repeats)]
    if _is_installed("pyarrow"):
        arrow = import_module("pyarrow").table(table)
        timings.append(time_ours("pawl, Arrow", arrow, reference, rows, repeats))
    for package in ("pandas", "polars"):
        if not _is_installed(package):
            continue
        frame = import_module(package).DataFrame(table)
        timings.append(time_ours(f"pawl, {package}", frame, reference, rows, repeats))
        if _is_installed("tea-tasting"):
            timings.append(time_peer(f"tea-tasting, {package}", with_tea_tasting, frame, reference, rows, repeats))
        if package == "polars" and _is_installed("gbstats"):
            timings.append(time_peer("gbstats, polars", with_gbstats, frame, reference, rows, repeats))
    return timings


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=20_261)
    parser.add_argument("--out", type=Path, default=Path("var/bench/ab_analysis.json"))
    arguments = parser.parse_args()
    versions = {name: version(name) for name in PACKAGES if _is_installed(name)}
    print(", ".join(f"{name} {found}" for name, found in versions.items()))
    timings = []
    for rows in arguments.rows:
        timings += run_all(rows, arguments.repeats, arguments.seed)
        print(_table([timing for timing in timings if timing.rows == rows]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"versions": versions, "timings": [timing._asdict() for timing in timings]}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    if any(len(digests_of(timings, rows)) > 1 for rows in arguments.rows):
        raise SystemExit("the reports differ between kinds of table")


def digests_of(timings: Sequence[Timing], rows: int) -> set[str]:
    """One, if every kind of table gave the same bytes."""
    return {timing.digest for timing in timings if timing.digest and timing.rows == rows}


def _timed(run: Callable[[], Answer], repeats: int) -> tuple[list[Spent], Answer]:
    spent, found = [], run()  # The first run, which loads modules and pages, is not timed.
    for _ in range(repeats):
        started, started_cpu = time.perf_counter(), time.process_time()
        found = run()
        spent.append(Spent(time.perf_counter() - started, time.process_time() - started_cpu))
    return spent, found


def _timing(name: str, rows: int, spent: Sequence[Spent], found: Estimates, reference: Estimates) -> Timing:
    difference = float(np.abs(np.array(found) - np.array(reference)).max())
    walls, cpus = [run.wall_s for run in spent], [run.cpu_s for run in spent]
    return Timing(name, rows, statistics.median(walls), min(walls), statistics.median(cpus), difference)


def _table(timings: Sequence[Timing]) -> str:
    lines = [f"{'way':22} {'rows':>11} {'median s':>9} {'best s':>8} {'cpu s':>8} {'differs by':>11}  report"]
    lines += [
        f"{found.name:22} {found.rows:11,} {found.median_s:9.4f} {found.best_s:8.4f} {found.cpu_s:8.4f} "
        f"{found.largest_difference:11.1e}  {found.digest}"
        for found in timings
    ]
    return "\n".join(lines)


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
