"""A rollout's leader that is stopped at the worst moment: it has read and decided, and has not written yet.

`python -m bench.stopped_leader PAWL.YAML ALIAS LEASE_S` takes the lease, stops itself (SIGSTOP) in the middle of
its tick, and goes on when it is woken. It prints what came of the tick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from ab_testing.controller import Controller
from pawl import leases
from pawl.clock import now
from pawl.database import open_database
from pawl.errors import StaleWrite
from pawl.settings import load_settings

REFUSED, WROTE, NO_LEASE = 3, 0, 4
"""Exit codes."""


class StopsBeforeWriting(leases.FencedDatabase):
    """A leader's database, but that the process stops before its first write."""

    is_awake = False

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        if not self.is_awake:
            self.is_awake = True
            os.kill(os.getpid(), signal.SIGSTOP)
        with super().write() as connection:
            yield connection


def main() -> int:
    """Lead, stop, wake, write."""
    config, alias, lease_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    database = open_database(load_settings(config, {}).database)
    lease = f"rollout/{alias}"
    epoch = leases.acquire(database, lease, leases.this_process(), ttl_s=lease_s, now=now())
    if epoch is None:
        return NO_LEASE
    fenced = StopsBeforeWriting(database, lease, epoch)
    try:
        tick = Controller(fenced, clock=now).tick(alias, epoch=epoch)
    except StaleWrite as exc:
        print(f"refused: {exc}")
        return REFUSED
    print(f"wrote: {tick.decision.verdict if tick else 'nothing'}")
    return WROTE


if __name__ == "__main__":
    sys.exit(main())
