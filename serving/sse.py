"""Server-sent events on their way through: whole events pass as the bytes they came in.

Three kinds do not simply pass: the usage chunk that only the gateway asked for is dropped, `[DONE]` is held back until
the record of the completion is durable, and an error the engine sends in place of an answer ends the stream.
"""

from __future__ import annotations

DONE = b"data: [DONE]"
NO_CHOICES = b'"choices":[]'
"""Only in a usage chunk: inside any text the quotes would be escaped."""
FAILED = b'data: {"error"'
"""Begins the event in which vLLM says that it failed; it sends `[DONE]` after it all the same."""
EVENT_END = b"\n\n"


class EventFilter:
    """Splits a stream of chunks at event boundaries; state is the unfinished event at the end of the last chunk."""

    def __init__(self, *, drop_usage: bool) -> None:
        self._drop_usage = drop_usage
        self._rest = b""
        self.has_ended = False
        self.has_failed = False
        """It ended with the engine's error, which is swallowed too."""

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
        needs_look = DONE in data or FAILED in data or (self._drop_usage and NO_CHOICES in data)
        return self._select(data) if needs_look else data

    def _select(self, data: bytes) -> bytes:
        kept: list[bytes] = []
        for event in data.split(EVENT_END)[:-1]:
            self.has_failed = event.lstrip().startswith(FAILED)
            self.has_ended = self.has_failed or event.strip() == DONE
            if self.has_ended:
                break
            if not (self._drop_usage and NO_CHOICES in event):
                kept.append(event + EVENT_END)
        return b"".join(kept)


def error_event(body: bytes) -> bytes:
    """An error in the middle of a stream; SDKs raise on it. Never followed by `[DONE]`."""
    return b"data: " + body + EVENT_END
