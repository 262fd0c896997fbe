"""A writer of a journal that waits for the disk in a process of its own: groups of frames come down one pipe, the
outcomes go up another.

Run as a process of its own (`python -m feedback.journal_writer`, started by `feedback.journal_line`), so that the
process that relays never waits for the interpreter's lock because of a write. It ends when its pipe does: a gateway
that is killed leaves nobody behind, and what it had sent whole is written still.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from feedback.segment_writer import SegmentWriter
from pawl.clock import Clock
from pawl.clock import now as wall_clock

GROUP = struct.Struct("<QQ")
"""Before each group: how many bytes follow, and the sequence number of its last record."""
STATE = struct.Struct("<QH????2x")
BUFFER_BYTES = 1024 * 1024
"""A larger group gets a buffer of its own."""


class Plan(NamedTuple):
    """What a writer must know."""

    directory: Path
    salt: bytes
    last_seq: int
    """The last record that is on disk."""
    max_bytes: int
    segment_bytes: int

    def to_arguments(self) -> list[str]:
        """For the command line."""
        numbers = (self.last_seq, self.max_bytes, self.segment_bytes)
        return [str(self.directory), self.salt.hex(), *map(str, numbers)]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Plan:
        directory, salt, last_seq, max_bytes, segment_bytes = arguments
        return cls(Path(directory), bytes.fromhex(salt), int(last_seq), int(max_bytes), int(segment_bytes))


class State(NamedTuple):
    """What a writer says: after every group, and whenever something has changed."""

    kept_seq: int
    """The last record that is on disk."""
    error: int
    """Why the disk refuses: the number of the system's error, 0 when it does not."""
    is_answer: bool
    """This is about a group."""
    is_kept: bool
    """That group is on disk."""
    is_healthy: bool
    is_full: bool


def work(plan: Plan, incoming: int, outgoing: int, clock: Clock = wall_clock) -> None:
    """Write what comes until the pipe ends or nobody listens any more; both descriptors are closed then.

    Args:
        incoming: groups, each behind its `GROUP`.
        outgoing: takes `STATE`s.
    """
    try:
        writer = open_writer(plan, clock)
        try:
            _serve(writer, incoming, outgoing)
        finally:
            writer.close()
    except BrokenPipeError:
        pass
    finally:
        os.close(incoming)
        os.close(outgoing)


def open_writer(plan: Plan, clock: Clock) -> SegmentWriter:
    """The writer of a plan."""
    return SegmentWriter(
        plan.directory,
        plan.salt,
        plan.last_seq,
        max_bytes=plan.max_bytes,
        segment_bytes=plan.segment_bytes,
        clock=clock,
    )


def _serve(writer: SegmentWriter, incoming: int, outgoing: int) -> None:
    poll = select.poll()
    poll.register(incoming, select.POLLIN)
    head = memoryview(bytearray(GROUP.size))
    buffer = memoryview(bytearray(BUFFER_BYTES))
    told = _tell(outgoing, state_of(writer), None)
    while True:
        if poll.poll(writer.pause_s * 1000):
            if not _fill(incoming, head):
                return
            n_bytes, last_seq = GROUP.unpack(head)
            group = buffer[:n_bytes] if n_bytes <= BUFFER_BYTES else memoryview(bytearray(n_bytes))
            if not _fill(incoming, group):
                return
            is_kept = writer.write([group], n_bytes, last_seq)
            told = _tell(outgoing, state_of(writer)._replace(is_answer=True, is_kept=is_kept), None)
        else:
            writer.keep_house()
            told = _tell(outgoing, state_of(writer), told)


def state_of(writer: SegmentWriter) -> State:
    """What there is to say of a writer, but for a group."""
    return State(
        writer.kept_seq,
        writer.error,
        is_answer=False,
        is_kept=False,
        is_healthy=writer.is_healthy,
        is_full=writer.is_full,
    )


def _tell(outgoing: int, state: State, told: State | None) -> State:
    """Say it unless it has been said; return what the gateway knows now."""
    if state != told:
        os.write(outgoing, STATE.pack(*state))
    return state._replace(is_answer=False, is_kept=False)


def _fill(incoming: int, buffer: memoryview) -> bool:
    """Read so many bytes; False if the pipe ends before."""
    n_read = 0
    while n_read < len(buffer):
        n = os.readv(incoming, [buffer[n_read:]])
        if n == 0:
            return False
        n_read += n
    return True


def main(arguments: Sequence[str]) -> None:
    """`incoming outgoing` and a plan. Signals are for the gateway, which ends the pipe when it has nothing more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    incoming, outgoing, *plan = arguments
    work(Plan.from_arguments(plan), int(incoming), int(outgoing))


if __name__ == "__main__":
    main(sys.argv[1:])
