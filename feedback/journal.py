"""The journal: what the gateway acknowledges is in here before the client gets its last byte.

Interactions come by the ten thousand a second, on the thread that also relays their bytes. So a record costs that
thread one join and one checksum; everything that came in one turn of the event loop then goes to a writer as one group,
which is one write and one flush, and comes back as one event on the loop (`feedback.journal_line`). At most one group
is on its way at a time: the longer the disk takes, the larger the next group.

Where there is a core for it the writer is a process of its own: a thread has to get the interpreter's lock back after
every write, from an event loop that has it nearly always. Where there is none, that still costs less than a process.

A segment that fails to write or to flush is given up: after a failed flush the kernel may have dropped the very pages
it could not write, and a second flush would report success ("fsyncgate"; Rebello et al., Can Applications Recover from
fsync Failures?, USENIX ATC 2020). Nothing is acknowledged again before a fresh segment has taken its header.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
from zlib_ng.zlib_ng import crc32

from feedback.journal_line import Carrier, Line, PipeLine, StartWriter, ThreadLine
from feedback.journal_reader import first_seq, last_seq, waiting_since
from feedback.journal_writer import Plan, State
from feedback.segment_files import LOCK, lock, read_position, reserve_position
from feedback.segments import CRC_BYTES, FRAME, SALT_BYTES
from feedback.spool import HANGS, SpoolSize
from pawl.clock import Clock
from pawl.clock import now as wall_clock

log = structlog.get_logger()

Done = Callable[[bool], None]

MAX_GROUP_RECORDS: Final = 500
"""Each is two buffers of a vectored write, which takes 1024."""
MAX_GROUP_BYTES: Final = 4 * 1024**2
MAX_WAITING_BYTES: Final = 64 * 1024**2
"""Of records that wait for the disk; more are refused."""
CLOSE_PATIENCE_S: Final = 5.0
HANGING_S: Final = 10.0
"""A write that has taken longer does not come back: the disk counts as refusing until it does."""
SIBLINGS: Final = 5
HOLD_S: Final = 0.002
"""After a group of at least so many the next one is held for up to so long, until it has half of the requests under
way: a write costs the same for five records as for fifty, and while one half is written the other is worked on.
PostgreSQL waits likewise with `commit_siblings` and `commit_delay`."""
SMALL_BYTES: Final = 64 * 1024
"""A group of less is held until it has three quarters: it is on disk before the last quarter has been worked on."""
CROWD: Final = 100
CROWD_HOLD_S: Final = 0.005
"""With so many under way a smaller group is followed by such a wait too: slow streams end one by one, and a write for
each takes from the time of all others. Of a stream only the mark of its end waits; of a whole answer, all of it."""
RESTART_S: Final = 0.5
LONGEST_PAUSE_S: Final = 10.0
"""A writer that has ended by itself is replaced after this time; one after another, after ever longer ones."""
LOCK_PATIENCE_S: Final = 1.0
"""A drain that looks whether this directory is abandoned holds the lock for a moment."""


class Group:
    """Records that share one write."""

    __slots__ = ("dones", "last_seq", "n_bytes", "parts")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.dones: list[Done] = []
        self.n_bytes = 0
        self.last_seq = 0


def hold_after(n_records: int, n_under_way: int) -> float:
    """How long the group that follows one of so many records may be held, in seconds."""
    if n_records >= SIBLINGS:
        return HOLD_S
    return CROWD_HOLD_S if n_under_way >= CROWD else 0.0


def _nobody() -> int:
    return 0


def _nothing() -> None:
    """Do nothing."""


class Journal:
    """One directory, one writer. `append` and `bind` belong to the event loop's thread; `close` to any."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        segment_bytes: int,
        clock: Clock = wall_clock,
        start_writer: StartWriter | None = None,
    ) -> None:
        """Lock the directory and find out where its last writer stopped.

        Args:
            start_writer: `journal_line.as_process`; None: a thread of this process.

        Raises:
            SpoolUnavailable: another process writes there, or the directory cannot be used.
        """
        self.directory = directory
        segment_bytes = min(segment_bytes, max_bytes // 4)  # The one being written is never drained to its end.
        self._lock_file = lock(directory / LOCK, patience_s=LOCK_PATIENCE_S)
        reserve_position(directory)
        self._salt = os.urandom(SALT_BYTES)
        self._clock = clock
        self._max_group_bytes = min(MAX_GROUP_BYTES, segment_bytes // 4)
        self._last_seq = last_seq(directory)
        self._floor = first_seq(directory, self._last_seq) - 1
        self._plan = Plan(directory, self._salt, self._last_seq, max_bytes, segment_bytes)
        self._start_writer = start_writer
        self._state = State(self._last_seq, 0, is_answer=False, is_kept=False, is_healthy=True, is_full=False)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._filling = Group()
        self._filled: deque[Group] = deque()
        self._sent: deque[Group] = deque()
        self._n_waiting_bytes = 0
        self._is_busy = False
        self._is_closed = False
        self._written_since = 0.0
        self._n_under_way: Callable[[], int] = _nobody
        self._after_group: Callable[[], None] = _nothing
        self._hold: asyncio.TimerHandle | None = None
        self._n_expected = 0
        self._ended: list[Carrier] = []
        self._opening: Future[Line] | None = None
        self._restart_pause_s = RESTART_S
        self._line: Line | None = self._open_line()

    @property
    def is_healthy(self) -> bool:
        """False from a failed write until the disk has taken a fresh segment, and while a write hangs."""
        return self._state.is_healthy and (not self._written_since or self._clock() - self._written_since < HANGING_S)

    @property
    def is_full(self) -> bool:
        """No new work should be taken on: what is left is for the requests that run."""
        return self._state.is_full or self._n_waiting_bytes > MAX_WAITING_BYTES // 2

    @property
    def kept_seq(self) -> int:
        """The last record that is known to be on disk; they are counted from 1."""
        return self._state.kept_seq

    def bind(
        self,
        loop: asyncio.AbstractEventLoop,
        n_under_way: Callable[[], int] = _nobody,
        after_group: Callable[[], None] = _nothing,
    ) -> None:
        """The loop that appends, and on which `done` and `after_group` are called.

        Args:
            n_under_way: how many requests may still append, those that wait for the disk included.
            after_group: called when the writer has answered for a group and everybody in it has been told.
        """
        self._loop, self._n_under_way, self._after_group = loop, n_under_way, after_group
        if self._line is not None:
            self._line.attach(loop, self._hear)

    def append(self, meta: bytes, request: bytes, response: bytes, done: Done) -> None:
        """Keep one record; `done(True)` once it is on disk, `done(False)` if it is not kept. Never blocks."""
        loop = self._loop
        assert loop is not None, "bind() comes first"
        if self._is_closed or not self._state.is_healthy or self._n_waiting_bytes > MAX_WAITING_BYTES:
            loop.call_soon(done, False)
            return
        seq = self._last_seq = self._last_seq + 1
        head = FRAME.pack(self._salt, seq, self._clock(), len(meta), len(request), len(response))
        frame = b"".join((head, meta, request, response))
        group = self._filling
        group.parts += (frame, crc32(frame).to_bytes(CRC_BYTES, "little"))
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
            self._end_hold()
        elif self._hold is not None and self._is_enough(group):
            self._end_hold()

    def size(self) -> SpoolSize:
        """Records on disk that the database has not committed yet; a few small reads of files in the page cache.

        Counted by sequence numbers, so also those count for a while that the disk refused half-way.
        """
        position = read_position(self.directory)
        drained = max(position.seq if position else 0, self._floor)
        rows = max(0, self.kept_seq - drained)
        return SpoolSize(rows, waiting_since(self.directory, position) if rows else None)

    # Groups on their way.

    def _hand_over(self) -> None:
        if self._is_closed or self._line is None:
            return
        if self._filled:
            self._send(self._line, self._filled.popleft())
        elif self._filling.dones:
            group, self._filling = self._filling, Group()
            self._send(self._line, group)
        else:
            self._is_busy = False

    def _send(self, line: Line, group: Group) -> None:
        self._sent.append(group)
        self._written_since = self._clock()
        try:
            is_sent = line.send(group.parts, group.n_bytes, group.last_seq)
        except OSError:
            self._writer_ended(line)
            return
        if not is_sent and self._loop is not None:
            line.when_room(self._loop, self._send_rest)

    def _send_rest(self) -> None:
        line, loop = self._line, self._loop
        assert line is not None
        assert loop is not None
        try:
            is_sent = line.send_rest()
        except OSError:
            self._writer_ended(line)
            return
        if is_sent:
            line.when_room(loop, None)

    def _hear(self) -> None:
        assert self._line is not None
        try:
            states = self._line.hear()
        except EOFError:
            self._writer_ended(self._line)
            return
        for state in states:
            if self._line is not None and (group := self._note(state)):
                self._collect(group, state.is_kept)

    def _note(self, state: State) -> Group | None:
        """Take in what the writer says; return the group that it is about, if any."""
        before, self._state = self._state, state
        if before.is_healthy and not state.is_healthy:
            log.error("journal_unwritable", directory=str(self.directory), reason=os.strerror(state.error))
        elif state.is_healthy and not before.is_healthy:
            self._restart_pause_s = RESTART_S
            log.info("journal_writable_again", directory=str(self.directory))
        if not state.is_answer:
            return None
        self._written_since = 0.0
        return self._sent.popleft()

    def _collect(self, group: Group, is_kept: bool) -> None:
        """On the loop: send the next group off, or let it grow first; then tell everyone in this one."""
        loop, n_under_way = self._loop, self._n_under_way()
        self._n_expected = n_under_way
        is_few = not self._filled and not self._is_enough(self._filling)
        hold_s = hold_after(len(group.dones), n_under_way)
        if loop is not None and is_few and hold_s and not self._is_closed:
            self._hold = loop.call_later(hold_s, self._end_hold)
        else:
            self._hand_over()
        self._tell(group, is_kept)
        self._after_group()

    def _is_enough(self, group: Group) -> bool:
        """Whether a group need not be held any longer."""
        n_wanted = self._n_expected * 3 // 4 if group.n_bytes < SMALL_BYTES else self._n_expected // 2
        return len(group.dones) >= n_wanted

    def _end_hold(self) -> None:
        """Have the group that grew sent off, after this turn of the loop."""
        if self._hold is not None and self._loop is not None:
            self._drop_hold()
            self._loop.call_soon(self._hand_over)

    def _drop_hold(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None

    def _tell(self, group: Group, is_kept: bool) -> None:
        self._n_waiting_bytes -= group.n_bytes
        for done in group.dones:
            try:
                done(is_kept)
            except Exception as exc:  # noqa: BLE001 - one request's trouble must not keep the others waiting
                log.error("journal_callback_failed", reason=type(exc).__name__)

    # The writer's life.

    def _open_line(self) -> Line:
        plan = self._plan._replace(last_seq=self.kept_seq)
        if self._start_writer is None:
            return ThreadLine(plan, self._clock)
        return PipeLine(self._start_writer, plan, self._lock_file.fileno())

    def _writer_ended(self, line: Line) -> None:
        """It was killed, or has failed in a way of its own: what waits is not kept, and another one takes its place."""
        assert self._loop is not None
        log.error("journal_writer_ended", directory=str(self.directory))
        self._leave_loop(line)
        self._line = None
        line.close()
        self._ended.append(line.carrier)
        self._state = self._state._replace(is_healthy=False, error=errno.EPIPE)
        self._written_since = 0.0
        self._loop.call_later(self._restart_pause_s, self._restart)
        self._restart_pause_s = min(2 * self._restart_pause_s, LONGEST_PAUSE_S)
        self._drop_hold()
        for group in self._take_all():
            self._tell(group, False)
        self._is_busy = False

    def _restart(self) -> None:
        """Start another one, on a thread: a system without memory may take long over it."""
        if self._is_closed or self._loop is None:
            return
        self._ended = [carrier for carrier in self._ended if not carrier.join(0.0)]
        threads = ThreadPoolExecutor(1, thread_name_prefix="journal-start")
        self._opening = threads.submit(self._open_line)
        threads.shutdown(wait=False)
        asyncio.wrap_future(self._opening, loop=self._loop).add_done_callback(self._install)

    def _install(self, opening: asyncio.Future[Line]) -> None:
        if self._is_closed or self._loop is None or opening.cancelled():
            return  # `close` looks after the line.
        self._opening = None
        if error := opening.exception():
            log.error("journal_writer_not_started", reason=str(error))
            self._loop.call_later(self._restart_pause_s, self._restart)
            return
        self._line = opening.result()
        self._line.attach(self._loop, self._hear)

    def _take_all(self) -> list[Group]:
        """Every group that has not been answered, in order."""
        groups = [group for group in (*self._sent, *self._filled, self._filling) if group.dones]
        self._sent.clear()
        self._filled.clear()
        self._filling = Group()
        return groups

    def _leave_loop(self, line: Line) -> None:
        if self._loop is not None and not self._loop.is_closed():
            line.detach(self._loop)

    # The end.

    def close(self) -> None:
        """Commit what waits, then stop. Safe to call twice. Every `done` was called, or is the running loop's next."""
        if self._is_closed:
            return
        if not self._stop_taking():
            log.error("journal_hangs", directory=str(self.directory), advice=HANGS)
            return
        lines = [line for line in (self._line, self._line_being_opened()) if line is not None]
        for line in lines:
            self._finish(line)
            line.close()
        self._line = None
        if all(carrier.join(HANGING_S) for carrier in (*self._ended, *(line.carrier for line in lines))):
            self._lock_file.close()
        else:
            log.error("journal_hangs", directory=str(self.directory), advice=HANGS)

    def _line_being_opened(self) -> Line | None:
        """The line to a writer that replaces one that has ended, if it is under way just now."""
        if self._opening is not None:
            with suppress(OSError, RuntimeError, TimeoutError):
                return self._opening.result(HANGING_S)
        return None

    def _stop_taking(self) -> bool:
        """End the appending on the loop's own thread, so that no record slips in between; whether that was done."""
        loop = self._loop
        if loop is None or not loop.is_running() or asyncio._get_running_loop() is loop:
            self._take_no_more()
            return True
        is_over = threading.Event()
        loop.call_soon_threadsafe(self._take_no_more)
        loop.call_soon_threadsafe(is_over.set)
        return is_over.wait(CLOSE_PATIENCE_S)

    def _take_no_more(self) -> None:
        self._is_closed = True
        self._drop_hold()
        if self._line is not None:
            self._leave_loop(self._line)

    def _finish(self, line: Line) -> None:
        """Have the writer take all that waits, without the loop, and see what becomes of it."""
        n_sent = len(self._sent)
        groups = deque(self._take_all())
        until = time.monotonic() + HANGING_S
        try:
            for group in list(groups)[n_sent:]:
                line.send(group.parts, group.n_bytes, group.last_seq)
            while groups and time.monotonic() < until:
                line.wait(until - time.monotonic())
                line.send_rest()
                self._report_answered(line.hear(), groups)
        except OSError:
            with suppress(EOFError):  # It said something before it ended.
                self._report_answered(line.hear(), groups)
        except EOFError:
            log.error("journal_writer_ended", directory=str(self.directory))
        for group in groups:
            self._report(group, False)

    def _report_answered(self, states: Iterable[State], groups: deque[Group]) -> None:
        for state in states:
            if state.is_answer:
                self._state = state
                self._report(groups.popleft(), state.is_kept)

    def _report(self, group: Group, is_kept: bool) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # It is closed: nobody else can call them any more.
                loop.call_soon_threadsafe(self._collect, group, is_kept)
                return
        self._collect(group, is_kept)
