"""`make bench`: every benchmark in its short form, a table at the end, raw numbers under var/bench/."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Bench(NamedTuple):
    """One benchmark and how long a form of it to run here; its own `--help` tells of the long one."""

    module: str
    arguments: tuple[str, ...]
    question: str


BENCHES = (
    Bench(
        "bench.ab_error_rates",
        ("--sims", "150", "--canary-sims", "20"),
        "How often is a canary judged wrongly, looked at all the time, and how late?",
    ),
    Bench("bench.rollout_tick", ("--rows", "20000", "--ticks", "5"), "What does a look at a canary cost?"),
    Bench("bench.ab_analysis", ("--rows", "100000"), "How long does a report take, beside other libraries?"),
    Bench("bench.ab_speed", (), "What does a canary's decision cost, and an update of its evidence?"),
    Bench("bench.hot_path", (), "What does a completion cost beyond the system's calls?"),
    Bench("bench.gateway", ("--quick",), "What does the gateway do per core, beside others?"),
    Bench(
        "bench.cancellations", ("--cancellations", "10000"), "Do clients that leave disturb others or leave anything?"
    ),
    Bench("bench.outage", ("--minutes", "0.5"), "Does an absent database lose records or turn clients away?"),
    Bench("bench.soak", ("--minutes", "1"), "Does anything grow under mixed traffic?"),
    Bench(
        "bench.rollback",
        ("--rollbacks", "20"),
        "How soon does a rollback reach every gateway, and what holds without it?",
    ),
    Bench("bench.kill", ("--kills", "5"), "Does kill -9 under load lose or double a record?"),
    Bench("bench.retrain_kill", ("--kills", "3"), "Does kill -9 of a retraining round change what comes out of it?"),
    Bench("bench.feedback", ("--quick",), "How much feedback does a process take in, durably?"),
    Bench(
        "bench.mining",
        ("--interactions", "100000", "--signals", "10000", "--users", "5000"),
        "How long does mining take, and in how much memory?",
    ),
    Bench("bench.gate", ("--quick",), "Does the gate stop seven bad adapters, each by its own check?"),
    Bench(
        "bench.canaries", ("--only", "refusing", "--again"), "Is a canary that refuses too much rolled back for that?"
    ),
    Bench("bench.train", ("--only", "--pairs", "96", "--rounds", "3"), "How fast is training, beside TRL as it comes?"),
    Bench("bench.objectives", ("--pairs", "96"), "Does every objective lower its own loss on the practice model?"),
    Bench("bench.poison", ("--quick",), "How much poison gets into a training set, and what does that cost?"),
)


def main() -> None:
    """Run all, even if one fails; exit 1 if one did."""
    table = Table("benchmark", "question", "exit", "seconds", box=None, header_style="bold")
    failed = False
    for bench in BENCHES:
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", bench.module, *bench.arguments], check=False).returncode
        failed |= code != 0
        table.add_row(bench.module, bench.question, str(code), f"{time.monotonic() - started:.0f}")
    Console().print(table)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
