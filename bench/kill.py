"""Kill a worker, the drain, the parent or all of the gateway under load, on both databases, and count what was lost.

`python -m bench.kill --kills 200` is the long form.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.servers import private_postgresql
from tests.serving.kill_ledger import Outcome, run_ledger

REPORT = Path("var/bench/kill.json")
COLUMNS = (
    "database",
    "kills",
    "attempts",
    "acknowledged_whole",
    "acknowledged_streams",
    "acknowledged_feedback",
    "lost_completions",
    "lost_feedback",
    "doubled_completions",
    "doubled_feedback",
    "altered",
    "left_in_spool",
    "left_in_journals",
    "dead_letters",
    "restart_s",
    "seconds",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a table, write the figures; 1 when anything acknowledged was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills; drawn when left out")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    outcomes = [on_sqlite(options.kills, seed), on_postgresql(options.kills, seed)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"seed": seed, "runs": [outcome.to_json() for outcome in outcomes]}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print_table(outcomes)
    return 0 if all(outcome.is_faultless for outcome in outcomes) else 1


def on_sqlite(kills: int, seed: int) -> Outcome:
    """The embedded default."""
    with tempfile.TemporaryDirectory(prefix="pawl-kill-") as directory:
        return run_ledger(Path(directory), f"sqlite:///{directory}/shared.db", kills=kills, seed=seed)


def on_postgresql(kills: int, seed: int) -> Outcome:
    """A private PostgreSQL."""
    with private_postgresql() as server, tempfile.TemporaryDirectory(prefix="pawl-kill-") as directory:
        return run_ledger(Path(directory), server.create_database("kill"), kills=kills, seed=seed)


def print_table(outcomes: Sequence[Outcome]) -> None:
    """One column per database."""
    table = Table("", *(outcome.database for outcome in outcomes), box=None, header_style="bold")
    for name in COLUMNS[1:]:
        table.add_row(name.replace("_", " "), *(_cell(getattr(outcome, name)) for outcome in outcomes))
    Console().print(table)


def _cell(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
