"""What `pawl erase` does, and the worker when an erasure was interrupted; apart, since it imports much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from feedback.drain import Drain, DrainThread
from feedback.erasure import is_owner
from feedback.erasure_run import LEASE, Eraser
from feedback.erasure_store import count_for, models_of, newest_interaction
from feedback.errors import SpoolUnavailable
from feedback.spool import Spool
from feedback.tombstone_store import Grave, TombstoneBook, TombstoneFile, open_watch, places
from feedback.tombstones import Person, Subject, Tombstone
from pawl import ids, leases
from pawl.cli.context import refuse
from pawl.clock import now
from pawl.database import Database
from pawl.secrets import signing_secret
from pawl.settings import Settings
from serving.drain_process import drain_of
from serving.guards.storage import preparation_of
from serving.limits import subject_of

LEASE_S = 60.0
LEASE_WAIT_S = 120.0
POLL_S = 0.2
ALIVE_S = 180.0
"""A drain that has not been heard of for so long is not waited for."""


@contextmanager
def erasing_alone(database: Database) -> Iterator[None]:
    """One process erases at a time, so that each report counts what it removed. A worker may be at it: wait.

    Raises:
        NegativeVerdict: it takes too long; the worker will do this one as well.
    """
    holder, until = leases.this_process(), time.monotonic() + LEASE_WAIT_S
    while leases.acquire(database, LEASE, holder, ttl_s=LEASE_S, now=now()) is None and time.monotonic() < until:
        time.sleep(POLL_S)
    with leases.held(database, LEASE, holder, ttl_s=LEASE_S, clock=now):
        yield


def subject_from(user: str | None, key: str | None, completion: str | None) -> Subject:
    """What the options mean.

    Raises:
        ConfigurationError: nobody, or two things at once.
    """
    if (user is None) == (completion is None):
        raise refuse("name either --user or --completion")
    if completion is None:
        if not user:
            raise refuse("--user must not be empty")
        return Subject(user, key)
    suffix = ids.completion_suffix(completion)
    if suffix is None or key is not None:
        raise refuse("--key goes with --user" if suffix else f"{completion} is no completion id")
    return Subject(completion=suffix)


def erase_now(
    settings: Settings, eraser: Eraser, tombstone: Tombstone, subject: Subject, is_rewriting: bool, wait_s: float
) -> dict[str, Any]:
    """Erase, and say what was removed, what had learned from it, and who has not confirmed yet."""
    grave = eraser.bury(tombstone, is_rewriting=is_rewriting)
    with erasing_alone(eraser.database):
        found = eraser.erase(grave, subject).as_json()
    settle_here(settings, eraser.database)
    shown = {"removed": found["counts"], "runs": found["runs"], "models": found["models"]}
    return shown | outcome(eraser, grave, wait_s)


def eraser_of(settings: Settings, database: Database, *, actor: str) -> Eraser:
    """With what this configuration says."""
    return Eraser(
        database=database,
        secret=signing_secret(settings.auth, settings.state_dir),
        state_dir=settings.state_dir,
        runs_dir=settings.retrain.runs_dir,
        limit_subject=subject_of,
        actor=actor,
        clock=now,
    )


def foreseen(eraser: Eraser, subject: Subject) -> dict[str, Any]:
    """What an erasure would find; nothing is changed."""
    if subject.completion is not None:
        raise refuse("--dry-run needs --user")
    person = Person(subject.user or "", subject.key_id, eraser.clock())
    with eraser.database.read() as connection:
        return {"would_remove": dict(count_for(connection, person)), "would_mark": models_of(connection, person)}


def reapply_file(eraser: Eraser, path: Path) -> dict[str, Any]:
    """Bury what a file says, wherever the database has come from, and do all that is open.

    Raises:
        ConfigurationError: there are no tombstones in the file.
    """
    if not TombstoneFile(path).read():
        raise refuse(f"{path} holds no tombstones")
    with erasing_alone(eraser.database):
        TombstoneBook(eraser.database, path, eraser.secret, clock=eraser.clock).copy_both_ways()
        return {"reapplied": [report.as_json() for report in eraser.finish_open()]}


def outcome(eraser: Eraser, grave: Grave, wait_s: float) -> dict[str, Any]:
    """Which gateways have taken it out of their files, and what is odd."""
    late, absent = await_places(eraser.database, grave.number, wait_s)
    shown: dict[str, Any] = {"tombstone": grave.number, "unconfirmed": late, "absent": absent}
    return shown | ({"warning": OTHER_SECRET} if is_secret_odd(eraser) else {})


OTHER_SECRET = "the newest completion was not signed with this secret: run where the gateways' auth.secret is at hand"


def is_secret_odd(eraser: Eraser) -> bool:
    """Whether the gateways sign with another secret: then no tombstone made here means anything to them."""
    with eraser.database.read() as connection:
        newest = newest_interaction(connection)
    return newest is not None and not is_owner(eraser.secret, newest.id, newest.key_id, newest.user_id or "")


def await_places(database: Database, number: int, wait_s: float) -> tuple[list[str], list[str]]:
    """The drains that are alive and have not confirmed in time, and those that will when they are back."""
    until = time.monotonic() + wait_s
    while True:
        behind = [place for place in places(database) if place.number < number]
        late = [place.name for place in behind if now() - place.seen_at < ALIVE_S]
        if not late or time.monotonic() >= until:
            return late, [place.name for place in behind if place.name not in late]
        time.sleep(POLL_S)


def settle_here(settings: Settings, database: Database) -> None:
    """Bring over, and wipe, what lies on this machine and no gateway looks after."""
    directory = settings.state_dir / "spool"
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("gateway-*.db")):
        with suppress(SpoolUnavailable):  # Its gateway lives, and does this by itself.
            empty_spool(settings, database, path)
    journals = drain_of(settings, database)
    drain_whole(journals)
    journals.stop(0.0)


def drain_whole(drain: DrainThread) -> None:
    """All that is there; what became due about its files in the last pass is done in one more."""
    while drain.drain_once():
        pass
    drain.drain_once()


def empty_spool(settings: Settings, database: Database, path: Path) -> None:
    """What the gateway would do that last wrote there."""
    prepared = preparation_of(settings.serving.guards)
    secret = signing_secret(settings.auth, settings.state_dir)
    spool = Spool(path)
    try:
        drain = Drain(
            spool,
            database,
            clock=now,
            prepare_event=prepared.event,
            prepare_letter=prepared.letter,
            erasures=open_watch(database, settings.state_dir, secret, path, clock=now),
        )
        drain_whole(drain)
    finally:
        spool.close()
