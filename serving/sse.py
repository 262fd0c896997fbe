"""Server-sent events on their way through: whole events pass as the bytes they came in.

Two kinds do not simply pass: the usage chunk that only the gateway asked for is dropped, and `[DONE]` is held back
until the record of the completion is durable.
"""

from __future__ import annotations

DONE = b"data: [DONE]"
NO_CHOICES = b'"choices":[]'
"""Only in a usage chunk: inside any text the quotes would be escaped."""
EVENT_END = b"\n\n"


class EventFilter:
    """Splits a stream of chunks at event boundaries; state is the unfinished event at the end of the last chunk."""

    def __init__(self, *, drop_usage: bool) -> None:
        self._drop_usage = drop_usage
        self._rest = b""
        self.has_ended = False

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes to pass on. `[DONE]` and what follows it are swallowed; `has_ended` says so."""
        if self.has_ended:
            return b""
        data = self._rest + chunk if self._rest else chunk
        end = data.rfind(EVENT_END) + len(EVENT_END)
        if end < len(EVENT_END):
            self._rest = data
            return b""
        self._rest, data = data[end:], data[:end]
        needs_look = DONE in data or (self._drop_usage and NO_CHOICES in data)
        return self._select(data) if needs_look else data

    def _select(self, data: bytes) -> bytes:
        kept: list[bytes] = []
        for event in data.split(EVENT_END)[:-1]:
            if event.strip() == DONE:
                self.has_ended = True
                break
            if not (self._drop_usage and NO_CHOICES in event):
                kept.append(event + EVENT_END)
        return b"".join(kept)


def error_event(body: bytes) -> bytes:
    """An error in the middle of a stream; SDKs raise on it. Never followed by `[DONE]`."""
    return b"data: " + body + EVENT_END
