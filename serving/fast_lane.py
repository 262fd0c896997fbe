"""The fast lane: completion routes answered inside the HTTP protocol, without an ASGI scope, task or coroutine.

A subclass of the server's own protocol looks at method and path when a request's head is complete. A completion
request of the usual kind is collected here and given to the relay, which writes straight to the transport. Everything
else (other routes, HTTP/1.0, `Expect`, `Upgrade`, a request that was pipelined behind one still being answered) goes
on to uvicorn and the application, which answer the same routes through `serving.asgi_lane`.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from httptools import HttpParserError, HttpParserUpgrade

from serving.call import Call
from serving.client import STATUS_LINES
from serving.errors import ApiError
from serving.patience import BODY, BUSY, FRESH, HEAD, IDLE, REFUSED, PatientConfig, PatientHttpProtocol, head_size
from serving.repeated_heads import MAX_DIGITS, MAX_UNLIKE, RepeatedHead, repeated_head
from serving.routes import HOT_PATHS
from serving.wire import body_too_large, body_too_slow

if TYPE_CHECKING:
    import asyncio

    from uvicorn.server import ServerState

    from serving.relay import Relay

seconds: Final = time.perf_counter
HOT_TARGETS: Final = {path.encode(): route for route, path in HOT_PATHS.items()}
OK: Final = STATUS_LINES[200]
CHUNKED: Final = b"transfer-encoding: chunked\r\n"
CRLF: Final = b"\r\n"
CLOSE: Final = b"connection: close\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"


class Taken:
    """Stands where uvicorn keeps the request it is answering, so that it holds back whatever is pipelined behind."""

    __slots__ = ("body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete")

    def __init__(self, message_event: NoEvent) -> None:
        self.response_complete = True
        self.keep_alive = True
        self.disconnected = False
        self.more_body = False
        self.body = b""
        self.message_event = message_event


class NoEvent:
    """Nobody waits for it."""

    def set(self) -> None:
        """Do nothing."""


READ_AT_ONCE_BYTES: Final = 64 * 1024
MOST_PARTS: Final = 4096
"""Of a body, until they are joined: joining takes 80 bytes for each."""


class FastLane(PatientHttpProtocol):
    """One client connection."""

    transport: asyncio.Transport
    cycle: Any
    """uvicorn's own, or `Taken` while the relay has the request."""

    def __init__(
        self,
        relay: Relay,
        config: PatientConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.relay = relay
        self._taken = Taken(NoEvent())
        self._route: str | None = None
        """Of the completion request whose body is being collected."""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._joined = bytearray()
        """What came before them, of a body in a great many parts."""
        self._size = 0
        self._began = 0.0
        self._date: tuple[object, bytes] = (None, b"")
        self._call: Call | None = None
        self._read = b""
        """What is just being parsed, if it begins with a request: the framework may answer before it has read a body,
        the rest of which comes later."""
        self._repeated: RepeatedHead | None = None
        """The head of the last completion request that came in one read."""
        self._repeated_route = ""
        self._repeated_headers: dict[bytes, bytes] = {}
        self._n_unlike = 0

    # What the client sends.

    def data_received(self, data: bytes) -> None:
        """Bytes of the client; the ways of the parent classes in one step."""
        phase = self.phase
        if phase == IDLE and self._repeated is not None and self._take_again(self._repeated, data):
            return
        if phase == HEAD:
            self.n_head += len(data)
        elif phase < REFUSED:
            self.n_head = len(data)
        else:
            return
        is_between = phase == FRESH or (phase == IDLE and self.cycle is self._taken)
        self._read = data if is_between else b""
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except HttpParserError:
            self.send_400_response("")
        else:
            if self.phase == HEAD and self.n_head > self.patience.max_head_bytes:
                self._refuse_head()
            elif len(data) > READ_AT_ONCE_BYTES and self.phase == BODY:
                self._let_others_be_read()
        self._read = b""

    def _take_again(self, repeated: RepeatedHead, data: bytes) -> bool:
        """Take a request whose head is that of the one before, without the parser; False if it is another."""
        taken = self._taken
        if self.cycle is not taken or self.patience.is_retiring or self.timeout_keep_alive_task is not None:
            return False
        body = repeated.body_of(data)
        if body is None or len(body) > self.relay.max_body_bytes:
            return False
        self._n_unlike = 0
        taken.response_complete = False
        self.begin_work(BUSY)
        self._begin(self._repeated_route, self._repeated_headers, body, seconds())
        return True

    def _learn(self, route: str, body: bytes) -> None:
        """Remember the head of a request that came in one read and that the parser has told of."""
        self._n_unlike += 1
        self._repeated = None
        is_worth_it = self._n_unlike <= MAX_UNLIKE and self._taken.keep_alive
        if is_worth_it and len(self._read) - len(body) + MAX_DIGITS <= self.patience.max_head_bytes:
            self._repeated = repeated_head(self._read, len(body))
            self._repeated_route, self._repeated_headers = route, self._headers

    def _begin(self, route: str, headers: dict[bytes, bytes], body: bytes, began: float) -> None:
        call = self.relay.begin(route, headers, body, self, began)
        if not self._taken.response_complete:
            self._call = call
            if self.flow.write_paused:
                call.client_paused()

    def _let_others_be_read(self) -> None:
        """Read on at the loop's next turn: libuv hands over up to 8 MB in one, which are millions of tiny chunks."""
        self.transport.pause_reading()
        self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; of a trailer nothing is kept."""
        if self.phase == HEAD:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_message_begin(self) -> None:
        """A request begins; uvicorn's scope is made only if the request is not ours."""
        self.begin_head()
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """Take the request, or leave it to uvicorn."""
        route = HOT_TARGETS.get(self.url)
        parser = self.parser
        if (
            route is not None
            and not self.is_answering()
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and self._has_modest_head()
        ):
            self._take(route, keep_alive=parser.should_keep_alive() and not self.patience.is_retiring)
        else:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers.extend(headers)  # The list that the new scope holds.
            super().on_headers_complete()

    def _has_modest_head(self) -> bool:
        limit = self.patience.max_head_bytes
        return self.n_head <= limit or head_size(self.url, self.headers) <= limit

    def has_answered_in_part(self) -> bool:
        """Whether another answer would land in the middle of one."""
        if self.cycle is not self._taken:
            return super().has_answered_in_part()
        return self._call is not None or bool(self.pipeline)

    def _take(self, route: str, *, keep_alive: bool) -> None:
        self._route = route
        self._parts, self._joined, self._size = [], bytearray(), 0
        self._began = seconds()
        taken = self._taken
        taken.response_complete = False
        taken.keep_alive = keep_alive
        self.cycle = taken
        self._headers = dict(self.headers)
        self.begin_work(BODY)
        announced = self._headers.get(b"content-length")
        if announced is not None and int(announced) > self.relay.max_body_bytes:
            self._refuse(body_too_large(self.relay.max_body_bytes))

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        if self.cycle is not self._taken:
            super().on_body(body)
        elif self._route is not None:
            self._parts.append(body)
            self._size += len(body)
            if self._size > self.relay.max_body_bytes:
                self._refuse(body_too_large(self.relay.max_body_bytes))
            elif len(self._parts) == MOST_PARTS:
                self._joined += b"".join(self._parts)
                self._parts = []

    def on_message_complete(self) -> None:
        """A request is complete."""
        if self.cycle is not self._taken:
            super().on_message_complete()
            return
        route, self._route = self._route, None
        if route is not None:
            self.phase = BUSY
            parts = self._parts
            raw = parts[0] if len(parts) == 1 else b"".join(parts)
            if self._joined:
                raw = bytes(self._joined) + raw
                self._joined = bytearray()
            self._parts = []
            if self._read:
                self._learn(route, raw)
            self._begin(route, self._headers, raw, self._began)

    def _refuse(self, error: ApiError) -> None:
        """Answer before the body is complete, and close: what is left of it is not read."""
        route, self._route = self._route, None
        self._parts, self._joined = [], bytearray()
        self._taken.keep_alive = False
        error.headers.pop("connection", None)  # `send_whole` says it.
        if route is not None:
            self.relay.refuse_upload(route, self._headers, error, self)

    def overdue(self) -> None:
        """The phase has lasted too long; a completion request that does is answered and counted as one."""
        if self.phase == BODY and self._route is not None:
            self._refuse(body_too_slow(self.relay.timeouts.request_body_s))
        else:
            super().overdue()

    # What the relay says.

    def send_whole(self, status: int, lines: bytes, body: bytes) -> None:
        """See `serving.client.Client`."""
        head = b"%b%b%bcontent-length: %d\r\n" % (STATUS_LINES[status], self.date_line(), lines, len(body))
        close = b"\r\n" if self._taken.keep_alive else CLOSE + b"\r\n"
        self.transport.write(b"".join((head, close, body)))
        self._finish()

    def start_stream(self, lines: bytes, part: bytes) -> None:
        """See `serving.client.Client`."""
        close = b"\r\n" if self._taken.keep_alive else CLOSE + b"\r\n"
        chunk = chunk_of(part) if part else ()
        self.transport.write(b"".join((OK, self.date_line(), lines, CHUNKED, close, *chunk)))

    def send_part(self, part: bytes) -> None:
        """See `serving.client.Client`."""
        self.transport.write(b"".join(chunk_of(part)))

    def end_stream(self, part: bytes) -> None:
        """See `serving.client.Client`."""
        self.transport.write(b"".join((*chunk_of(part), LAST_CHUNK)) if part else LAST_CHUNK)
        self._finish()

    def drop(self) -> None:
        """See `serving.client.Client`."""
        self._call = None
        self.transport.abort()

    def date_line(self) -> bytes:
        """The `date` line that uvicorn keeps up to date for all its answers."""
        current = self.server_state.default_headers
        if self._date[0] is not current:
            self._date = (current, b"".join(b"%b: %b\r\n" % pair for pair in current))
        return self._date[1]

    def _finish(self) -> None:
        self._call = None
        self._taken.response_complete = True
        if not self._taken.keep_alive:
            self.server_state.total_requests += 1
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        else:  # The same without uvicorn's timer: idle connections are the patience's business.
            self.server_state.total_requests += 1
            self.rest()

    # What the transport says.

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._route = None
        call, self._call = self._call, None
        if call is not None:
            call.client_left()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        if self._call is not None:
            self._call.client_paused()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._call is not None:
            self._call.client_resumed()


def chunk_of(part: bytes) -> tuple[bytes, bytes, bytes]:
    """A chunk, to be joined with what is sent along: one copy, where formatting it would make three."""
    return b"%x\r\n" % len(part), part, CRLF


def fast_lane_of(relay: Relay) -> type[FastLane]:
    """The protocol of one gateway: for uvicorn a class, of which it only ever makes instances."""
    return cast("type[FastLane]", partial(FastLane, relay))
