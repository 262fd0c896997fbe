"""Keep-alive connections to one engine, driven by callbacks: a request costs no task and no coroutine.

A request takes the connection that was used last, writes head and body at once, and is told of every read of the answer
as it comes. Only opening a connection takes a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, cast
from urllib.parse import urlsplit

import structlog
from httptools import HttpParserError, HttpResponseParser

from serving.outbox import Outbox, OutboxTransport
from serving.repeated_heads import MAX_UNLIKE, RepeatedHead, repeated_head

log = structlog.get_logger()
monotonic: Final = time.monotonic

Reason = Literal["connect", "connect_timeout", "reset", "protocol", "stale"]

STALE_S: Final = 1.0
"""An engine that closes an idle connection just as it is used does so at once; later it is the request's doing."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""Also of what lies between two pieces of body: chunk extensions, trailers."""
HTTP_OK: Final = 200
CLOSE_S: Final = 1.0
"""For the loop to let go of aborted connections, a matter of one turn."""
DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Answer(Protocol):
    """Who is told of the engine's answer, on the loop's thread; never after `on_end`, `on_failure` or an abort."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The final head; the names are in lower case."""

    def on_body(self, data: bytes) -> None:
        """What one read held of the body, without chunk framing."""

    def on_end(self) -> None:
        """The whole answer has arrived; its connection is back in the pool, or closed."""

    def on_failure(self, reason: Reason, was_sent: bool) -> None:
        """There will be no more of this answer.

        Args:
            reason: `stale`: a connection that had been idle died before any byte of the answer, which happens when
                the engine closes it at that very moment; worth another try.
            was_sent: at least one byte of the request may have left.
        """


class Sent:
    """A request on its way. Everything here does nothing once its answer has ended."""

    __slots__ = ("answer", "connection", "is_paused", "opening")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connection: _Connection | None = None
        self.opening: asyncio.Task[None] | None = None
        self.is_paused = False

    def abort(self) -> None:
        """Close the connection, which makes the engine stop generating. No callback follows."""
        connection, opening = self.connection, self.opening
        self.connection = self.opening = None
        if connection is not None:
            connection.drop()
        elif opening is not None:
            opening.cancel()

    def pause(self) -> None:
        """Stop reading from the engine; what was read already is still told."""
        self.is_paused = True
        if self.connection is not None:
            self.connection.pause_reading()

    def resume(self) -> None:
        self.is_paused = False
        if self.connection is not None:
            self.connection.resume_reading()


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens, and how its requests begin."""

    host: str
    port: int
    is_tls: bool
    authority: str
    """The `Host` header."""
    prefix: str
    """The path of the URL, before every request's own."""


def parse_address(url: str) -> Address:
    """Take an engine's base URL apart.

    >>> parse_address("http://[::1]:8000/engine/")
    Address(host='::1', port=8000, is_tls=False, authority='[::1]:8000', prefix='/engine')

    Raises:
        ValueError: it is not the plain address of an HTTP server.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in DEFAULT_PORTS or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not an address like http://host:port/prefix")
    if not parts.path.isascii() or not parts.path.isprintable() or " " in parts.path:
        raise ValueError(f"the path of {url!r} must be percent-encoded")
    name = f"[{host}]" if ":" in host else host.encode("idna").decode()
    authority = name if parts.port is None else f"{name}:{parts.port}"
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return Address(host, port, parts.scheme == "https", authority, parts.path.rstrip("/"))


class EnginePool:
    """The connections to one engine.

    Args:
        url: `http://` or `https://`, any path is put before every request's own.
        connect_s: for the name look-up, the connection and the TLS handshake together.
        max_idle: connections beyond it are closed when their answer has ended.
        idle_s: must be less than the time after which the engine closes an idle connection.
        outbox: of the loop on which requests are sent, to share it; None: one of its own.

    Raises:
        ValueError: `url` is not the address of an HTTP server.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_s: float,
        max_idle: int = 512,
        idle_s: float = 4.0,
        outbox: Outbox | None = None,
    ) -> None:
        address = parse_address(url)
        common = f" HTTP/1.1\r\nhost: {address.authority}\r\naccept-encoding: identity\r\n"
        self._post_start = f"POST {address.prefix}".encode()
        self._post_middle = f"{common}content-type: application/json\r\ncontent-length: ".encode()
        self._get_start = f"GET {address.prefix}".encode()
        self._get_end = f"{common}\r\n".encode()
        self._address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._connect_s = connect_s
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._idle: list[_Connection] = []  # In the order of their release, so the first ones expire first.
        self._open: set[_Connection] = set()
        self._opening: dict[asyncio.Task[None], Sent] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.outbox: Final = outbox or Outbox()
        self._all_lost = asyncio.Event()
        self._all_lost.set()

    @property
    def n_open(self) -> int:
        """Connections, in use or idle, until the loop has let go of them."""
        return len(self._open)

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    def send(self, path: bytes, headers: bytes, body: bytes, answer: Answer) -> Sent:
        """POST JSON to the engine.

        Args:
            path: after the engine's URL, `b"/v1/chat/completions"`.
            headers: more header lines, each with its `\\r\\n`.
        """
        length = b"%d\r\n" % len(body)
        request = b"".join((self._post_start, path, self._post_middle, length, headers, b"\r\n", body))
        return self._send(request, answer)

    def get(self, path: bytes, answer: Answer) -> Sent:
        return self._send(b"".join((self._get_start, path, self._get_end)), answer)

    async def close(self) -> None:
        """Close every connection; whoever waits for an answer is told that there will be none."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._idle.clear()
        opening = dict(self._opening)
        for task in opening:
            task.cancel()
        for connection in list(self._open):
            connection.fail("reset")
        await asyncio.gather(*opening, return_exceptions=True)
        for sent in opening.values():  # A task that had not begun could not tell.
            _tell_unsent(sent, "connect")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._all_lost.wait()

    def _send(self, request: bytes, answer: Answer) -> Sent:
        sent = Sent(answer)
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.is_usable(monotonic()):
                connection.begin(sent, request)
                return sent
            connection.drop()
        sent.opening = task = asyncio.get_running_loop().create_task(self._begin(sent, request))
        self._opening[task] = sent
        task.add_done_callback(self._opening.pop)
        return sent

    async def _begin(self, sent: Sent, request: bytes) -> None:
        """Open a connection, which begins with the request as soon as it is there."""
        if self._is_closed:
            _tell_unsent(sent, "connect")
            return
        connection = _Connection(self, sent, request)
        try:
            await self._connect(connection)
        except TimeoutError:
            self._give_up(connection, sent, "connect_timeout")
        except OSError:
            self._give_up(connection, sent, "connect")
        except asyncio.CancelledError:  # Aborted, and then nobody is told; or the pool is closing.
            self._give_up(connection, sent, "connect")
            raise
        except Exception:
            log.error("connection_not_opened", exc_info=True)
            self._give_up(connection, sent, "connect")

    async def _connect(self, connection: _Connection) -> None:
        address = self._address
        async with asyncio.timeout(self._connect_s):
            loop = asyncio.get_running_loop()
            protocol = cast(asyncio.Protocol, connection)
            await loop.create_connection(lambda: protocol, address.host, address.port, ssl=self._tls)

    def _give_up(self, connection: _Connection, sent: Sent, reason: Reason) -> None:
        """No connection for this request; an aborted one is not told."""
        if sent.connection is not None:  # The time ran out just when the request had begun.
            connection.fail("reset")
        else:
            _tell_unsent(sent, reason)
        self.lost(connection)  # Of one that was cancelled while it opened, uvloop does not say that it is lost.
        connection.let_go()

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)
        self._all_lost.clear()

    def lost(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._all_lost.set()

    def release(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        if len(self._idle) >= self._max_idle or self._is_closed:
            connection.drop()
            return
        connection.idle_until = monotonic() + self._idle_s
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._idle_s, self._sweep)

    def drop_idle(self) -> None:
        """Close what waits for a request."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.drop()

    def forget_idle(self, connection: _Connection) -> None:
        with contextlib.suppress(ValueError):  # The sweep and a request take it out themselves.
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close what has been idle too long: under a light load the oldest ones are never looked at otherwise."""
        n_expired = bisect_left(self._idle, monotonic(), key=_expiry)
        expired, self._idle[:n_expired] = self._idle[:n_expired], []
        for connection in expired:
            connection.drop()
        self._sweeper = None
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(self._idle_s, self._sweep)


class _Parser(Protocol):
    """What is used of `httptools.HttpResponseParser`."""

    def feed_data(self, data: bytes) -> None: ...
    def get_status_code(self) -> int: ...
    def should_keep_alive(self) -> bool: ...


class _Response:
    """What the parser has found of the response being read.

    The parser's callbacks only take notes: the answer is told after a read has been parsed, so nothing that it does
    can disturb the parser.
    """

    __deletable__ = ("_parser", "on_body")
    """For the compiler: other attributes it need not look for."""
    __slots__ = ("_headers", "_is_done", "_is_kept", "_parser", "_pieces", "_status", "on_body")

    def __init__(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._status = 0  # Until the final head is complete.
        self._is_done = False
        self._is_kept = False
        self._pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] = self._pieces.append
        self._parser: _Parser = HttpResponseParser(self)

    def on_message_begin(self) -> None:
        if self._is_done:
            raise ValueError("bytes after the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # Else it is a trailer.
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self._status = status
        elif 100 <= status != 101:
            self._headers.clear()
        else:
            raise ValueError("a change of protocols that nobody asked for")

    def on_message_complete(self) -> None:
        if self._status:  # Else it was an interim response.
            self._is_done = True
            self._is_kept = self._parser.should_keep_alive()

    def _take_body(self) -> bytes:
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def _ends_with_connection(self) -> bool:
        """Whether the body has no other end (RFC 9112, 6.3)."""
        fields = dict(self._headers)
        is_chunked = fields.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        return bool(self._status) and not is_chunked and b"content-length" not in fields

    def _is_head_too_long(self) -> bool:
        return sum(len(name) + len(value) + 4 for name, value in self._headers) > MAX_HEAD_BYTES


class _Connection(_Response):
    """One connection, an `asyncio.Protocol` but for its name: at most one request at a time.

    Always aborted, never closed: a close would wait for an engine that does not read to take what is still unsent.
    """

    __deletable__ = ("_transport",)
    __slots__ = (
        "__weakref__",
        "_begun_at",
        "_first",
        "_is_reused",
        "_is_told",
        "_n_barren",
        "_n_unlike",
        "_pool",
        "_repeated",
        "_repeated_headers",
        "_sent",
        "_transport",
        "idle_until",
    )

    def __init__(self, pool: EnginePool, sent: Sent, request: bytes) -> None:
        super().__init__()
        self.idle_until = 0.0
        self._pool = pool
        self._first: tuple[Sent, bytes] | None = (sent, request)
        self._sent: Sent | None = None
        self._transport: OutboxTransport
        self._is_reused = False  # And nothing has arrived since.
        self._begun_at = 0.0
        self._is_told = False  # Of the head.
        self._n_barren = 0  # Bytes since there was something to tell.
        self._repeated: RepeatedHead | None = None  # The head of the last 200.
        self._repeated_headers: list[tuple[bytes, bytes]] = []
        self._n_unlike = 0

    def is_usable(self, now_s: float) -> bool:
        return now_s < self.idle_until and not self._transport.is_closing()

    def begin(self, sent: Sent, request: bytes) -> None:
        """Send the next request."""
        sent.connection = self
        self._sent = sent
        self._headers = []
        self._status = 0
        self._is_done = self._is_told = False
        self._is_reused = True
        self._begun_at = monotonic()
        self._n_barren = 0
        self._transport.write(request)

    def drop(self) -> None:
        """Close without telling anybody."""
        self._sent = None
        self._transport.abort()

    def fail(self, reason: Reason) -> None:
        """Close; whoever waits for an answer is told why it does not come."""
        sent = self._sent
        self.drop()
        if sent is not None:
            sent.connection = None
            _tell_failure(sent.answer, reason, was_sent=True)

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self._first is not None
        self._transport = OutboxTransport(cast(asyncio.Transport, transport), self._pool.outbox)
        (sent, request), self._first = self._first, None
        if sent.opening is None:  # Aborted a moment ago.
            self._transport.abort()
            return
        self._pool.opened(self)
        sent.opening = None
        _set_options(self._transport)
        self.begin(sent, request)
        self._is_reused = False
        if sent.is_paused:  # uvloop begins to read after this, whatever is asked for here.
            asyncio.get_running_loop().call_soon(self._pause_if_asked, sent)

    def _pause_if_asked(self, sent: Sent) -> None:
        if self._sent is sent and sent.is_paused:
            self.pause_reading()

    def data_received(self, data: bytes) -> None:
        sent = self._sent
        if sent is None:  # Nobody has asked for anything.
            self._transport.abort()
            return
        self._is_reused = False
        is_first = not (self._status or self._n_barren)
        if is_first and self._repeated is not None and self._take_again(self._repeated, data):
            self._tell(sent)
            return
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self._is_kept = False
            if not self._is_done:
                self.fail("protocol")
                return
        if not self._is_within_bounds(len(data)):
            self.fail("protocol")
        elif self._status:
            if is_first and self._is_done and self._n_unlike < MAX_UNLIKE:
                self._learn(data)
            self._tell(sent)

    def _take_again(self, repeated: RepeatedHead, data: bytes) -> bool:
        """Take an answer whose head is that of the one before, without the parser; False if it is another."""
        body = repeated.body_of(data)
        if not body:
            return False
        self._n_unlike = 0
        self._status = HTTP_OK
        self._headers = self._repeated_headers
        self._pieces.append(body)
        self._is_done = self._is_kept = True
        return True

    def _learn(self, data: bytes) -> None:
        """Remember the head of a whole answer that came in one read and that the parser has told of."""
        self._n_unlike += 1
        if self._is_kept and self._status == HTTP_OK and len(self._pieces) == 1:
            self._repeated = repeated_head(data, len(self._pieces[0]))
            self._repeated_headers = self._headers

    def _is_within_bounds(self, n_bytes: int) -> bool:
        """Whether the head, or what frames the body, is not growing without end."""
        n_barren = self._n_barren + n_bytes
        if self._pieces or self._is_done:
            self._n_barren = 0
            return n_barren <= MAX_HEAD_BYTES or self._is_told or not self._is_head_too_long()
        self._n_barren = n_barren
        return n_barren <= MAX_HEAD_BYTES

    def _tell(self, sent: Sent) -> None:
        """Tell what the last read held. Any of the callbacks may abort, and the last may send the next request."""
        answer = sent.answer
        try:
            if not self._is_told:
                self._is_told = True
                answer.on_head(self._status, self._headers)
            if self._pieces and self._sent is sent:
                answer.on_body(self._take_body())
            if self._is_done and self._sent is sent:
                self._finish(sent)
                answer.on_end()
        except Exception:
            log.error("answer_not_taken", exc_info=True)
            if self._sent is sent:
                self.fail("reset")

    def _finish(self, sent: Sent) -> None:
        """Let go of a request whose whole answer is there. After an answer that came early, part of it is unsent."""
        sent.connection = None
        if not self._is_kept or self._transport.get_write_buffer_size():
            self.drop()
            return
        self._sent = None
        if sent.is_paused:
            self.resume_reading()
        self._pool.release(self)

    def pause_writing(self) -> None:
        """There is at most one request to send, which waits for nothing of ours."""

    def resume_writing(self) -> None:
        """As above."""

    def eof_received(self) -> None:
        if self._sent is not None and self._ends_with_connection():
            self._is_done, self._is_kept = True, False
            self._tell(self._sent)
        self._died()
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a dead connection is a dead connection
        self._died()
        if self._is_done:
            self._pool.forget_idle(self)
        self._pool.lost(self)
        self.let_go()

    def let_go(self) -> None:
        """Let go of what refers to this connection again: such cycles are memory until the collector comes by."""
        with contextlib.suppress(AttributeError):  # It was done when the connection was given up.
            del self._parser, self.on_body
        with contextlib.suppress(AttributeError):  # There never was one.
            del self._transport

    def _died(self) -> None:
        if self._sent is not None:
            is_stale = self._is_reused and monotonic() - self._begun_at < STALE_S
            if is_stale:
                self._pool.drop_idle()  # Closed too, most likely: the next attempt shall have a fresh one.
            self.fail("stale" if is_stale else "reset")


def _expiry(connection: _Connection) -> float:
    return connection.idle_until


def _set_options(transport: OutboxTransport) -> None:
    """Detect engines that vanished without a word, and do not let small requests wait for one another."""
    connected = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # Already dead: the loop will say so.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _tell_unsent(sent: Sent, reason: Reason) -> None:
    if sent.opening is not None:
        sent.opening = None
        _tell_failure(sent.answer, reason, was_sent=False)


def _tell_failure(answer: Answer, reason: Reason, *, was_sent: bool) -> None:
    try:
        answer.on_failure(reason, was_sent)
    except Exception:
        log.error("failure_not_taken", exc_info=True)
