"""How long a connection may take, and how much it may send, before it has asked for anything.

uvicorn has no limit on the time or the size of a request's head (its keep-alive timeout starts after the first
answer), so a client that trickles one holds a connection for as long as it likes. One timer per process looks at all
connections; a request costs a few attribute writes, and an idle process has no timer at all.

A protocol that answers requests itself, without uvicorn's cycle, has three duties: `begin_head` when a request's first
byte came, `begin_work` once its head (`BODY`: until its body) is complete, `rest` when it has answered. It overrides
`is_answering` and `has_answered_in_part`, and closes after every answer while `patience.is_retiring`.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from collections.abc import Collection, Iterable
from typing import Any, Final, cast

import httptools
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from pawl import ids
from pawl.settings import ServingSettings
from serving.errors import RETRY_AFTER_S, error_body
from serving.outbox import Outbox, OutboxTransport

log = structlog.get_logger()

Headers = list[tuple[bytes, bytes]]

SHORTEST_STEP_S = 0.05
LONGEST_STEP_S = 1.0
STEPS_PER_LIMIT = 5
"""A connection outstays its limit by at most this fraction of the shortest limit, or a second."""
EVICTED_AT_ONCE = 64
"""Looking for the oldest costs a pass over all connections: one pass makes room for this many."""
LAST_WORD_S = 2.0
"""A refused client may go on sending for this long: closing at once would reset the answer on its way to it."""
HEADER_OVERHEAD = len(b": \r\n")


# What a connection is doing; the index of its limit. Plain numbers: the compiler makes constants of them.
FRESH: Final = 0
"""Nothing has come yet."""
IDLE: Final = 1
"""Between two requests."""
UNREAD: Final = 2
"""Between two requests for long, but the client is still taking the answer to the last one."""
HEAD: Final = 3
"""Part of a request's head has come."""
BODY: Final = 4
"""The head is complete; used only by protocols that read bodies themselves."""
BUSY: Final = 5
"""A request is being answered: its timeouts are the application's business."""
REFUSED: Final = 6
"""An error was sent; what still comes is thrown away."""
EVICTED: Final = 7
"""Closed to make room, and about to be gone."""
CLOSING: Final = 8
"""Closed, but the client has not taken all that was said to it."""
MAY_BE_EVICTED: Final = (FRESH, IDLE, UNREAD)
"""Unless something waits in them for the client to take it."""
NEVER_S: Final = float("inf")


class Patience:
    """The limits of all connections of one server, and the timer that enforces them."""

    def __init__(self, serving: ServingSettings, outbox: Outbox) -> None:
        limits = serving.timeouts
        head_s, idle_s, body_s = limits.request_head_s, limits.idle_s, limits.request_body_s
        stalled_s = limits.stalled_reader_s
        self.limits_s = (head_s, idle_s, stalled_s, head_s, body_s, NEVER_S, LAST_WORD_S, LAST_WORD_S, stalled_s)
        self.max_head_bytes = serving.max_header_bytes
        self.max_connections = serving.max_connections
        self.outbox = outbox
        self.is_retiring = False
        """A newer process serves new connections: the open ones end with their next answer."""
        self.now = 0.0
        """The loop's time when the timer last ran: precise enough for limits of seconds, and free to read."""
        self._step_s = min(LONGEST_STEP_S, max(SHORTEST_STEP_S, min(head_s, idle_s, body_s) / STEPS_PER_LIMIT))
        self._connections: Collection[PatientHttpProtocol] = ()
        self._timer: asyncio.TimerHandle | None = None
        self._n_evicted = 0

    def welcome(self, newcomer: PatientHttpProtocol) -> None:
        """Watch a new connection; with too many, close the oldest idle ones, else refuse this one."""
        self._connections = newcomer.server_state.connections  # type: ignore[assignment]
        if self._timer is None:
            self.now = newcomer.loop.time()
            self._timer = newcomer.loop.call_later(self._step_s, self._run, newcomer.loop)
        newcomer.since = self.now
        if len(self._connections) - self._n_evicted > self.max_connections and not self._evict(newcomer):
            newcomer.refuse(503, "too many connections (serving.max_connections)", "overloaded")

    def forget(self, gone: PatientHttpProtocol) -> None:
        """A connection has been lost."""
        if gone.phase == EVICTED:
            self._n_evicted -= 1

    def _evict(self, newcomer: PatientHttpProtocol) -> int:
        idle = (one for one in self._connections if one is not newcomer and one.may_be_evicted())
        oldest = heapq.nsmallest(EVICTED_AT_ONCE, idle, key=_since)
        for connection in oldest:
            connection.phase = EVICTED
            connection.close()
        self._n_evicted += len(oldest)
        return len(oldest)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time()
        try:
            self._close_overdue(list(self._connections))
        finally:
            self._timer = loop.call_later(self._step_s, self._run, loop) if self._connections else None

    def _close_overdue(self, connections: Iterable[PatientHttpProtocol]) -> None:
        for connection in connections:
            try:
                self._look_at(connection)
            except Exception:  # One connection's fault must not take the limits from all the others.
                log.exception("connection_check_failed")

    def _look_at(self, connection: PatientHttpProtocol) -> None:
        if connection.phase < REFUSED and connection.transport.is_closing():
            connection.see_off()
        elif self.now - connection.since > self.limits_s[connection.phase]:
            connection.overdue()


class PatientConfig(uvicorn.Config):
    """uvicorn's configuration and the patience that all its connections share."""

    def __init__(self, app: Any, patience: Patience, **options: Any) -> None:
        super().__init__(app, **options)
        self.patience = patience


class PatientHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on the time and the size of a request's head, and on idle connections."""

    def __init__(
        self,
        config: PatientConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.patience = config.patience
        self.phase: int = FRESH
        self.since = self.patience.now
        self.n_head = 0
        """At least as many bytes as the head has so far."""
        self._is_head_too_large = False
        self._n_unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, OutboxTransport(transport, self.patience.outbox)))
        self.patience.welcome(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.patience.forget(self)

    def eof_received(self) -> None:
        """The client sends no more, upon which the loop closes its side: what it is owed goes first."""
        cast(OutboxTransport, self.transport).flush()

    def data_received(self, data: bytes) -> None:
        if self.phase == HEAD:
            self.n_head += len(data)
        elif self.phase < REFUSED:
            self.n_head = len(data)
        else:
            return
        super().data_received(data)
        if self.phase == HEAD and self.n_head > self.patience.max_head_bytes:
            self._refuse_head()

    def on_message_begin(self) -> None:
        self.begin_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase < BODY:  # Trailers come later: nobody reads them, and they would grow without a bound.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.n_head > self.patience.max_head_bytes < head_size(self.url, self.headers):
            self._is_head_too_large = True
            raise httptools.HttpParserError("the head is too large")
        self.begin_work()
        super().on_headers_complete()
        if self.patience.is_retiring and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.phase == HEAD or not self.is_answering():
            self.rest()

    def begin_head(self) -> None:
        """The first byte of a request has come."""
        self.phase = HEAD
        self.since = self.patience.now

    def begin_work(self, phase: int = BUSY) -> None:
        """The head is complete."""
        self.phase = phase
        self.since = self.patience.now

    def rest(self) -> None:
        """An answer is complete; a pipelined head that has begun starts anew."""
        if self.phase < REFUSED:
            self.phase = HEAD if self.phase == HEAD else IDLE
            self.since = self.patience.now

    def is_answering(self) -> bool:
        """Whether a request waits for its answer's end."""
        return self.cycle is not None and not self.cycle.response_complete

    def has_answered_in_part(self) -> bool:
        """Whether another answer would land in the middle of one."""
        return self.is_answering() and (self.cycle.response_started or bool(self.pipeline))

    def overdue(self) -> None:
        """The phase has lasted too long."""
        if self.phase < BODY and self.is_answering():
            return  # Of a pipelined request; the one before it still runs.
        n_unsent = self.transport.get_write_buffer_size()
        if self.phase in (HEAD, BODY):
            self.refuse(408, "the request did not come in time (serving.timeouts)", "request_timeout")
        elif self.phase == IDLE and n_unsent:
            self._watch_reader(UNREAD)
        elif self.phase == UNREAD and not n_unsent:
            self.rest()
        elif self.phase in (UNREAD, CLOSING) and n_unsent < self._n_unsent:
            self._watch_reader(self.phase)
        else:
            self.close()

    def see_off(self) -> None:
        """Closed: from now on the client must go on taking what is left, else a close would never come to its end."""
        self._watch_reader(CLOSING)

    def may_be_evicted(self) -> bool:
        """Whether nobody would miss anything if it were closed now."""
        return self.phase in MAY_BE_EVICTED and not self.transport.get_write_buffer_size()

    def _watch_reader(self, phase: int) -> None:
        """When this phase is overdue, less must wait for the client than now."""
        self.phase = phase
        self.since = self.patience.now
        self._n_unsent = self.transport.get_write_buffer_size()

    def close(self) -> None:
        """Close; at once where the client does not even read what waits for it."""
        if self.transport.get_write_buffer_size() or self.phase == REFUSED:
            self.transport.abort()
        else:
            self.transport.close()

    def refuse(self, status: int, message: str, code: str) -> None:
        """Answer with an error and close, unless that would corrupt an answer under way."""
        if self.has_answered_in_part() or not self.transport.can_write_eof():
            self.transport.close()
            return
        if self.phase < REFUSED and not self.transport.is_closing():
            self.phase = REFUSED
            self.since = self.patience.now
            self.transport.write(refusal(status, message, code))
            self.transport.write_eof()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the text is uvicorn's own
        """What uvicorn calls for a request that the parser would not take."""
        if self._is_head_too_large:
            self._refuse_head()
        else:
            self.refuse(400, "this is not a valid HTTP request", "invalid_http")

    def _refuse_head(self) -> None:
        self.refuse(431, "the request's headers are too large (serving.max_header_bytes)", "headers_too_large")


def _since(connection: PatientHttpProtocol) -> float:
    return connection.since


def head_size(url: bytes, headers: Headers) -> int:
    """Bytes of a request's head, about.

    >>> head_size(b"/", [(b"host", b"a")])
    10
    """
    return len(url) + sum(len(name) + len(value) + HEADER_OVERHEAD for name, value in headers)


REFUSALS: Final = {
    400: ("Bad Request", "invalid_request_error"),
    408: ("Request Timeout", "invalid_request_error"),
    431: ("Request Header Fields Too Large", "invalid_request_error"),
    503: ("Service Unavailable", "overloaded_error"),
}


def refusal(status: int, message: str, code: str) -> bytes:
    """A whole answer, after which the connection is closed."""
    phrase, kind = REFUSALS[status]
    body = error_body(message, kind, None, code)
    lines = (
        f"HTTP/1.1 {status} {phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        f"x-request-id: {ids.uuid7(time.time(), os.urandom(10))}",
        *((f"retry-after: {RETRY_AFTER_S}",) if status == 503 else ()),
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
