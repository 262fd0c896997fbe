"""The side that asked, as the relay sees it: the fast lane and plain ASGI both look like this."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import Final, Protocol

STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
EVENT_STREAM: Final = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
)
JSON_TYPE: Final = b"content-type: application/json\r\n"


class Client(Protocol):
    """Takes one answer. Head lines come ready-made, each ending in CR LF; length and framing are the client's to add.

    After `send_whole` or `end_stream` nothing more is sent. A client whose peer leaves tells the call (`client_left`).
    """

    def send_whole(self, status: int, lines: bytes, body: bytes) -> None:
        """A complete answer."""

    def start_stream(self, lines: bytes, part: bytes) -> None:
        """The head of a 200 that streams, and the first bytes of its body."""

    def send_part(self, part: bytes) -> None:
        """More of the body; never empty."""

    def end_stream(self, part: bytes) -> None:
        """The end of the body, perhaps with the last of it."""

    def drop(self) -> None:
        """Close the connection without another word: the peer has stopped reading."""


@lru_cache(maxsize=4096)
def header_value(text: str) -> bytes:
    """Text as a header may carry it: what HTTP cannot carry becomes `?`, and no line can be smuggled in."""
    printable = "".join(character if " " <= character != "\x7f" else "?" for character in text)
    return printable.encode("latin-1", "replace")
