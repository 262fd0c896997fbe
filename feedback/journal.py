"""The journal: what the gateway acknowledges is in here before the client gets its last byte.

Interactions come by the ten thousand a second, on the thread that also relays their bytes. So a record costs that
thread one join and one checksum; everything that came in one turn of the event loop then goes to a writer thread as one
group, which is one write and one flush with the interpreter's lock released, and comes back as one call on the loop. At
most one group is on its way at a time: the longer the disk takes, the larger the next group.

A segment that fails to write or to flush is given up: after a failed flush the kernel may have dropped the very pages
it could not write, and a second flush would report success ("fsyncgate"; Rebello et al., Can Applications Recover from
fsync Failures?, USENIX ATC 2020). Nothing is acknowledged again before a fresh segment has taken its header.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import structlog

from feedback.journal_reader import first_seq, last_seq, waiting_since
from feedback.segment_files import LOCK, lock, read_position, reserve_position
from feedback.segment_writer import SegmentWriter
from feedback.segments import CRC_BYTES, FRAME, SALT_BYTES
from feedback.spool import SpoolSize
from pawl.clock import Clock
from pawl.clock import now as wall_clock

log = structlog.get_logger()

Done = Callable[[bool], None]

MAX_GROUP_RECORDS = 500
"""Each is two buffers of a vectored write, which takes 1024."""
MAX_GROUP_BYTES = 4 * 1024**2
MAX_WAITING_BYTES = 64 * 1024**2
"""Of records that wait for the disk; more are refused."""
CLOSE_PATIENCE_S = 5.0
HANGING_S = 10.0
"""A write that has taken longer does not come back: the disk counts as refusing until it does."""
SIBLINGS = 5
HOLD_S = 0.001
"""After a group of at least so many the next one is held for so long, and grows: a write costs the same for five
records as for fifty. PostgreSQL does the same with `commit_siblings` and `commit_delay`. That many in the time of one
write are thousands a second, so a quiet gateway never waits."""
LOCK_PATIENCE_S = 1.0
"""A drain that looks whether this directory is abandoned holds the lock for a moment."""


class Group:
    """Records that share one write."""

    __slots__ = ("dones", "last_seq", "n_bytes", "parts")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.dones: list[Done] = []
        self.n_bytes = 0
        self.last_seq = 0


class Journal:
    """One directory, one writer. `append` and `bind` belong to the event loop's thread; `close` to any."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        segment_bytes: int,
        on_durable: Callable[[], None] = lambda: None,
        clock: Clock = wall_clock,
    ) -> None:
        """Lock the directory and find out where its last writer stopped.

        Raises:
            SpoolUnavailable: another process writes there, or the directory cannot be used.
        """
        self.directory = directory
        segment_bytes = min(segment_bytes, max_bytes // 4)  # The one being written is never drained to its end.
        self._lock_file = lock(directory / LOCK, patience_s=LOCK_PATIENCE_S)
        reserve_position(directory)
        self._salt = os.urandom(SALT_BYTES)
        self._clock = clock
        self._on_durable = on_durable
        self._max_group_bytes = min(MAX_GROUP_BYTES, segment_bytes // 4)
        self._last_seq = last_seq(directory)
        self._writer = SegmentWriter(
            directory, self._salt, self._last_seq, max_bytes=max_bytes, segment_bytes=segment_bytes, clock=clock
        )
        self._floor = first_seq(directory, self._last_seq) - 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._filling = Group()
        self._filled: deque[Group] = deque()
        self._n_waiting_bytes = 0
        self._is_busy = False
        self._is_closed = False
        self._written_since = 0.0
        self._groups: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._worker.start()

    @property
    def is_healthy(self) -> bool:
        """False from a failed write until the disk has taken a fresh segment, and while a write hangs."""
        return self._writer.is_healthy and (not self._written_since or self._clock() - self._written_since < HANGING_S)

    @property
    def is_full(self) -> bool:
        """No new work should be taken on: what is left is for the requests that run."""
        return self._writer.is_full or self._n_waiting_bytes > MAX_WAITING_BYTES // 2

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that appends, and on which `done` and `on_durable` are called."""
        self._loop = loop

    def append(self, meta: bytes, request: bytes, response: bytes, done: Done) -> None:
        """Keep one record; `done(True)` once it is on disk, `done(False)` if it is not kept. Never blocks."""
        loop = self._loop
        assert loop is not None, "bind() comes first"
        if self._is_closed or not self._writer.is_healthy or self._n_waiting_bytes > MAX_WAITING_BYTES:
            loop.call_soon(done, False)
            return
        seq = self._last_seq = self._last_seq + 1
        head = FRAME.pack(self._salt, seq, self._clock(), len(meta), len(request), len(response))
        frame = b"".join((head, meta, request, response))
        group = self._filling
        group.parts += (frame, zlib.crc32(frame).to_bytes(CRC_BYTES, "little"))
        group.dones.append(done)
        n_bytes = len(frame) + CRC_BYTES
        group.n_bytes += n_bytes
        group.last_seq = seq
        self._n_waiting_bytes += n_bytes
        if not self._is_busy:
            self._is_busy = True
            loop.call_soon(self._hand_over)  # After this turn of the loop, with all that it still brings.
        elif group.n_bytes > self._max_group_bytes or len(group.dones) >= MAX_GROUP_RECORDS:
            self._filled.append(group)
            self._filling = Group()

    def size(self) -> SpoolSize:
        """Records on disk that the database has not committed yet; a few small reads of files in the page cache.

        Counted by sequence numbers, so also those count for a while that the disk refused half-way.
        """
        position = read_position(self.directory)
        drained = max(position.seq if position else 0, self._floor)
        rows = max(0, self._writer.kept_seq - drained)
        return SpoolSize(rows, waiting_since(self.directory, position) if rows else None)

    def close(self) -> None:
        """Commit what waits, then stop. Safe to call twice. Every `done` was called, or is the running loop's next."""
        if not self._is_closed:
            self._stop_taking()
            self._worker.join(HANGING_S)
            if self._worker.is_alive():
                log.error("journal_hangs", directory=str(self.directory))
                return
            self._writer.close()
            self._lock_file.close()

    def _stop_taking(self) -> None:
        """End the appending on the loop's own thread, so that no record slips in between."""
        loop = self._loop
        if loop is None or not loop.is_running() or asyncio._get_running_loop() is loop:
            self._hand_over_the_last()
            return
        is_over = threading.Event()
        loop.call_soon_threadsafe(self._hand_over_the_last)
        loop.call_soon_threadsafe(is_over.set)
        is_over.wait(CLOSE_PATIENCE_S)

    def _hand_over_the_last(self) -> None:
        self._is_closed = True
        for group in (*self._filled, self._filling):
            if group.dones:
                self._groups.put(group)
        self._filled.clear()
        self._filling = Group()
        self._groups.put(None)

    def _hand_over(self) -> None:
        if self._is_closed:
            return
        if self._filled:
            self._groups.put(self._filled.popleft())
        elif self._filling.dones:
            self._groups.put(self._filling)
            self._filling = Group()
        else:
            self._is_busy = False

    def _collect(self, group: Group, is_kept: bool) -> None:
        """On the loop: send the next group off, then tell everyone in this one."""
        if self._loop is not None and not self._filled and len(group.dones) >= SIBLINGS and not self._is_closed:
            self._loop.call_later(HOLD_S, self._hand_over)
        else:
            self._hand_over()
        self._n_waiting_bytes -= group.n_bytes
        for done in group.dones:
            try:
                done(is_kept)
            except Exception as exc:  # noqa: BLE001 - one request's trouble must not keep the others waiting
                log.error("journal_callback_failed", reason=type(exc).__name__)
        if is_kept:
            self._on_durable()

    def _run(self) -> None:
        while True:
            try:
                group = self._groups.get(timeout=self._writer.pause_s)
            except queue.Empty:
                self._writer.keep_house()
                continue
            if group is None:
                return
            self._written_since = self._clock()
            is_kept = self._writer.write(group.parts, group.n_bytes, group.last_seq)
            self._written_since = 0.0
            self._report(group, is_kept)

    def _report(self, group: Group, is_kept: bool) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._collect, group, is_kept)
        except RuntimeError:  # The loop is closed: nobody else can call them any more.
            self._collect(group, is_kept)
