"""The completions being answered now: counted, bounded, and ended in order when the gateway stops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from monitoring.metrics import IN_FLIGHT, RATE_LIMITED
from serving.errors import Overloaded


class InFlight:
    """A registry of running relays by interaction id."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: dict[str, asyncio.Task[None] | None] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.is_draining = False

    def __contains__(self, interaction_id: str) -> bool:
        return interaction_id in self._tasks

    @contextmanager
    def slot(self, interaction_id: str) -> Iterator[None]:
        """Hold a place for one completion.

        Raises:
            Overloaded: the gateway is full or stopping.
        """
        if self.is_draining:
            raise Overloaded("the gateway is stopping; try again", code="shutting_down")
        if len(self._tasks) >= self._limit:
            RATE_LIMITED.labels(reason="concurrency").inc()
            raise Overloaded("too many requests are being answered; try again (serving.max_in_flight)")
        self._tasks[interaction_id] = None
        self._is_empty.clear()
        IN_FLIGHT.inc()
        try:
            yield
        finally:
            del self._tasks[interaction_id]
            IN_FLIGHT.dec()
            if not self._tasks:
                self._is_empty.set()

    def attach(self, interaction_id: str, task: asyncio.Task[None]) -> None:
        """Tell which task to cut off at the end of the grace period."""
        self._tasks[interaction_id] = task

    def cut_off(self) -> None:
        """End what still runs: each relay sends an error event and keeps its record."""
        for task in self._tasks.values():
            if task is not None:
                task.cancel()

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether everything had ended in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True
