"""What one turn of the event loop writes goes out at its end, all in a row.

Whoever waits for bytes on another core sleeps, and to wake it costs the writer more than the write; most of all on a
virtual machine, where it takes an interrupt that leaves the machine. Writes that are spread over a turn find their
readers asleep again each time. In a row only the first one wakes them: meanwhile the others find them at work.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog

log = structlog.get_logger()

MOST_TRANSPORTS: Final = 64
"""That wait for the end of one turn: a long one shall not keep the first of them waiting."""
MOST_BYTES: Final = 64 * 1024
"""That wait on one transport, so that it knows in time that its reader does not keep up."""


class Outbox:
    """The transports of one event loop that have something to send when its turn is over."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[OutboxTransport] = []

    def add(self, transport: OutboxTransport) -> None:
        """Have a transport flushed when the turn is over: before the loop looks at its sockets again.

        What a callback of the loop's own writes, such as a task, goes out after the next look.
        """
        waiting = self._waiting
        if not waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        waiting.append(transport)
        if len(waiting) >= MOST_TRANSPORTS:
            self.flush()

    def flush(self) -> None:
        """Send everything now."""
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            try:
                transport.flush()
            except Exception as exc:  # noqa: BLE001 - one connection's fault must not keep from the others what is theirs
                log.error("write_failed", reason=type(exc).__name__)


class OutboxTransport:
    """A transport whose writes wait for the end of the turn, with all of `asyncio.Transport` that is asked for.

    The order stays: a close, or the end of what is sent, goes behind what was written before.
    """

    __slots__ = ("_has_ended", "_n_bytes", "_outbox", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, outbox: Outbox) -> None:
        self._transport: Final = transport
        self._outbox: Final = outbox
        self._parts: list[bytes] = []
        self._n_bytes = 0
        self._has_ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes when the turn is over, or at once if they are many.

        Raises:
            RuntimeError: `write_eof` came before.
        """
        if self._has_ended:
            raise RuntimeError("write() after write_eof()")
        part = data if isinstance(data, bytes) else bytes(data)
        parts = self._parts
        parts.append(part)
        self._n_bytes += len(part)
        if self._n_bytes > MOST_BYTES:
            self.flush()
        elif len(parts) == 1:
            self._outbox.add(self)

    def flush(self) -> None:
        """Send now what waits, unless the connection is closed; one that closes may still have something to send."""
        parts = self._parts
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            self._forget()
            if not self._transport.is_closing() or self._transport.get_write_buffer_size():
                self._transport.write(data)

    def _forget(self) -> None:
        self._parts.clear()
        self._n_bytes = 0

    def write_eof(self) -> None:
        """Send what waits, and that there will be no more."""
        self.flush()
        self._has_ended = True
        self._transport.write_eof()

    def close(self) -> None:
        """Send what waits, then close."""
        try:
            self.flush()
        finally:
            self._transport.close()

    def abort(self) -> None:
        """Close at once, whatever waits."""
        self._forget()
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Bytes that have not left."""
        return self._n_bytes + self._transport.get_write_buffer_size()

    # The rest is the transport's own.

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self._transport.get_extra_info(name, default)
