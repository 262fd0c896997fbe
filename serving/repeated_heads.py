"""Heads that come again: a connection that is kept mostly sends the same head each time, but for its `content-length`.

The parser tells of every header by a call, which is a good part of what a request costs. A head that it has read once
on a connection need not be read again: equal bytes mean the same. Only a whole message that arrives at once is taken
this way; everything else goes to the parser, which never hears of what was taken here and so stands where it stood.
"""

from __future__ import annotations

from typing import Final

HEAD_END: Final = b"\r\n\r\n"
LENGTH: Final = b"\r\ncontent-length: "
MAX_DIGITS: Final = 9
MAX_BYTES: Final = 8 * 1024
"""Of a head that is remembered, since every connection may make us remember one."""
MAX_UNLIKE: Final = 4
"""Heads in a row that were not as the one before: whoever sends a new one each time is not looked at any longer."""


class RepeatedHead:
    """A head in two pieces, around the digits of its `content-length`."""

    __slots__ = ("_after", "_before", "_n_before")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after
        self._n_before = len(before)

    def body_of(self, data: bytes) -> bytes | None:
        """The body, if `data` is this head again and behind it all that it announces, and nothing else.

        What a head must announce follows from how much there is in all, so that its digits need not be read.
        """
        n_before = self._n_before
        n_rest = len(data) - n_before - len(self._after)
        if n_rest <= 0 or not data.startswith(self._before):
            return None
        n_digits = len(str(n_rest))
        digits = str(n_rest - n_digits)
        if len(digits) < n_digits:  # Then the length itself is a digit shorter than it is with its digits.
            n_digits -= 1
            digits = str(n_rest - n_digits)
        if len(digits) != n_digits or not data.startswith(digits.encode() + self._after, n_before):
            return None
        return data[n_before + len(digits) + len(self._after) :]


def repeated_head(data: bytes, n_body: int) -> RepeatedHead | None:
    """What to recognise the head of a message by, given what was read at once, and how long its body is by the parser.

    >>> head = repeated_head(b"POST / HTTP/1.1\\r\\nContent-Length: 2\\r\\n\\r\\nab", 2)
    >>> head.body_of(b"POST / HTTP/1.1\\r\\nContent-Length: 3\\r\\n\\r\\nabc")
    b'abc'
    """
    head_end = data.find(HEAD_END) + len(HEAD_END)
    if head_end > MAX_BYTES:
        return None
    head = data[:head_end].lower()
    at = head.find(LENGTH) + len(LENGTH)
    end = head.find(b"\r", at)
    is_plain = at >= len(LENGTH) and 0 < end - at <= MAX_DIGITS and head[at:end].isdigit()
    if not is_plain or len(data) - head_end != n_body or int(head[at:end]) != n_body:
        return None
    return RepeatedHead(data[:at], data[end:head_end])
