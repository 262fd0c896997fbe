"""Programs that serve: started on a core of their own, waited for, stopped with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from bench.processes import Seat, family, prefer
from serving.children import ending_with_parent

READY_S = 90.0
POLL_S = 0.05
STOP_S = 10.0
"""After SIGTERM; then SIGKILL."""


class NotReady(Exception):
    """A server ended, or took too long to come up; the text is the end of its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run as a gateway, and how to see that it is ready."""

    arguments: Sequence[str]
    ready_url: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_s: float = STOP_S


@contextmanager
def running_command(command: Command, directory: Path, seat: Seat) -> Iterator[int]:
    """Start a program, wait until it is ready, stop it and everything that it started; yields its pid."""
    log_path = directory / "log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            seat.before(command.arguments),
            env={**os.environ, **command.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ending_with_parent(),
        )
    try:
        _wait_until_ready(process, command.ready_url, log_path)
        if seat.nice:
            for member in family(process.pid):
                prefer(member, seat.nice)
        yield process.pid
    finally:
        _stop(process, command.stop_s)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx2.HTTPError):
            if httpx2.get(url, timeout=5.0).status_code == 200:
                return
        time.sleep(POLL_S)
    raise NotReady(f"not ready: {url}\n{log.read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    members = family(process.pid)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(stop_s)
    for member in members:  # one at a time, by the ids that we saw it start
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait(STOP_S)
