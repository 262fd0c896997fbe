"""A gateway's line to the writer of its journal, and who is at its other end.

The writer is a process of its own behind two pipes, or a thread of this process, which is handed the groups themselves.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from feedback.journal_writer import GROUP, STATE, Plan, State, open_writer, state_of
from feedback.segment_writer import SegmentWriter
from pawl.clock import Clock

PIPE_BYTES = 1024 * 1024
"""Groups are seldom larger; what does not fit waits here until the writer has taken what does."""
HEARD_BYTES = 64 * STATE.size
yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: None)
"""To whoever else can run on this core; Python lets go of its lock meanwhile."""


@contextmanager
def closed_on_failure(*descriptors: int) -> Iterator[None]:
    """Close these if the block fails."""
    try:
        yield
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


class Carrier(Protocol):
    """What runs a writer."""

    def join(self, timeout_s: float) -> bool:
        """Wait for its end, which comes when the line was closed; whether it came."""


StartWriter = Callable[[Plan, int, int, int], Carrier]
"""Start a writer that takes groups from the second argument and answers down the third, both of which are its own from
then on. The fourth is the lock of the journal's directory, to be held until the writer has ended."""


class ProcessCarrier:
    """A writer that is a process of its own."""

    def __init__(self, plan: Plan, incoming: int, outgoing: int, lock: int) -> None:
        command = [sys.executable, "-m", "feedback.journal_writer", str(incoming), str(outgoing)]
        try:
            self.process = subprocess.Popen(
                [*command, *plan.to_arguments()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=(incoming, outgoing, lock),
                process_group=0,
            )
        finally:
            os.close(incoming)
            os.close(outgoing)

    def join(self, timeout_s: float) -> bool:
        """See `Carrier`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.process.returncode is not None


def as_process(plan: Plan, incoming: int, outgoing: int, lock: int) -> Carrier:
    """Writers are processes."""
    return ProcessCarrier(plan, incoming, outgoing, lock)


class Line(Protocol):
    """This side of it. Nothing blocks but `wait` and `close`."""

    carrier: Carrier

    def attach(self, loop: asyncio.AbstractEventLoop, hear: Callable[[], None]) -> None:
        """Have `hear` called on the loop whenever there is something to hear."""

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have nothing called any more."""

    def when_room(self, loop: asyncio.AbstractEventLoop, send_rest: Callable[[], None] | None) -> None:
        """Have `send_rest` called while there is room for what had to wait; None: no longer."""

    def send(self, parts: Sequence[bytes], n_bytes: int, last_seq: int) -> bool:
        """Send a group; False if part of it has to wait for `send_rest`.

        Raises:
            OSError: nobody is there any more, or the system is out of memory.
        """
        ...

    def send_rest(self) -> bool:
        """Send what had to wait, as far as it goes now; whether that was all.

        Raises:
            OSError: as above.
        """
        ...

    def hear(self) -> list[State]:
        """What the writer has said since.

        Raises:
            EOFError: it has ended.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to hear, or room to send the rest."""

    def close(self) -> None:
        """Hang up: the writer ends when it has written what it was sent."""


class Handed(NamedTuple):
    """A group as a thread gets it."""

    parts: Sequence[bytes]
    n_bytes: int
    last_seq: int


class ThreadLine:
    """To a thread of this process, which also is its own carrier.

    Behind pipes a thread would need the interpreter's lock five times for a group, and each time it has to wait for an
    event loop that is at work. Here it does so twice: when it is given a group and when the disk has it. The first time
    the loop hands over the lock and the core: else the write would begin when the loop has nothing left to do, and
    the core would then stand still for as long as the disk takes.
    """

    def __init__(self, plan: Plan, clock: Clock) -> None:
        """
        Raises:
            RuntimeError: the system has no room for another thread.
        """
        self.carrier: Carrier = self
        self._groups: SimpleQueue[Handed | None] = SimpleQueue()
        self._said: SimpleQueue[State | None] = SimpleQueue()
        self._waited_for: deque[State | None] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hear: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._work, args=(plan, clock), name="journal-writer", daemon=True)
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop, hear: Callable[[], None]) -> None:
        """See `Line`."""
        self._loop, self._hear = loop, hear
        loop.call_soon(self._be_heard)  # Of what was said before.

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:  # noqa: ARG002 - as of pipes
        """See `Line`."""
        self._loop = self._hear = None

    def when_room(self, loop: asyncio.AbstractEventLoop, send_rest: Callable[[], None] | None) -> None:
        """See `Line`: nothing ever has to wait."""

    def _be_heard(self) -> None:
        while self._hear is not None and not self._said.empty():  # The end is heard after what was said before it.
            self._hear()

    def send(self, parts: Sequence[bytes], n_bytes: int, last_seq: int) -> bool:
        """See `Line`."""
        self._groups.put(Handed(parts, n_bytes, last_seq))
        yield_core()
        return True

    def send_rest(self) -> bool:
        """See `Line`."""
        return True

    def hear(self) -> list[State]:
        """See `Line`."""
        states: list[State] = []
        with suppress(Empty):
            while (state := self._next()) is not None:
                states.append(state)
            if not states:
                raise EOFError("the journal's writer has ended")
            self._said.put(None)  # For the next time.
        return states

    def _next(self) -> State | None:
        return self._waited_for.popleft() if self._waited_for else self._said.get_nowait()

    def wait(self, timeout_s: float) -> None:
        """See `Line`."""
        if not self._waited_for:
            with suppress(Empty):
                self._waited_for.append(self._said.get(timeout=max(0.0, timeout_s)))

    def close(self) -> None:
        """See `Line`."""
        self._groups.put(None)

    def join(self, timeout_s: float) -> bool:
        """See `Carrier`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The thread.

    def _work(self, plan: Plan, clock: Clock) -> None:
        try:
            writer = open_writer(plan, clock)
            try:
                self._write(writer)
            finally:
                writer.close()
        finally:
            self._say(None)

    def _write(self, writer: SegmentWriter) -> None:
        told = self._say(state_of(writer))
        while True:
            try:
                group = self._groups.get(timeout=writer.pause_s)
            except Empty:
                writer.keep_house()
                if state_of(writer) != told:
                    told = self._say(state_of(writer))
                continue
            if group is None:
                return
            is_kept = writer.write(*group)
            told = state_of(writer)
            self._say(told._replace(is_answer=True, is_kept=is_kept))

    def _say(self, state: State | None) -> State | None:
        self._said.put(state)
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # It is closed.
                loop.call_soon_threadsafe(self._be_heard)
        return state


class PipeLine:
    """To a process, through pipes."""

    def __init__(self, start_writer: StartWriter, plan: Plan, lock: int) -> None:
        """
        Raises:
            OSError, RuntimeError: the system has no room for another writer, or no descriptors.
        """
        incoming, self.sending = os.pipe()
        with ExitStack() as on_failure:
            on_failure.callback(os.close, self.sending)
            with closed_on_failure(incoming):
                self.hearing, outgoing = os.pipe()
            on_failure.callback(os.close, self.hearing)
            os.set_blocking(self.sending, False)
            os.set_blocking(self.hearing, False)
            with suppress(OSError):  # Users may have used up what the system grants them: then the pipe stays small.
                fcntl.fcntl(self.sending, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self.carrier = start_writer(plan, incoming, outgoing, lock)
            on_failure.pop_all()
        self._unsent: deque[memoryview] = deque()

    def attach(self, loop: asyncio.AbstractEventLoop, hear: Callable[[], None]) -> None:
        """See `Line`."""
        loop.add_reader(self.hearing, hear)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """See `Line`."""
        loop.remove_reader(self.hearing)
        loop.remove_writer(self.sending)

    def when_room(self, loop: asyncio.AbstractEventLoop, send_rest: Callable[[], None] | None) -> None:
        """See `Line`."""
        if send_rest is None:
            loop.remove_writer(self.sending)
        else:
            loop.add_writer(self.sending, send_rest)

    def send(self, parts: Sequence[bytes], n_bytes: int, last_seq: int) -> bool:
        """See `Line`."""
        whole = (GROUP.pack(n_bytes, last_seq), *parts)
        n_sent = 0
        if not self._unsent:
            with suppress(BlockingIOError):
                n_sent = os.writev(self.sending, whole)
            if n_sent == n_bytes + GROUP.size:
                return True
        self._unsent.append(memoryview(b"".join(whole))[n_sent:])
        return False

    def send_rest(self) -> bool:
        """See `Line`."""
        unsent = self._unsent
        with suppress(BlockingIOError):
            while unsent:
                unsent[0] = unsent[0][os.write(self.sending, unsent[0]) :]
                if not unsent[0]:
                    unsent.popleft()
        return not unsent

    def hear(self) -> list[State]:
        """See `Line`."""
        try:
            heard = os.read(self.hearing, HEARD_BYTES)
        except BlockingIOError:
            return []
        if not heard:
            raise EOFError("the journal's writer has ended")
        return [State._make(fields) for fields in STATE.iter_unpack(heard)]

    def wait(self, timeout_s: float) -> None:
        """See `Line`."""
        poll = select.poll()
        poll.register(self.hearing, select.POLLIN)
        if self._unsent:
            poll.register(self.sending, select.POLLOUT)
        poll.poll(max(0.0, timeout_s) * 1000)

    def close(self) -> None:
        """See `Line`."""
        os.close(self.sending)
        os.close(self.hearing)
