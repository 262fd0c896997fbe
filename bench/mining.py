"""Mine a history built from a seed, on SQLite and on PostgreSQL: how long it takes, and in how much memory.

`python -m bench.mining` is the form to quote: 1,000,000 interactions, 100,000 signals, 50,000 users. Mining runs as
`pawl pairs mine` in a fresh process, twice: the second time every pair is there already.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from bench.mining_history import ALIAS, Size, build_history
from bench.processes import cost_of
from pawl.database import Database, open_database, upgrade
from pawl.settings import DatabaseSettings
from tests.servers import PostgreSQL

REPORT = Path("var/bench/mining.json")
BYTES_PER_MB = 1024**2
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Measured:
    """One run of `pawl pairs mine`."""

    database: str
    run: str
    """`first`, or `again` when every pair is there already."""
    seconds: float
    processor_s: float
    """Of the process and those that it started; a database server works beside them."""
    peak_resident_mb: float
    """Of all of them together, at one moment. What they share counts for each."""
    interactions_per_s: float
    mined: Mapping[str, Any]
    """What the command printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, mine, print, write the figures; 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--signals", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, help="for `feedback.mining.processes`")
    parser.add_argument("--database", help="URL of an empty database to use in place of one of each kind")
    parser.add_argument("--directory", type=Path, help="where the databases are built; takes 3 GB per million")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    size = Size(options.interactions, options.signals, options.users)
    runs: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="pawl-mining-", dir=options.directory) as directory:
        for url in [options.database] if options.database else ["sqlite", "postgresql"]:
            with database_at(url, Path(directory)) as (name, place):
                runs += measure(name, place, size, options, Path(directory))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"size": asdict(size), "seed": options.seed, "runs": [asdict(run) for run in runs]}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print_table(runs)
    return 0


@contextmanager
def database_at(wanted: str, directory: Path) -> Iterator[tuple[str, str]]:
    """`(name, URL)` of an empty database: one made for this, or the one whose URL was given."""
    if wanted == "sqlite":
        yield wanted, f"sqlite:///{directory}/mining.db"
        (directory / "mining.db").unlink()
    elif wanted == "postgresql":
        with private_postgresql(directory) as url:
            yield wanted, url
    else:
        yield wanted.partition(":")[0], wanted


@contextmanager
def private_postgresql(directory: Path) -> Iterator[str]:
    """As it comes, without tuning."""
    directory.chmod(0o755)
    home = Path(tempfile.mkdtemp(prefix="pg-", dir=directory))
    home.chmod(0o755)
    server = PostgreSQL(home)
    server.start()
    try:
        yield server.create_database("mining")
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


def measure(name: str, url: str, size: Size, options: argparse.Namespace, directory: Path) -> list[Measured]:
    """Build the history and mine it twice."""
    started = time.monotonic()
    # Elsewhere, for a process begins with the peak of the one that started it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as builder:
        builder.submit(build, url, size, options.seed).result()
    print(f"{name}: {size.interactions:,} interactions built in {time.monotonic() - started:.0f} s", file=sys.stderr)
    config = configuration(url, options.processes, directory)
    return [mine(name, run, config, size) for run in ("first", "again")]


def build(url: str, size: Size, seed: int) -> None:
    """Fill an empty database."""
    with closing(open_database(DatabaseSettings(url=url))) as database:
        upgrade(database)
        build_history(database, size, seed)
        settle(database)


def settle(database: Database) -> None:
    """As after a quiet hour: a server that was just filled cleans up for minutes, and knows nothing of its tables."""
    if not database.is_sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE)")
            connection.exec_driver_sql("CHECKPOINT")


def configuration(url: str, processes: int | None, directory: Path) -> Path:
    """The file that the command reads."""
    path = directory / "pawl.yaml"
    model = {"engines": ["http://127.0.0.1:9"], "champion": "base-model"}
    mining = {"mining": {"processes": processes}}
    path.write_text(
        yaml.safe_dump({"database": {"url": url}, "serving": {"models": {ALIAS: model}}, "feedback": mining})
    )
    return path


def mine(name: str, run: str, config: Path, size: Size) -> Measured:
    """One run of the command in a process of its own."""
    command = [sys.executable, "-m", "pawl.cli.main", "pairs", "mine", "--json"]
    started = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, "PAWL_CONFIG": str(config)}, stdout=subprocess.PIPE) as process:
        assert process.stdout
        with peak_of(process.pid) as peak:
            printed = process.stdout.read()
        # Not `wait`: only this tells what the one process and those that it waited for used.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"pawl pairs mine ended with {process.returncode}")
    processor_s = usage.ru_utime + usage.ru_stime
    peak_mb = max(peak) / BYTES_PER_MB
    return Measured(name, run, seconds, processor_s, peak_mb, size.interactions / seconds, json.loads(printed))


@contextmanager
def peak_of(pid: int) -> Iterator[list[int]]:
    """Resident bytes of a process and its descendants, looked at all the while."""
    seen = [cost_of(pid).resident_bytes_of_all]
    is_over = Event()

    def look() -> None:
        while not is_over.wait(LOOK_EVERY_S):
            seen.append(cost_of(pid).resident_bytes_of_all)

    looking = Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        is_over.set()
        looking.join()


def print_table(runs: Sequence[Measured]) -> None:
    """One column per run."""
    table = Table("", *(f"{run.database}\n{run.run}" for run in runs), box=None, header_style="bold")
    table.add_row("seconds", *(f"{run.seconds:.1f}" for run in runs))
    table.add_row("processor seconds", *(f"{run.processor_s:.1f}" for run in runs))
    table.add_row("peak resident MB", *(f"{run.peak_resident_mb:.0f}" for run in runs))
    table.add_row("interactions per second", *(f"{run.interactions_per_s:,.0f}" for run in runs))
    for part in ("pairs", "added", "withdrawn", "unpaired"):
        table.add_row(part, *(f"{run.mined[part]:,}" for run in runs))
    for part in ("by_source", "skipped", "filtered", "defence"):
        table.add_row(part)
        counts = [dict(_counts(run.mined.get(part, {}))) for run in runs]
        for reason in sorted({reason for count in counts for reason in count}):
            table.add_row(f"  {reason}", *(f"{count.get(reason, 0):,}" for count in counts))
    Console().print(table)


def _counts(found: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The counts in what the command printed, those of groups too.

    >>> list(_counts({"kept": 5, "dropped": {"length": 2}, "bias": {"mean": 0.5}}))
    [('kept', 5), ('length', 2)]
    """
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int):
            yield name, value


if __name__ == "__main__":
    sys.exit(main())
