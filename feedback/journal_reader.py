"""Reading a journal, a living one too: from where the drain stands to the last whole frame.

The frames at a living journal's end may not be on disk yet. Taking them early does no harm: nobody has been told that
they are kept, they are true records, and the database knows them by their ids if they come again. What must not happen
is that the drain's place points into bytes that a power cut takes back and that later hold something else: a writer
never goes on in a segment of an earlier start, and a place names its segment's salt beside the number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from feedback.segment_files import (
    POSITION,
    Slots,
    hand_back,
    is_abandoned,
    opened,
    read_header,
    read_position,
    remove_half_used,
    remove_spares,
    segment_numbers,
    segment_path,
    write_zeros,
)
from feedback.segments import (
    FRAME,
    HEADER_BYTES,
    SALT_BYTES,
    Frame,
    Header,
    Position,
    frame_size,
    pack_position,
    scan_frames,
    unpack_frame,
    unpack_position,
)

log = structlog.get_logger()

CHUNK_BYTES = 1024 * 1024
FIRST_BYTES = 16 * 1024
"""Of a batch; four times as much each time that was not enough, up to `CHUNK_BYTES`."""
MANY = 1_000_000
KEPT_FILES = 2
"""Drained segments that a living journal gets back to write on."""
NOWHERE = Position(0, bytes(SALT_BYTES), 0, 0)


def place_in(descriptor: int, number: int, known: Position) -> Position | None:
    """Where reading a segment goes on, or its first frame; None if it has not begun."""
    header = read_header(descriptor) or _header_by_salt(descriptor, number, known.seq)
    if header is None:
        return None
    if (known.number, known.salt) == (number, header.salt):
        return known
    return Position(number, header.salt, HEADER_BYTES, max(known.seq, header.follows))


def _header_by_salt(descriptor: int, number: int, after: int) -> Header | None:
    """For a damaged head: the first frame has the salt too, if it is a frame."""
    head = os.pread(descriptor, HEADER_BYTES + FRAME.size, 0)
    salt = head[HEADER_BYTES : HEADER_BYTES + SALT_BYTES]
    if not any(head[:HEADER_BYTES]) or not any(salt):
        return None
    found = Position(number, salt, HEADER_BYTES, after)
    return Header(salt, number, after, 0, 0.0) if read_on(descriptor, found, 1)[0] else None


def read_on(descriptor: int, place: Position, limit: int) -> tuple[list[Frame], Position]:
    """The whole frames from a place on, at most `limit` and about `CHUNK_BYTES`, and the place behind them.

    Reads more only while frames fill what it has read: behind the newest stand zeros that only the disk has.
    """
    head = os.pread(descriptor, FRAME.size, place.offset)
    size = frame_size(head, 0, place.salt, place.seq)
    left = os.fstat(descriptor).st_size - place.offset
    frames: list[Frame] = []
    if not 0 < size <= left:
        return frames, place
    enough, n_asked = place.offset + CHUNK_BYTES, max(FIRST_BYTES, size)
    is_cut = True
    while is_cut and len(frames) < limit and place.offset < enough:
        data = os.pread(descriptor, n_asked, place.offset)
        found, n_bytes, n_missing = scan_frames(data, place.salt, place.seq, limit - len(frames))
        frames += found
        if found:
            place = place._replace(offset=place.offset + n_bytes, seq=found[-1].seq)
        is_cut = bool(found) and (n_missing > 0 or len(data) - n_bytes < SALT_BYTES)
        n_asked = min(4 * n_asked, CHUNK_BYTES)
    return frames, place


def _without_reading_ahead(descriptor: int) -> None:
    """What the system would read ahead is zeros that nobody wants."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def behind_damage(descriptor: int, place: Position) -> Position | None:
    """The next whole frame after bytes that are none; None if nothing more comes."""
    start = place.offset + 1
    while data := os.pread(descriptor, CHUNK_BYTES, start):
        found = data.find(place.salt)
        if found < 0:
            start += max(1, len(data) - SALT_BYTES + 1)
            continue
        start += found
        if _is_frame(descriptor, place, start):
            return place._replace(offset=start)
        start += 1
    return None


def _is_frame(descriptor: int, place: Position, offset: int) -> bool:
    head = os.pread(descriptor, FRAME.size, offset)
    size = frame_size(head, 0, place.salt, place.seq)
    if not 0 < size <= os.fstat(descriptor).st_size - offset:
        return False
    return unpack_frame(os.pread(descriptor, size, offset), 0, size) is not None


def last_seq(directory: Path) -> int:
    """The last record in a journal that nobody writes, or the last one drained.

    A segment without frames says only which record was acknowledged before it: an earlier one may hold later records,
    which the disk took and refused at once, and whose numbers must not be used again.
    """
    position = read_position(directory) or NOWHERE
    newest = position.seq
    for number in reversed(segment_numbers(directory)):
        with opened(segment_path(directory, number)) as descriptor:
            place = place_in(descriptor, number, position)
            end = None if place is None else _end_of(descriptor, place)
        if place is not None and end is not None:
            newest = max(newest, end.seq)
            if end.offset > place.offset:
                break
    return newest


def _end_of(descriptor: int, place: Position) -> Position:
    found: Position | None = place
    while found is not None:
        place = _end_of_run(descriptor, found)
        found = behind_damage(descriptor, place)
    return place


def _end_of_run(descriptor: int, place: Position) -> Position:
    frames, behind = read_on(descriptor, place, MANY)
    while frames:
        place = behind
        frames, behind = read_on(descriptor, place, MANY)
    return place


def first_seq(directory: Path, last: int) -> int:
    """The first record that may still be there when nothing is known of the drain; after the last one without any."""
    for number in segment_numbers(directory):
        with opened(segment_path(directory, number)) as descriptor:
            header = read_header(descriptor)
            if header is not None:
                return header.follows + 1
    return last + 1


def waiting_since(directory: Path, position: Position | None) -> float | None:
    """When the first record after a place was appended."""
    position = position or NOWHERE
    for number in segment_numbers(directory):
        if number >= position.number and (at := _first_time(directory, number, position)) is not None:
            return at
    return None


def _first_time(directory: Path, number: int, position: Position) -> float | None:
    try:
        with opened(segment_path(directory, number)) as descriptor:
            place = place_in(descriptor, number, position)
            head = os.pread(descriptor, FRAME.size, place.offset) if place else b""
    except FileNotFoundError:  # Drained and handed back just now.
        return None
    if place is None or len(head) < FRAME.size or not frame_size(head, 0, place.salt, place.seq):
        return None
    return float(FRAME.unpack(head)[2])


class Loss(NamedTuple):
    """Records that were acknowledged and cannot be read back."""

    event: str
    segment: int
    n_bytes: int
    n_records: int
    """As the sequence numbers tell; at least this many where they do not."""


class JournalReader:
    """The one reader of a journal. `take` looks ahead; only `commit` remembers."""

    def __init__(self, directory: Path, *, on_damage: Callable[[int], None] = lambda _: None) -> None:
        self.directory = directory
        self._on_damage = on_damage
        self._slots = Slots(directory / POSITION)
        self._committed = unpack_position(self._slots.read()) or NOWHERE
        self._cursor = self._committed
        self._losses: list[Loss] = []
        self._taken_until = -math.inf
        remove_half_used(directory)

    def take(self, limit: int) -> list[Frame]:
        """The next records, in order. Damaged bytes are skipped, counted and logged.

        Raises:
            OSError: the disk cannot be read.
        """
        frames = self._take(limit)
        self._taken_until = frames[-1].at if frames else math.inf
        return frames

    def _take(self, limit: int) -> list[Frame]:
        numbers = segment_numbers(self.directory)
        for number in numbers:
            if number < self._cursor.number:
                continue
            frames, is_over = self._take_from(number, limit, is_last=number == numbers[-1])
            if frames or not is_over:
                return frames
            self._cursor = Position(number + 1, bytes(SALT_BYTES), 0, self._cursor.seq)
        return []

    def commit(self) -> None:
        """Everything taken is in the database: remember the place and give back the segments before it.

        Raises:
            OSError: the place could not be written. What was taken comes again after a restart, and harms nobody.
        """
        if self._cursor == self._committed:
            return
        self._report_losses()
        is_segment_over = self._cursor.number != self._committed.number
        self._committed = self._cursor
        try:
            # A place older than the first segment that is left would look like a loss, so this one must be on disk.
            self._slots.write(pack_position(self._committed), is_durable=is_segment_over)
        finally:
            if is_segment_over:
                self._hand_back_finished()

    def forget(self) -> None:
        """What was taken since the last `commit` could not be stored: it comes again."""
        self._cursor = self._committed
        self._losses.clear()

    def is_past(self, at: float) -> bool:
        """Whether everything that was appended until then has been taken and committed."""
        return self._cursor == self._committed and self._taken_until > at

    def wipe(self) -> None:
        """Overwrite what the database has of the segment that is still written: somebody in it may have been erased.

        The segments before are zeros already. The writer is further on and never looks back.

        Raises:
            OSError: it may still be there.
        """
        place = self._committed
        if place.offset <= HEADER_BYTES:
            return
        for _ in range(2):  # Both slots: a place before this one would lead into zeros, which look like a loss.
            self._slots.write(pack_position(place), is_durable=True)
        with suppress(FileNotFoundError), opened(segment_path(self.directory, place.number), os.O_RDWR) as descriptor:
            header = read_header(descriptor)
            if header is not None and header.salt == place.salt:
                write_zeros(descriptor, HEADER_BYTES, min(place.offset, os.fstat(descriptor).st_size))

    def _take_from(self, number: int, limit: int, *, is_last: bool) -> tuple[list[Frame], bool]:
        """Frames of one segment, or whether there will never be more of them."""
        with opened(segment_path(self.directory, number)) as descriptor:
            _without_reading_ahead(descriptor)
            frames = self._read(descriptor, number, limit)
            if frames or (is_last and not is_abandoned(self.directory)):
                return frames, False
            # Nobody writes here any more: what is not whole now never will be. (It may have been written just now.)
            frames = self._read(descriptor, number, limit) or self._read_behind_damage(descriptor, number, limit)
            return frames, True

    def _read(self, descriptor: int, number: int, limit: int) -> list[Frame]:
        place = place_in(descriptor, number, self._cursor)
        if place is None:
            return []
        if place.number != self._cursor.number or place.salt != self._cursor.salt:
            self._note_loss(number, place.seq)
        frames, self._cursor = read_on(descriptor, place, limit)
        return frames

    def _note_loss(self, number: int, follows: int) -> None:
        """A segment begins with the number of the last record before it that was acknowledged."""
        n_lost = follows - self._cursor.seq if self._cursor != NOWHERE else 0
        if n_lost > 0:
            self._losses.append(Loss("journal_records_missing", number, 0, n_lost))

    def _read_behind_damage(self, descriptor: int, number: int, limit: int) -> list[Frame]:
        place = self._cursor
        if place.number != number:  # Not even its head can be read. One that never began is all zeros.
            if any(os.pread(descriptor, HEADER_BYTES, 0)):
                self._losses.append(Loss("journal_segment_unreadable", number, 0, 1))
            return []
        found = behind_damage(descriptor, place)
        if found is None:
            if os.pread(descriptor, SALT_BYTES, place.offset) == place.salt:
                log.info("journal_tail_cut", directory=self.directory.name, segment=number, offset=place.offset)
            return []
        frames, self._cursor = read_on(descriptor, found, limit)
        n_lost = frames[0].seq - place.seq - 1
        self._losses.append(Loss("journal_damaged", number, found.offset - place.offset, n_lost))
        return frames

    def _report_losses(self) -> None:
        """Only now: until the place has moved on, they would be found again and again."""
        for loss in self._losses:
            fields = {"segment": loss.segment, "bytes": loss.n_bytes, "records": loss.n_records}
            log.error(loss.event, directory=self.directory.name, **fields)
            self._on_damage(loss.n_records)
        self._losses.clear()

    def _hand_back_finished(self) -> None:
        is_over = is_abandoned(self.directory)
        for number in segment_numbers(self.directory):
            if number < self._committed.number:
                hand_back(self.directory, number, keep=0 if is_over else KEPT_FILES)
        if is_over:
            remove_spares(self.directory)
