"""One gateway process: uvicorn on an inherited socket, and a stop that loses nothing.

Two ways to end. *Stopping* (SIGTERM): not ready at once, no new connections, idle ones closed; what runs gets the grace
period, then an error event and a record; only then do the writers close. A second signal ends the grace period.
*Retiring* (SIGUSR1, sent when a newer process serves the same socket): open connections may ask once more and are
closed with the answer, so that no client finds its connection gone; then the process stops.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import cast

import uvicorn

from monitoring import exposition
from serving.fast_lane import fast_lane_of
from serving.gateway import Gateway
from serving.patience import Patience, PatientConfig, PatientHttpProtocol

RETIRE = signal.SIGUSR1
BACKLOG = 2048
GC_THRESHOLDS = (10_000, 20, 20)
"""Requests make few cycles; the usual 700 would look for them every ten requests."""
ABORT_AFTER_S = 3.0
"""Between cutting off the last answers and dropping clients that do not read theirs."""
MARGIN_S = 5.0
"""Between cutting off and uvicorn giving up: more than `ABORT_AFTER_S`."""
LONGEST_LINGER_S = 10.0
"""For clients of a retiring process to use their open connections once more."""


class GatewayServer(uvicorn.Server):
    """uvicorn with Pawl's way to stop."""

    def __init__(
        self,
        config: PatientConfig,
        gateway: Gateway,
        *,
        on_ready: Callable[[], None] = lambda: None,
        place: exposition.Place | None = None,
    ) -> None:
        super().__init__(config)
        self._patience = config.patience
        self._gateway = gateway
        self._on_ready = on_ready
        self._place = place
        self._loop: asyncio.AbstractEventLoop | None = None
        self._linger_until = 0.0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does ten times a second."""
        if self._place is not None:
            self._place.tick()
        if self._patience.is_retiring and not self.should_exit and self._has_lingered():
            self._begin_stop()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(RETIRE, lambda _, __: self._call_soon(self.retire))
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(RETIRE, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Stop at the first signal, cut off at the second. The process then ends by itself, with code 0."""
        self._call_soon(self._cut_off if self.should_exit else self._begin_stop)

    def retire(self) -> None:
        """Leave new connections to a newer process."""
        assert self._loop is not None
        if self._patience.is_retiring:
            return
        for server in self.servers:
            server.close()
        idle_s = self._gateway.settings.serving.timeouts.idle_s
        self._linger_until = self._loop.time() + min(LONGEST_LINGER_S, idle_s)
        self._patience.is_retiring = True

    def _has_lingered(self) -> bool:
        assert self._loop is not None
        return not self.server_state.connections or self._loop.time() > self._linger_until

    def _begin_stop(self) -> None:
        assert self._loop is not None
        if self.should_exit:
            return
        self._gateway.relay.drain()
        self._loop.call_later(self._gateway.settings.serving.drain_grace_s, self._cut_off)
        self.should_exit = True

    def _cut_off(self) -> None:
        assert self._loop is not None
        self._gateway.relay.cut_off()
        self._loop.call_later(ABORT_AFTER_S, self._abort_connections)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            cast(PatientHttpProtocol, connection).transport.abort()

    def _call_soon(self, action: Callable[[], None]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(action)


def settle_memory() -> None:
    """Leave what was made at the start out of garbage collections: looking through it stalls the loop for long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def server_config(gateway: Gateway) -> PatientConfig:
    """uvicorn's configuration for a gateway."""
    serving = gateway.settings.serving
    protocol = fast_lane_of(gateway.relay) if serving.fast_lane else PatientHttpProtocol
    return PatientConfig(
        gateway,
        Patience(serving, gateway.outbox),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        loop="uvloop",
        http=protocol,
        ws="none",
        timeout_keep_alive=max(1, round(serving.timeouts.idle_s)),
        timeout_graceful_shutdown=round(serving.drain_grace_s + MARGIN_S),
    )


def run_gateway(
    gateway: Gateway,
    sockets: Sequence[socket.socket],
    *,
    on_ready: Callable[[], None] = lambda: None,
    place: exposition.Place | None = None,
) -> None:
    """Serve until told to stop."""

    def ready() -> None:
        settle_memory()
        on_ready()

    server = GatewayServer(server_config(gateway), gateway, on_ready=ready, place=place)
    server.run(list(sockets))
