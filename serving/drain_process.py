"""`python -m serving.drain_process`: brings the journals of this machine's workers to the shared database.

A process of its own, so that parsing records never holds the interpreter of one that relays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from feedback.drain_process import give_way, run
from feedback.interactions import Interaction
from feedback.journal_drain import JournalDrain
from monitoring.exposition import published
from monitoring.metrics import DEAD_LETTERS, RECORDS_DAMAGED, TOKENS
from pawl.clock import now as wall_clock
from pawl.database import Database, open_database
from pawl.settings import Settings
from serving.child_main import Inheritance, run_child
from serving.guards.storage import preparation_of


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
    return JournalDrain(
        settings.state_dir / "spool",
        database,
        clock=wall_clock,
        on_stored=count_tokens,
        on_dead_letters=DEAD_LETTERS.inc,
        on_damage=RECORDS_DAMAGED.inc,
        prepare=prepared.interaction,
        prepare_letter=prepared.letter,
    )


def count_tokens(stored: Sequence[Interaction]) -> None:
    """Tokens as the engine counted them, once the record is in the database."""
    TOKENS.labels(direction="input").inc(sum(interaction.prompt_tokens or 0 for interaction in stored))
    TOKENS.labels(direction="output").inc(sum(interaction.completion_tokens or 0 for interaction in stored))


if __name__ == "__main__":
    sys.exit(run_child(drain))
