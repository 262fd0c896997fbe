"""Journals for tests: small segments, records that say who they are, and what is in the files afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback.journal import Journal
from feedback.journal_reader import JournalReader
from feedback.segments import FRAME, HEADER_BYTES, Frame, scan_frames, unpack_header

SEGMENT_BYTES = 16 * 1024
MAX_BYTES = 16 * 1024 * 1024


def unbound_journal(directory: Path, **changes: Any) -> Journal:
    return Journal(directory, **({"max_bytes": MAX_BYTES, "segment_bytes": SEGMENT_BYTES} | changes))


def open_journal(directory: Path, **changes: Any) -> Journal:
    """Bound to the running loop."""
    journal = unbound_journal(directory, **changes)
    journal.bind(asyncio.get_running_loop())
    return journal


async def keep(journal: Journal, *parts: bytes) -> bool:
    """Append one record; whether it was kept."""
    answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    meta, request, response = (*parts, b"", b"")[:3]
    journal.append(meta, request, response, answer.set_result)
    return await answer


async def keep_all(journal: Journal, names: Sequence[bytes], *, size: int = 100) -> list[bool]:
    """Append many at once."""
    return list(await asyncio.gather(*(keep(journal, name, b"q" * size, b"r" * size) for name in names)))


def names(first: int, last: int) -> list[bytes]:
    return [f"record {number}".encode() for number in range(first, last)]


def everything_in(reader: JournalReader) -> list[Frame]:
    """All that can be read now; nothing is committed."""
    found: list[Frame] = []
    while frames := reader.take(500):
        found += frames
    return found


def names_in(directory: Path) -> list[bytes]:
    """Of the records that a drain would take, in order."""
    return [frame.meta for frame in everything_in(JournalReader(directory))]


def frame_offsets(path: Path) -> list[int]:
    """Where the frames of a segment begin, and where the last ends."""
    data = path.read_bytes()
    header = unpack_header(data)
    assert header is not None
    offsets = [HEADER_BYTES]
    for frame in scan_frames(data[HEADER_BYTES:], header.salt, header.follows, 1000).frames:
        size = FRAME.size + 4 + len(frame.meta) + len(frame.request) + len(frame.response)
        offsets.append(offsets[-1] + size)
    return offsets


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
