"""`python -m serving.drain_process`: brings the journals of this machine's workers to the shared database.

A process of its own, so that parsing records never holds the interpreter of one that relays. It runs when nobody else
wants the processor, ends with the process that started it, and on SIGTERM tries once more to bring over what waits.
What it cannot bring over stays on the disk for the next one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from feedback.interactions import Interaction
from feedback.journal_drain import JournalDrain
from feedback.tombstone_store import open_watch
from monitoring.exposition import published
from monitoring.metrics import DEAD_LETTERS, RECORDS_DAMAGED, TOKENS
from pawl.clock import now as wall_clock
from pawl.database import Database, open_database
from pawl.secrets import signing_secret
from pawl.settings import Settings
from serving.child_main import Inheritance, run_child
from serving.guards.storage import preparation_of

NICEST = 19
PARENT_POLL_S = 1.0
"""Where the kernel does not tell; see `serving.children`."""
STOP_S = 8.0
"""For the last attempt; the supervisor waits a little longer before it kills."""


def drain(settings: Settings, given: Inheritance) -> None:
    """Drain until told to stop, or until the parent is gone."""
    database = open_database(settings.database)
    give_way(is_sqlite=database.is_sqlite)
    records = drain_of(settings, database)
    with published(given.place):
        run(records, parent=given.parent, on_ready=given.on_ready)
    database.close()


def drain_of(settings: Settings, database: Database) -> JournalDrain:
    """One that counts what it does, and what it could not."""
    prepared = preparation_of(settings.serving.guards)
    directory = settings.state_dir / "spool"
    secret = signing_secret(settings.auth, settings.state_dir)
    return JournalDrain(
        directory,
        database,
        clock=wall_clock,
        on_stored=count_tokens,
        on_dead_letters=DEAD_LETTERS.inc,
        on_damage=RECORDS_DAMAGED.inc,
        prepare=prepared.interaction,
        prepare_letter=prepared.letter,
        erasures=open_watch(database, settings.state_dir, secret, directory, clock=wall_clock),
    )


def run(drain: JournalDrain, *, parent: int, on_ready: Callable[[], None]) -> None:
    """Drain until SIGTERM, SIGINT or the end of the parent. Belongs to the main thread."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
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


def count_tokens(stored: Sequence[Interaction]) -> None:
    """Tokens as the engine counted them, once the record is in the database."""
    TOKENS.labels(direction="input").inc(sum(interaction.prompt_tokens or 0 for interaction in stored))
    TOKENS.labels(direction="output").inc(sum(interaction.completion_tokens or 0 for interaction in stored))


if __name__ == "__main__":
    sys.exit(run_child(drain))
