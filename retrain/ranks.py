"""The processes that train together, started and watched from one that does not train itself.

Each gets the variables that torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR and so on), writes JSON lines on its
standard output, and leaves when its standard input closes: that is how it learns that whoever started it has died.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

from retrain.errors import ProcessLost, RetrainError, TrainingFailed, TrainingInterrupted
from retrain.termination import Termination

LOOK_EVERY_S = 0.2
AFTER_FAILURE_S = 5.0
"""How long the others have to leave by themselves when one has failed: they are waiting for it."""
LAST_WORDS_S = 10.0
"""How long what a process that has ended wrote last is read; longer only if something it started holds the pipe."""
Message = Mapping[str, Any]
_RAISED: Mapping[str, type[RetrainError]] = {each.__name__: each for each in (TrainingFailed, TrainingInterrupted)}


@dataclass(frozen=True)
class Group:
    """Processes on one or more nodes, as many on each, that know one another by rank."""

    processes: int
    """On each node."""
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    """Of the first node."""
    port: int = 29400
    """On the first node; the process of rank 0 listens there."""

    @property
    def size(self) -> int:
        """How many processes in all."""
        return self.processes * self.nodes

    def environment(self, local_rank: int) -> dict[str, str]:
        """What torch.distributed reads.

        >>> Group(2, nodes=2, node_rank=1).environment(1)["RANK"]
        '3'
        """
        return {
            "RANK": str(self.node_rank * self.processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    reader: Thread | None = None
    error: Message | None = None
    failed_at: float | None = None
    """Unix time; none where it only followed the others' failure, or was stopped from here."""


def run_ranks(
    command: Sequence[str],
    group: Group,
    logs: Path,
    on_message: Callable[[Message], None],
    *,
    order: bytes = b"",
    termination: Termination | None = None,
    stop_s: float = 300.0,
) -> None:
    """Run this node's processes of a group to their end.

    Args:
        logs: directory for what they write on standard error.
        on_message: gets every JSON object that one of them writes; what it raises stops them all.
        order: written to the standard input of the first; the others get an empty line.
        termination: once requested, all are asked to leave, and have `stop_s` for it.

    Raises:
        TrainingFailed, TrainingInterrupted: one of them did; the text names its rank.
        ProcessLost: one ended in another way, was killed for instance.
    """
    logs.mkdir(parents=True, exist_ok=True)
    asked = termination or Termination()
    with _started(command, group, logs, order) as ranks:
        _watch(ranks, _messages(ranks), on_message, asked, stop_s)
    failed = [rank for rank in ranks if rank.process.returncode]
    if failed and asked.is_requested and all(rank.error is None for rank in failed):
        raise TrainingInterrupted("asked to leave before the training processes were ready")
    if failed:
        raise _error_of(min(failed, key=_when))


@contextmanager
def _started(command: Sequence[str], group: Group, logs: Path, order: bytes) -> Iterator[list[_Rank]]:
    ranks: list[_Rank] = []
    try:
        ranks.extend(_start(command, group, local_rank, logs) for local_rank in range(group.processes))
        for rank, given in zip(ranks, (order, *[b""] * len(ranks)), strict=False):
            Thread(target=_give, args=(rank.process.stdin, given), daemon=True).start()
        yield ranks
    finally:
        _end(ranks)


def _start(command: Sequence[str], group: Group, local_rank: int, logs: Path) -> _Rank:
    variables = group.environment(local_rank)
    log = logs / f"rank-{variables['RANK']}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    return _Rank(int(variables["RANK"]), process, log)


def _give(stdin: IO[bytes] | None, order: bytes) -> None:
    """The order and a line's end; the pipe then stays open as long as this process lives."""
    with suppress(OSError, ValueError):  # Where it has ended already, its exit tells why.
        if stdin is not None:
            stdin.write(order + b"\n")
            stdin.flush()


def _messages(ranks: Sequence[_Rank]) -> queue.Queue[tuple[_Rank, Message]]:
    arrived: queue.Queue[tuple[_Rank, Message]] = queue.Queue()
    for rank in ranks:
        rank.reader = Thread(target=_read, args=(rank, arrived), daemon=True)
        rank.reader.start()
    return arrived


def _read(rank: _Rank, arrived: queue.Queue[tuple[_Rank, Message]]) -> None:
    if (said := rank.process.stdout) is None:
        return
    with said:  # Closed from here: whoever closes a pipe waits for the thread that reads it.
        for line in said:
            if (message := _parsed(line)) is not None:
                arrived.put((rank, message))


def _parsed(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _watch(
    ranks: Sequence[_Rank],
    messages: queue.Queue[tuple[_Rank, Message]],
    on_message: Callable[[Message], None],
    termination: Termination,
    stop_s: float,
) -> None:
    """Pass messages on until all have ended; once one has failed, or leaving was asked for, end the others in time."""
    until: float | None = None
    while any(rank.process.poll() is None for rank in ranks):
        _pass_on(messages, on_message, LOOK_EVERY_S)
        if until is None and (_note_failures(ranks) or termination.is_requested):
            until = time.monotonic() + (stop_s if termination.is_requested else AFTER_FAILURE_S)
            _signal_all(ranks, signal.SIGTERM)
        if until is not None and time.monotonic() > until:
            _signal_all(ranks, signal.SIGKILL)
    if until is None:
        _note_failures(ranks)
    for rank in ranks:
        if rank.reader is not None:
            rank.reader.join(timeout=LAST_WORDS_S)
    _pass_on(messages, on_message, 0.0)


def _note_failures(ranks: Sequence[_Rank]) -> bool:
    for rank in ranks:
        if rank.failed_at is None and rank.process.poll():
            rank.failed_at = time.time()
    return any(rank.failed_at for rank in ranks)


def _pass_on(
    messages: queue.Queue[tuple[_Rank, Message]], on_message: Callable[[Message], None], wait_s: float
) -> None:
    """What has arrived, and what arrives in so long; not longer, however much is said."""
    until = time.monotonic() + wait_s
    try:
        while True:
            left = until - time.monotonic()
            if wait_s and left <= 0:
                return
            rank, message = messages.get(timeout=left) if wait_s else messages.get_nowait()
            if "error" in message:
                rank.error = message
            else:
                on_message(message)
    except queue.Empty:
        return


def _when(rank: _Rank) -> float:
    """When it failed. One that was killed is the cause of whatever the others then said, though it said nothing.

    A verdict on the training follows from nobody else's failure; the others may leave because of it, and be first.
    """
    if (rank.error or {}).get("kind") == TrainingFailed.__name__:
        return -math.inf
    if rank.failed_at is not None and rank.process.returncode < 0:
        return 0.0
    said = (rank.error or {}).get("at")
    return float(said) if said is not None else rank.failed_at or math.inf


def _error_of(rank: _Rank) -> RetrainError:
    if rank.error is None:
        code = rank.process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
        return ProcessLost(f"the training process of rank {rank.number} {how}; see {rank.log}")
    text = str(rank.error["error"])
    if raised := _RAISED.get(str(rank.error.get("kind"))):
        return raised(f"rank {rank.number}: {text}")
    return ProcessLost(f"the training process of rank {rank.number} failed: {text}; see {rank.log}")


def _signal_all(ranks: Sequence[_Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _end(ranks: Sequence[_Rank]) -> None:
    """Whatever happened here, none of them trains on."""
    _signal_all(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
        for pipe in (rank.process.stdin, None if rank.reader else rank.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # What it did not read any more.
                    pipe.close()
