"""The bytes of a journal: segment headers, framed records, and the drain's place among them.

A segment is a header and then frames, one behind the other. Everything carries the journal's salt, eight random bytes
drawn at each start of its writer: no text that a client sends can contain it, so frames can be found again behind
damage, and what an earlier writer left in a recycled file is not taken for a record. Against this writer's own earlier
bytes stand the sequence numbers, which only rise: a segment's frames are newer than the record its header names.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

MAGIC = b"PAWLJRN1"
SALT_BYTES = 8
HEADER = struct.Struct("<8s8sQQQd")
CRC_BYTES = 4
HEADER_BYTES = HEADER.size + CRC_BYTES
FRAME = struct.Struct("<8sQdIII")
"""Salt, sequence number, time, and the lengths of the three parts that follow; behind them the CRC-32 of it all."""
FRAME_BYTES = FRAME.size + CRC_BYTES
"""What a frame adds to its record."""
POSITION = struct.Struct("<Q8sQQ")


class Header(NamedTuple):
    """The head of a segment."""

    salt: bytes
    number: int
    follows: int
    """The last record that was acknowledged before this segment was opened: an older one here is a leftover, and one
    missing before it is a loss."""
    n_bytes: int
    """What the segment was meant to hold; a single larger record may have made it grow."""
    opened_at: float


class Frame(NamedTuple):
    """One record as the journal keeps it."""

    seq: int
    at: float
    """When it was appended."""
    meta: bytes
    request: bytes
    response: bytes


class Scan(NamedTuple):
    """The frames at the start of some bytes."""

    frames: list[Frame]
    n_bytes: int
    """How many bytes they take."""
    n_missing: int
    """Bytes that must follow before the next frame can be read; 0 where no frame begins."""


class Position(NamedTuple):
    """How far a journal has been drained: everything before `offset` of segment `number` is in the database."""

    number: int
    salt: bytes
    """Of that segment. A file of the same number with another salt is a different one and is read from its start."""
    offset: int
    seq: int
    """The last record drained."""


def sealed(content: bytes) -> bytes:
    """The content with its CRC-32 behind it.

    >>> unsealed(sealed(b"place")) == b"place"
    True
    >>> unsealed(bytes(9)) is None
    True
    """
    return content + crc_of(content)


def unsealed(data: bytes) -> bytes | None:
    """The content, if it is what was sealed. Zeros are not: the CRC of zeros is another."""
    content = data[:-CRC_BYTES]
    return content if len(data) > CRC_BYTES and crc_of(content) == data[-CRC_BYTES:] else None


def crc_of(content: bytes) -> bytes:
    return crc32(content).to_bytes(CRC_BYTES, "little")


def pack_header(header: Header) -> bytes:
    """As it stands at the start of a segment."""
    return sealed(HEADER.pack(MAGIC, *header))


def unpack_header(data: bytes) -> Header | None:
    """None for a segment that has not begun, or whose head is damaged."""
    content = unsealed(data[:HEADER_BYTES])
    if content is None or len(content) != HEADER.size or not content.startswith(MAGIC):
        return None
    _, *fields = HEADER.unpack(content)
    return Header(*fields)


def pack_position(position: Position) -> bytes:
    """For the drain's file."""
    return POSITION.pack(position.number, position.salt, position.offset, position.seq)


def unpack_position(data: bytes) -> Position | None:
    """None where nothing has been drained yet."""
    return Position(*POSITION.unpack(data)) if len(data) == POSITION.size else None


def frame_size(data: bytes, start: int, salt: bytes, after: int) -> int:
    """Bytes of the frame that seems to begin at `start`; 0 where none does.

    Only the CRC tells whether it is whole. `after` is the last sequence number that cannot come any more.
    """
    if not data.startswith(salt, start):
        return 0
    if len(data) - start < FRAME.size:
        return FRAME_BYTES
    _, seq, _, n_meta, n_request, n_response = FRAME.unpack_from(data, start)
    return FRAME_BYTES + n_meta + n_request + n_response if seq > after else 0


def unpack_frame(data: bytes, start: int, size: int) -> Frame | None:
    """The frame of that size at `start`, if all of it is there and as it was written."""
    end = start + size - CRC_BYTES
    if crc32(memoryview(data)[start:end]).to_bytes(CRC_BYTES, "little") != data[end : start + size]:
        return None
    _, seq, at, n_meta, n_request, _ = FRAME.unpack_from(data, start)
    request_at = start + FRAME.size + n_meta
    response_at = request_at + n_request
    return Frame(seq, at, data[start + FRAME.size : request_at], data[request_at:response_at], data[response_at:end])


def scan_frames(data: bytes, salt: bytes, after: int, limit: int) -> Scan:
    """The frames that stand one behind the other at the start of `data`, at most `limit`."""
    frames: list[Frame] = []
    start = 0
    while len(frames) < limit and (size := frame_size(data, start, salt, after)):
        if start + size > len(data):
            return Scan(frames, start, start + size - len(data))
        frame = unpack_frame(data, start, size)
        if frame is None:
            break
        frames.append(frame)
        after, start = frame.seq, start + size
    return Scan(frames, start, 0)
