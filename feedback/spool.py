"""The local spool: what the gateway has acknowledged is in this file before the client hears of it.

One SQLite file that only this process writes (WAL, `synchronous=FULL`). One thread owns the only connection: SQLite
before 3.51.3 can corrupt a WAL file that several connections write. It takes everything that waits, runs it in one
transaction and one fsync (group commit), and only then tells the callers.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import structlog

from feedback.errors import SpoolUnavailable
from feedback.segment_files import hold

log = structlog.get_logger()

Connection = sqlite3.Connection
T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]

MAX_GROUP = 512
"""Operations in one commit: enough to amortise an fsync, few enough to keep a commit short."""
MAX_WAITING = 20_000
"""Operations that may wait for the disk before new ones are refused."""
MAX_TAKEN_BYTES = 8 * 1024 * 1024
"""Of records taken from the file at once, so that a backlog of large ones fits into a small machine's memory."""
CLOSE_S = 10.0
"""How long closing waits for the disk; one that has taken longer does not come back."""
HANGS = "nothing that was acknowledged is lost, and the next start brings it over; see to the disk of state_dir"
LOCK_PATIENCE_S = 1.0
"""Another gateway that starts now may hold the lock for a moment, to see whether this file is an orphan."""
PROBE = bytes(16 * 1024)
"""Large enough to need pages of its own on a full disk."""

REPEATS = """(
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    body_sha TEXT NOT NULL,
    status INTEGER NOT NULL,
    at REAL NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID"""
"""Calls that may come again. Digests, a status and times: no text and no name."""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    subject TEXT NOT NULL,
    at REAL NOT NULL,
    meta BLOB NOT NULL,
    request BLOB,
    response BLOB
);
CREATE INDEX IF NOT EXISTS records_by_id ON records (kind, id);
DROP INDEX IF EXISTS records_by_subject;
DROP TABLE IF EXISTS answers;
CREATE TABLE IF NOT EXISTS repeats {REPEATS};
CREATE INDEX IF NOT EXISTS repeats_by_end ON repeats (until);
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
ADOPT = """
BEGIN IMMEDIATE;
INSERT INTO main.records (kind, id, subject, at, meta, request, response)
    SELECT kind, id, subject, at, meta, request, response FROM orphan.records AS theirs
    WHERE NOT EXISTS (SELECT 1 FROM main.records AS ours WHERE ours.kind = theirs.kind AND ours.id = theirs.id)
    ORDER BY seq;
INSERT OR IGNORE INTO main.repeats SELECT * FROM orphan.repeats;
COMMIT;
DELETE FROM orphan.records;
DELETE FROM orphan.repeats;
VACUUM orphan;
"""


class SpoolRecord(NamedTuple):
    """One row on its way to the shared database."""

    seq: int
    kind: str
    """`interaction` or `feedback`."""
    id: str
    subject: str
    """What the row is about: the interaction's id, or the feedback id."""
    at: float
    meta: bytes
    request: bytes | None
    response: bytes | None


class SpoolSize(NamedTuple):
    """How much waits for the shared database."""

    rows: int
    oldest_at: float | None


class Spool:
    """The file and its writer thread. Every method may be called from any thread; each returns a future."""

    def __init__(self, path: Path, *, orphans: Sequence[Path] = ()) -> None:
        """Open the file, and first take over what is left in `orphans` that no living process holds."""
        self.path = path
        self.is_healthy = True
        self._is_closed = False
        self._is_untidy = False
        self._waiting: queue.Queue[tuple[Operation, Future[Any]] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._lock_file = _lock(path, patience_s=LOCK_PATIENCE_S)
        self._connection: sqlite3.Connection | None = _open(path)
        for orphan in orphans:
            adopt(self._connection, orphan)
        self._thread.start()

    def submit(self, operation: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run `operation` inside the next commit; the future resolves after that commit is on disk.

        Raises (through the future):
            SpoolUnavailable: the disk refused it, or too much waits already. Nothing of it was kept.
        """
        future: Future[T] = Future()
        # Never cancellable: a caller that leaves must not undo a record, nor stop the writer that answers it.
        future.set_running_or_notify_cancel()
        if self._is_closed:
            future.set_exception(SpoolUnavailable("the spool is closed"))
            return future
        try:
            self._waiting.put_nowait((operation, future))
        except queue.Full:
            future.set_exception(SpoolUnavailable("too many records wait for the disk"))
        return future

    def append(self, record: SpoolRecord) -> Future[None]:
        """Make one record durable. Its `seq` is ignored; the file gives it one."""
        return self.submit(lambda connection: insert(connection, record))

    def oldest(self, limit: int) -> Future[list[SpoolRecord]]:
        """The first records, in the order they were acknowledged: at most `limit`, and of many large ones fewer."""

        def query(connection: sqlite3.Connection) -> list[SpoolRecord]:
            rows = connection.execute(
                "SELECT seq, kind, id, subject, at, meta, request, response FROM records ORDER BY seq LIMIT ?", (limit,)
            )
            return within_bytes((SpoolRecord(*row) for row in rows), MAX_TAKEN_BYTES)

        return self.submit(query)

    def discard(self, seqs: Sequence[int]) -> Future[None]:
        """Forget records that the shared database has committed."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM records WHERE seq = ?", [(seq,) for seq in seqs])

        return self.submit(delete)

    def size(self) -> Future[SpoolSize]:
        """Rows waiting, and when the oldest was acknowledged."""

        def query(connection: sqlite3.Connection) -> SpoolSize:
            return SpoolSize(*connection.execute("SELECT count(*), min(at) FROM records").fetchone())

        return self.submit(query)

    def keep(self, name: str, value: bytes) -> Future[None]:
        """Remember a small value across restarts, such as the last known routing table."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (name, value))

        return self.submit(write)

    def kept(self, name: str) -> Future[bytes | None]:
        """What `keep` remembered."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute("SELECT value FROM kept WHERE name = ?", (name,)).fetchone()
            return row[0] if row else None

        return self.submit(read)

    def tidy(self) -> Future[None]:
        """Leave nothing of discarded records in the files: their places hold zeros, and the log is cut to nothing."""
        self._is_untidy = True
        return self.submit(lambda _: None)

    def probe(self) -> Future[None]:
        """Find out whether the disk takes writes again."""
        return self.keep("probe", PROBE)

    def close(self) -> None:
        """Commit what waits, then stop; leave a disk that hangs alone after `CLOSE_S`. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        until = time.monotonic() + CLOSE_S
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(max(0.0, until - time.monotonic()))
        self._refuse_late_comers()
        if self._thread.is_alive():
            self._waiting.put_nowait(None)  # Should the disk come back, the thread ends after what it is at.
            log.error("spool_hangs", path=str(self.path), waited_s=CLOSE_S, advice=HANGS)

    def _refuse_late_comers(self) -> None:
        """Answer what was submitted while the spool closed, or will not be written, so that nobody waits for ever."""
        with suppress(queue.Empty):
            while True:
                if item := self._waiting.get_nowait():
                    item[1].set_exception(SpoolUnavailable("the spool is closed"))

    def _run(self) -> None:
        while True:
            group, is_last = self._next_group()
            if group:
                self._commit(group)
            if self._is_untidy:
                self._cut_log()
            if is_last:
                self._end()
                return

    def _end(self) -> None:
        self._cut_log()  # SQLite would, if nobody else were reading.
        self._disconnect()
        self._lock_file.close()

    def _next_group(self) -> tuple[list[tuple[Operation, Future[Any]]], bool]:
        """Wait for one operation, then take all that came with it."""
        group: list[tuple[Operation, Future[Any]]] = []
        item = self._waiting.get()
        while item is not None:
            group.append(item)
            if len(group) == MAX_GROUP:
                return group, False
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, group: Iterable[tuple[Operation, Future[Any]]]) -> None:
        try:
            outcomes = self._run_in_one_transaction(group)
        except (sqlite3.Error, SpoolUnavailable) as exc:
            # After a failed commit or fsync the connection's view of the file is not to be trusted: start over.
            self.is_healthy = False
            self._disconnect()
            outcomes = [(future, _unavailable(self.path, exc)) for _, future in group]
        for future, outcome in outcomes:
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _run_in_one_transaction(self, group: Iterable[tuple[Operation, Future[Any]]]) -> list[tuple[Future[Any], Any]]:
        if self._connection is None:
            self._connection = _open(self.path)
        connection = self._connection
        changes = connection.total_changes
        connection.execute("BEGIN IMMEDIATE")
        outcomes = [(future, _attempt(connection, operation)) for operation, future in group]
        connection.execute("COMMIT")
        if connection.total_changes > changes:  # Reading proves nothing about a full disk; a committed write does.
            self.is_healthy = True
        return outcomes

    def _cut_log(self) -> None:
        self._is_untidy = False
        if self._connection is not None:
            with suppress(sqlite3.Error):  # It is only put off: the next commits overwrite the log.
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _attempt(connection: sqlite3.Connection, operation: Operation) -> Any:
    """One operation inside the group's transaction; one that fails for reasons of its own leaves the others alone."""
    connection.execute("SAVEPOINT one")
    try:
        result = operation(connection)
    except sqlite3.OperationalError:
        raise  # The disk is full or failing: nothing of the group can be promised.
    except Exception as exc:  # noqa: BLE001 - handed to the caller through its future
        connection.execute("ROLLBACK TO one")
        result = exc
    connection.execute("RELEASE one")
    return result


def _unavailable(path: Path, exc: Exception) -> SpoolUnavailable:
    return exc if isinstance(exc, SpoolUnavailable) else SpoolUnavailable(f"the spool {path} cannot be written: {exc}")


def insert(connection: sqlite3.Connection, record: SpoolRecord) -> None:
    """Add one record, unless one of its kind and id waits already."""
    connection.execute(
        "INSERT INTO records (kind, id, subject, at, meta, request, response) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7"
        " WHERE NOT EXISTS (SELECT 1 FROM records WHERE kind = ?1 AND id = ?2)",
        record[1:],
    )


def within_bytes(records: Iterable[SpoolRecord], limit: int) -> list[SpoolRecord]:
    """As many of the first records as fit, and one in any case."""
    taken: list[SpoolRecord] = []
    size = 0
    for record in records:
        size += sum(len(part) for part in (record.meta, record.request, record.response) if part)
        if taken and size > limit:
            break
        taken.append(record)
    return taken


def adopt(connection: sqlite3.Connection, orphan: Path) -> None:
    """Move the records of a spool whose process is gone, as after a change of port, into this one.

    They are durable here before they go there. A crash in between moves them again, and the shared database ignores the
    ids it has. The emptied file stays: a gateway may come back to it.
    """
    try:
        lock = _lock(orphan)
    except (SpoolUnavailable, OSError):
        return  # Its process lives, or it is not ours to touch.
    with lock:
        try:
            connection.execute("ATTACH ? AS orphan", (str(orphan),))
            connection.execute(f"CREATE TABLE IF NOT EXISTS orphan.repeats {REPEATS}")  # An earlier version's has none.
            n_left = connection.execute("SELECT count(*) FROM orphan.records").fetchone()[0]
            if n_left or connection.execute("SELECT 1 FROM orphan.repeats").fetchone():
                connection.executescript(ADOPT)
                log.info("spool_adopted", path=str(orphan), records=n_left)
        except sqlite3.Error as exc:
            log.warning("spool_not_adopted", path=str(orphan), reason=str(exc))
        finally:
            _detach(connection)


def _detach(connection: sqlite3.Connection) -> None:
    connection.rollback()
    with suppress(sqlite3.Error):  # Nothing was attached.
        connection.execute("DETACH orphan")


def _lock(path: Path, *, patience_s: float = 0.0) -> IO[str]:
    """Hold an advisory lock beside the file, so that two processes never share one spool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return hold(path.with_suffix(".lock").open("w"), path, patience_s=patience_s)


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")
        connection.executescript(SCHEMA)
    except sqlite3.Error as exc:
        raise SpoolUnavailable(f"the spool {path} cannot be opened: {exc}") from exc
    return connection
