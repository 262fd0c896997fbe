"""A gateway's line to the writer of its journal: two pipes, and who is at their other end.

The writer is a process of its own where the gateway is one of several processes, and a thread where everything is in
one process: the same code either way.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

from feedback.journal_writer import GROUP, STATE, Plan, State, work
from pawl.clock import Clock

PIPE_BYTES = 1024 * 1024
"""Groups are seldom larger; what does not fit waits here until the writer has taken what does."""
HEARD_BYTES = 64 * STATE.size


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


class ThreadCarrier:
    """A writer on a thread of this process."""

    def __init__(self, plan: Plan, incoming: int, outgoing: int, clock: Clock) -> None:
        self._thread = threading.Thread(
            target=work, args=(plan, incoming, outgoing, clock), name="journal-writer", daemon=True
        )
        with closed_on_failure(incoming, outgoing):
            self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """See `Carrier`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


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


def as_thread(clock: Clock) -> StartWriter:
    """Writers are threads of this process."""
    return lambda plan, incoming, outgoing, _: ThreadCarrier(plan, incoming, outgoing, clock)


def as_process(plan: Plan, incoming: int, outgoing: int, lock: int) -> Carrier:
    """Writers are processes."""
    return ProcessCarrier(plan, incoming, outgoing, lock)


class Line:
    """This side of the pipes. Nothing blocks but `wait` and `close`."""

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

    def send(self, parts: Sequence[bytes], n_bytes: int, last_seq: int) -> bool:
        """Send a group; False if part of it has to wait for `send_rest`.

        Raises:
            OSError: nobody is there any more, or the system is out of memory.
        """
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
        """Send what had to wait, as far as it goes now; whether that was all.

        Raises:
            OSError: as above.
        """
        unsent = self._unsent
        with suppress(BlockingIOError):
            while unsent:
                unsent[0] = unsent[0][os.write(self.sending, unsent[0]) :]
                if not unsent[0]:
                    unsent.popleft()
        return not unsent

    def hear(self) -> list[State]:
        """What the writer has said since.

        Raises:
            EOFError: it has ended.
        """
        try:
            heard = os.read(self.hearing, HEARD_BYTES)
        except BlockingIOError:
            return []
        if not heard:
            raise EOFError("the journal's writer has ended")
        return [State._make(fields) for fields in STATE.iter_unpack(heard)]

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to hear, or room to send the rest."""
        poll = select.poll()
        poll.register(self.hearing, select.POLLIN)
        if self._unsent:
            poll.register(self.sending, select.POLLOUT)
        poll.poll(max(0.0, timeout_s) * 1000)

    def close(self) -> None:
        """Hang up: the writer ends when it has written what it was sent."""
        os.close(self.sending)
        os.close(self.hearing)
