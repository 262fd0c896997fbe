"""Which files of the spool a gateway process owns: every living process has a slot of its own.

Two generations of workers live side by side during a restart, so a number given by the parent would not do. A process
takes the first slot that no living process holds, and takes over what dead ones left; the locks are the kernel's, so
they end with their process.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feedback.errors import SpoolUnavailable
from feedback.journal import LOCK_PATIENCE_S
from feedback.segment_files import LOCK, hold

START_LOCK = "start.lock"


@contextmanager
def starting_alone(directory: Path) -> Iterator[None]:
    """Keep other processes from choosing a slot or adopting an orphan meanwhile."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / START_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_spool(directory: Path, port: int) -> Path:
    """The first spool file of this port that no living process holds; ask while starting alone.

    The writer of a gateway's journal may outlive it for a while, and on a disk that hangs for long.
    """
    slot = 0
    while is_held(path := spool_file(directory, port, slot)) or is_written(directory / path.stem):
        slot += 1
    return path


def is_written(journal: Path) -> bool:
    """Whether somebody writes in a journal's directory, or has for a second not been done with it."""
    try:
        handle = (journal / LOCK).open("r")
    except OSError:
        return False  # There is none yet; or it cannot be used, which is for the journal to say.
    try:
        hold(handle, journal, patience_s=LOCK_PATIENCE_S).close()
    except SpoolUnavailable:
        return True
    return False


def spool_file(directory: Path, port: int, slot: int) -> Path:
    """One slot's file.

    >>> spool_file(Path("spool"), 8080, 1).as_posix()
    'spool/gateway-8080-1.db'
    """
    return directory / f"gateway-{port}-{slot}.db"


def is_held(path: Path) -> bool:
    """Whether a living process owns this spool file."""
    with path.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
