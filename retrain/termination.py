"""SIGTERM while something must first be brought to an end, such as an optimiser step and its checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Termination:
    """Whether this process was asked to leave."""

    is_requested: bool = False

    def request(self, _signal: int = signal.SIGTERM, _frame: FrameType | None = None) -> None:
        """Ask."""
        self.is_requested = True


@contextmanager
def sigterm_noted() -> Iterator[Termination]:
    """Note SIGTERM instead of dying of it; what handled it before does so again afterwards.

    Only the main thread may handle signals: in another one nothing is noted, and SIGTERM does what it did.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination.request)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
