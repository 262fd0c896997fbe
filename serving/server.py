"""The gateway as a process: uvicorn, and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType

import uvicorn

from pawl.settings import Settings
from serving.app import Gateway, create_app

MARGIN_S = 5.0
"""Between cutting off the last streams and uvicorn giving up on them: enough for error events and records."""


class GatewayServer(uvicorn.Server):
    """On the first signal not ready at once; running streams get the grace period, then an error event and a record."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        in_flight = self._gateway.in_flight
        if not in_flight.is_draining and self._loop is not None:
            in_flight.is_draining = True
            grace_s = self._gateway.settings.serving.drain_grace_s
            self._loop.call_soon_threadsafe(self._loop.call_later, grace_s, in_flight.cut_off)
        super().handle_exit(signal.SIGTERM if sig == signal.SIGINT else sig, frame)


def serve(settings: Settings) -> None:
    """Run one gateway process until it is told to stop.

    Raises:
        PawlError: it cannot start; the text says why.
    """
    gateway = create_app(settings)
    config = uvicorn.Config(
        gateway,
        host=settings.serving.host,
        port=settings.serving.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        loop="uvloop",
        http="httptools",
        timeout_graceful_shutdown=round(settings.serving.drain_grace_s + MARGIN_S),
    )
    GatewayServer(config, gateway).run()
