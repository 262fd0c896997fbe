"""The relay behind plain ASGI: for other servers than ours, and for requests the fast lane leaves alone."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from serving.call import Call
from serving.errors import ApiError
from serving.relay import Relay
from serving.wire import ClientGone, RawHeaders, Receive, Scope, Send, headers_of, read_body

HIGH_WATER_BYTES = 256 * 1024
LOW_WATER_BYTES = 64 * 1024


class AsgiClient:
    """Queues what the relay sends and awaits the server for each part; pauses the call when too much waits."""

    def __init__(self, *, closes: bool = False) -> None:
        """`closes`: the connection ends with the answer."""
        self.call: Call | None = None
        self._closes = closes
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self._n_waiting = 0
        self._has_news = asyncio.Event()
        self._is_dropped = False
        self._status = 200
        self._headers: RawHeaders = []

    def send_whole(self, status: int, lines: bytes, body: bytes) -> None:
        """See `serving.client.Client`."""
        self._status = status
        self._headers = [*headers_from(lines), (b"content-length", str(len(body)).encode())]
        if self._closes:
            self._headers.append((b"connection", b"close"))
        self._put(body, is_last=True)

    def start_stream(self, lines: bytes, part: bytes) -> None:
        """See `serving.client.Client`."""
        self._headers = headers_from(lines)
        self._put(part, is_last=False)

    def send_part(self, part: bytes) -> None:
        """See `serving.client.Client`."""
        self._put(part, is_last=False)

    def end_stream(self, part: bytes) -> None:
        """See `serving.client.Client`."""
        self._put(part, is_last=True)

    def drop(self) -> None:
        """See `serving.client.Client`."""
        self._is_dropped = True
        self._has_news.set()

    def _put(self, part: bytes, *, is_last: bool) -> None:
        self._waiting.append((part, is_last))
        self._n_waiting += len(part)
        self._has_news.set()
        if self._n_waiting > HIGH_WATER_BYTES and self.call is not None:
            self.call.client_paused()

    async def pump(self, send: Send, stalled_reader_s: float) -> None:
        """Send what the relay gives until the end; a client that takes nothing for too long has left.

        Raises:
            TimeoutError: it has.
        """
        is_first, is_last = True, False
        while not is_last:
            part, is_last = await self._next()
            async with asyncio.timeout(stalled_reader_s):
                if is_first:
                    await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
                    is_first = False
                await send({"type": "http.response.body", "body": part, "more_body": not is_last})

    async def _next(self) -> tuple[bytes, bool]:
        while not self._waiting and not self._is_dropped:
            self._has_news.clear()
            await self._has_news.wait()
        if self._is_dropped:
            raise TimeoutError
        part, is_last = self._waiting.popleft()
        self._n_waiting -= len(part)
        if self._n_waiting < LOW_WATER_BYTES and self.call is not None:
            self.call.client_resumed()
        return part, is_last


async def answer(relay: Relay, route: str, scope: Scope, receive: Receive, send: Send) -> None:
    """One request to a completion route."""
    started = time.perf_counter()
    try:
        raw = await read_body(receive, headers_of(scope), relay.max_body_bytes, relay.timeouts.request_body_s)
    except ClientGone:
        return
    except ApiError as exc:
        refused = AsgiClient(closes="connection" not in exc.headers)
        relay.refuse_upload(route, dict(scope["headers"]), exc, refused)
        await refused.pump(send, relay.timeouts.stalled_reader_s)
        return
    client = AsgiClient()
    client.call = call = relay.begin(route, dict(scope["headers"]), raw, client, started)
    pump = asyncio.ensure_future(client.pump(send, relay.timeouts.stalled_reader_s))
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not pump.done() or pump.cancelled() or pump.exception() is not None:
            call.client_left()
        gone.cancel()
        pump.cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def headers_from(lines: bytes) -> RawHeaders:
    """Ready-made head lines as ASGI wants them.

    >>> headers_from(b"content-type: text/plain\\r\\nx-a: b\\r\\n")
    [(b'content-type', b'text/plain'), (b'x-a', b'b')]
    """
    pairs = (line.split(b": ", 1) for line in lines.split(b"\r\n") if line)
    return [(name, value) for name, value in pairs]
