"""Work on parts that tests give to other processes, which import this module alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from feedback.part_workers import Processes
from feedback.partitions import Part
from pawl.database import Database
from pawl.settings import DatabaseSettings

LONG_S = 600.0


def tell_process(_: Database, part: Part) -> tuple[str, int]:
    """The part's interaction, and who worked on it; number 19 cannot be done."""
    (name,) = part.interactions
    if name == "19":
        raise LookupError(f"no {name}")
    return name, os.getpid()


def be_killed(_: Database, __: Part) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(_: Database, part: Part) -> None:
    """Leave a file with the number of this process, then take for ever."""
    Path(part.interactions[0]).write_text(str(os.getpid()))
    time.sleep(LONG_S)


def main(url: str, *paths: str) -> None:
    """Have every path lingered at, by two processes."""
    from tests.feedback import part_deeds  # Under the name by which other processes find it.

    place = Processes(DatabaseSettings(url=url), 2, few_parts=1)
    list(place.each(part_deeds.linger, [Part([path], []) for path in paths]))


if __name__ == "__main__":
    main(*sys.argv[1:])
