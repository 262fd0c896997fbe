"""Server-sent events on their way through: whole events pass as the bytes they came in.

Three kinds do not simply pass: the usage chunk that only the gateway asked for is dropped, the event that ends the
answer is held back until the record of the completion is durable, and an error the engine sends in place of an answer
ends the stream.
"""

from __future__ import annotations

from typing import Final

DONE: Final = b"data: [DONE]"
NO_CHOICES: Final = b'"choices":[]'
"""Only in a usage chunk: inside any text the quotes would be escaped."""
FAILED: Final = (b'data: {"error"', b"event: error", b"event: response.failed")
"""Begin the event in which vLLM says that it failed; after the first kind it sends `[DONE]` all the same."""
EVENT_END: Final = b"\n\n"
COMMENT: Final = b": keep-alive\n\n"
"""Read over by every client; keeps proxies from closing a stream that is silent for long."""
LAST_EVENTS: Final = {
    "chat.completions": (DONE,),
    "completions": (DONE,),
    "responses": (b"event: response.completed", b"event: response.incomplete"),
    "messages": (b"event: message_stop",),
}
"""How the last event of an answer begins, by route."""
SIGNS: Final = {
    "chat.completions": (b": [DONE]", b'{"error"'),
    "completions": (b": [DONE]", b'{"error"'),
    "responses": (b"response.completed", b"response.incomplete", b"response.failed", b"event: error", b'{"error"'),
    "messages": (b"message_stop", b"event: error", b'{"error"'),
}
"""What is in every event that ends an answer or says that it failed; rare, since every byte is searched for it."""


class EventFilter:
    """Splits a stream of chunks at event boundaries; state is the unfinished event at the end of the last chunk."""

    __slots__ = ("_drop_usage", "_last", "_rest", "_signs", "has_ended", "has_failed", "last_event")

    def __init__(self, route: str = "chat.completions", *, drop_usage: bool) -> None:
        self._drop_usage = drop_usage
        self._last = LAST_EVENTS[route]
        self._signs = (*SIGNS[route], NO_CHOICES) if drop_usage else SIGNS[route]
        self._rest = b""
        self.last_event = b""
        """The event held back, once it has come."""
        self.has_ended = False
        self.has_failed = False
        """It ended with the engine's error, which is swallowed too."""

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes to pass on. The last event and what follows it are not among them; `has_ended` says so."""
        if self.has_ended:
            return b""
        data = self._rest + chunk if self._rest else chunk
        end = data.rfind(EVENT_END) + 2
        if end < 2:
            self._rest = data
            return b""
        if end < len(data):
            self._rest, data = data[end:], data[:end]
        else:
            self._rest = b""
        first = len(data)
        for sign in self._signs:
            at = data.find(sign, 0, first)
            if at >= 0:
                first = at
        if first == len(data):
            return data
        before = data.rfind(EVENT_END, 0, first)
        return self._select(data, before + 2 if before >= 0 else 0)

    def _select(self, data: bytes, start: int) -> bytes:
        """Look at the events from `start` on one by one."""
        kept = [data[:start]]
        for event in data[start:].split(EVENT_END)[:-1]:
            bare = event.strip()
            self.has_failed = bare.startswith(FAILED)
            self.has_ended = self.has_failed or bare.startswith(self._last)
            if self.has_ended:
                self.last_event = event + EVENT_END
                break
            if not (self._drop_usage and NO_CHOICES in event):
                kept.append(event + EVENT_END)
        return b"".join(kept)


def error_event(route: str, body: bytes) -> bytes:
    """An error in the middle of a stream; SDKs raise on it. Never followed by `[DONE]`."""
    if route in ("messages", "responses"):
        return b"event: error\ndata: " + body + EVENT_END
    return b"data: " + body + EVENT_END
