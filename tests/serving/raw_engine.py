"""An engine whose every byte a test writes itself: one script, run for each connection."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress


class Peer:
    """The engine's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.requests: list[bytes] = []
        self.is_gone = asyncio.Event()

    async def request(self) -> bytes:
        """The next request, head and body."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        self.requests.append(head + await self._reader.readexactly(int(length or 0)))
        return self.requests[-1]

    async def say(self, data: bytes, *, at_once: int = 1 << 24) -> None:
        """Write, `at_once` bytes at a time."""
        for start in range(0, len(data), at_once):
            self._writer.write(data[start : start + at_once])
            await self._writer.drain()
            await asyncio.sleep(0)

    async def until_gone(self) -> None:
        """Until the other side has closed."""
        with suppress(ConnectionError):
            while await self._reader.read(65536):
                pass
        self.is_gone.set()

    def hang_up(self) -> None:
        """Send the end of the stream now, not on a later turn of the loop."""
        with self._duplicate() as connected:
            connected.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Drop the connection as a killed process does."""
        with self._duplicate() as connected:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(5):
                await self._writer.wait_closed()

    def _duplicate(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno()))


Script = Callable[[Peer], Awaitable[None]]


class RawEngine:
    """Where it listens, and every connection it was given."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.peers: list[Peer] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.peers.append(peer)
        self._tasks.add(asyncio.get_running_loop().create_task(self._serve(peer)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, peer: Peer) -> None:
        try:
            await self._script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            peer.is_gone.set()
        finally:
            await peer.close()


@asynccontextmanager
async def raw_engine(
    script: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawEngine]:
    """Serve `script` on a free port of the loopback interface, in the running loop."""
    engine = RawEngine(script)
    server = await asyncio.start_server(engine.accept, host, 0, ssl=tls)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        await engine.stop()
