"""The drain as a process of its own, so that parsing never holds the interpreter of the process that relays.

It runs when nobody else wants the processor, ends with the process that started it, and on SIGTERM tries once more to
bring over what waits. What it cannot bring over stays on the disk for the next one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from feedback.journal_drain import JournalDrain
from feedback.redaction import redact_interaction, redact_text
from feedback.storing import unchanged, unchanged_text
from pawl.clock import now as wall_clock
from pawl.database import open_database
from pawl.errors import PawlError
from pawl.logs import configure_logging
from pawl.settings import find_config, load_settings

NICEST = 19
PR_SET_PDEATHSIG = 1
PARENT_POLL_S = 1.0
STOP_S = 8.0
"""For the last attempt; the supervisor waits a little longer before it kills."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Drain this machine's journals; the exit codes are those of the `pawl` command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="Ends when this process is gone.")
    parent = parser.parse_args(arguments).parent
    try:
        settings = load_settings(find_config(None, os.environ), os.environ)
        configure_logging(settings.log)
        database = open_database(settings.database)
        give_way(is_sqlite=database.is_sqlite)
        is_redacted = settings.serving.guards.redact
        drain = JournalDrain(
            settings.state_dir / "spool",
            database,
            clock=wall_clock,
            prepare=redact_interaction if is_redacted else unchanged,
            prepare_letter=redact_text if is_redacted else unchanged_text,
        )
        run(drain, parent=parent)
        database.close()
    except PawlError as exc:
        print(f"pawl: {' '.join(str(exc).split())}", file=sys.stderr, flush=True)
        return exc.exit_code
    return 0


def run(drain: JournalDrain, *, parent: int, on_ready: Callable[[], None] = lambda: None) -> None:
    """Drain until SIGTERM, SIGINT or the end of the parent. Belongs to the main thread."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    end_with_parent()
    drain.start()
    on_ready()
    while not told.wait(PARENT_POLL_S) and os.getppid() == parent:
        pass
    drain.stop(STOP_S)


def give_way(*, is_sqlite: bool) -> None:
    """Take only the processor time that nobody else wants.

    Not quite so on SQLite: at idle priority this process could be stopped for seconds with the file locked, while
    others wait for it.
    """
    with suppress(OSError):
        os.nice(NICEST)
        os.sched_setscheduler(0, os.SCHED_BATCH if is_sqlite else os.SCHED_IDLE, os.sched_param(0))


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it dies. Elsewhere than on Linux we look ourselves."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
