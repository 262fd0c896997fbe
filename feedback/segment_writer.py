"""Writing a journal's segments: what one thread does with groups of frames, and another with the files to come.

No logging and little else is imported here: the process that does this is one more for every worker of a gateway.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from feedback.segment_files import (
    PAGE_BYTES,
    SPARE,
    ZEROS,
    begin_segment,
    bytes_in,
    drop_cached,
    make_spare,
    read_position,
    segment_numbers,
    write_durably,
)
from feedback.segments import HEADER_BYTES, Header
from pawl.clock import Clock

PROBE_S = 0.5
"""How often a disk that refused is tried again."""
HOUSEKEEPING_S = 1.0
CLOSE_S = 5.0
"""How long closing waits for the thread that makes files ready: it may be in a flush that a hanging disk keeps."""
HANGS = "what was acknowledged is on disk, only the next file is not ready; see to the disk of state_dir"
MAX_AGE_S = 6 * 3600.0
"""A segment is closed after this time even if it is not full, so that a text that was erased does not stay in it."""


class NoRoom(OSError):
    """The journal may not take more of the disk."""


class SpareKeeper:
    """A thread that has the next segment's file ready before it is needed, and knows what the directory takes."""

    def __init__(self, directory: Path, *, max_bytes: int, segment_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._n_bytes = bytes_in(directory, segment_bytes)
        self.has_spare = (directory / SPARE).exists()
        self.is_disk_refusing = False
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="journal-spare", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether there may be one more segment."""
        return self.has_spare or self._n_bytes + self._segment_bytes <= self._max_bytes

    def note_taken(self) -> None:
        """The spare, or without it a new file, became a segment."""
        self._n_bytes += 0 if self.has_spare else self._segment_bytes
        self.has_spare = False
        self._wake.set()

    def close(self) -> bool:
        """Stop; whether the thread has ended in time. One that has not ends with the process, or with its flush."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._look_after_it()
                self.is_disk_refusing = False
            except OSError:  # Seen by whoever needs the file.
                self.is_disk_refusing = True
            self._wake.wait(HOUSEKEEPING_S)
            self._wake.clear()

    def _look_after_it(self) -> None:
        self._n_bytes = bytes_in(self._directory, self._segment_bytes)
        self.has_spare = (self._directory / SPARE).exists()
        if not self.has_spare:
            is_new_allowed = self._n_bytes + self._segment_bytes <= self._max_bytes
            n_bytes = self._segment_bytes if is_new_allowed else 0
            self.has_spare = make_spare(self._directory, n_bytes, goes_on=lambda: not self._is_closed)


class SegmentWriter:
    """The segment being written. Every method but `close` belongs to the writer's thread; the attributes to all."""

    def __init__(
        self, directory: Path, salt: bytes, last_seq: int, *, max_bytes: int, segment_bytes: int, clock: Clock
    ) -> None:
        self._directory = directory
        self._salt = salt
        self._segment_bytes = segment_bytes
        self._clock = clock
        self.kept_seq = last_seq
        """The last record that is on disk."""
        self.error = 0
        """Why the disk refuses, as the system numbers it."""
        position = read_position(directory)
        self._number = max([*segment_numbers(directory), position.number if position else 0])
        self._descriptor: int | None = None
        self._offset = 0
        self._opened_at = 0.0
        self._keeper = SpareKeeper(directory, max_bytes=max_bytes, segment_bytes=segment_bytes)

    @property
    def is_healthy(self) -> bool:
        """False from a failed write until the disk has taken a fresh segment."""
        return not self.error

    @property
    def is_full(self) -> bool:
        """The last segment there may be is more than half full: time to take no new work on."""
        if self._descriptor is not None and self._offset <= self._segment_bytes // 2:
            return False
        keeper = self._keeper
        return not (keeper.has_spare or (keeper.has_room and not keeper.is_disk_refusing))

    @property
    def pause_s(self) -> float:
        """How long to wait for work before `keep_house`."""
        return HOUSEKEEPING_S if self.is_healthy else PROBE_S

    def write(self, parts: Sequence[bytes | memoryview], n_bytes: int, last_seq: int) -> bool:
        """Put a group of frames on disk; return whether it is there."""
        if not self.is_healthy:
            return False
        try:
            descriptor = self._segment_for(n_bytes)
            n_zeros = self._to_page_end(n_bytes)
            write_durably(descriptor, (*parts, ZEROS[:n_zeros]), n_bytes + n_zeros, self._offset)
        except NoRoom:
            return False
        except OSError as exc:
            self._give_up(exc)
            return False
        drop_cached(descriptor, self._offset, self._offset + n_bytes)
        self._offset += n_bytes
        self.kept_seq = last_seq
        return True

    def keep_house(self) -> None:
        """Nothing came for `pause_s`."""
        if not self.is_healthy:
            self._try_again()
        elif self._is_old() and self._offset > HEADER_BYTES:
            self._close_segment()
            self._begin_early()

    def close(self) -> None:
        self._close_segment()
        if not self._keeper.close():
            complain("journal_spare_hangs", directory=str(self._directory), waited_s=CLOSE_S, advice=HANGS)

    def _segment_for(self, n_bytes: int) -> int:
        is_used = self._descriptor is not None and self._offset > HEADER_BYTES
        if is_used and (self._offset + n_bytes > self._segment_bytes or self._is_old()):
            self._close_segment()
        return self._begin() if self._descriptor is None else self._descriptor

    def _to_page_end(self, n_bytes: int) -> int:
        """How many of the zeros behind a group to write anew: of a page that is written whole nothing is read first."""
        end = self._offset + n_bytes
        return max(0, min(-end % PAGE_BYTES, self._segment_bytes - end))

    def _begin(self) -> int:
        if not self._keeper.has_room:
            raise NoRoom(errno.ENOSPC, "the journal is full")
        self._number += 1
        now = self._clock()
        header = Header(self._salt, self._number, self.kept_seq, self._segment_bytes, now)
        self._descriptor = begin_segment(self._directory, header)
        self._keeper.note_taken()
        self._offset, self._opened_at = HEADER_BYTES, now
        return self._descriptor

    def _begin_early(self) -> None:
        """Only the start of the next segment tells the drain that this one is over."""
        try:
            self._begin()
        except NoRoom:
            return
        except OSError as exc:
            self._give_up(exc)

    def _is_old(self) -> bool:
        return self._descriptor is not None and self._clock() - self._opened_at > MAX_AGE_S

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _give_up(self, exc: OSError) -> None:
        """Never write to that file again, nor ask once more whether it is on disk."""
        self.error = exc.errno or errno.EIO
        self._close_segment()

    def _try_again(self) -> None:
        """A file full of zeros and a header that are on disk are the proof that it takes writes again."""
        if not (self._directory / SPARE).exists():
            return
        try:
            self._begin()
        except OSError:
            return
        self.error = 0


def complain(event: str, **fields: object) -> None:
    """A line of the log, without the logging that would be one more thing in this process's memory."""
    with suppress(OSError):
        print(json.dumps({**fields, "event": event, "level": "error"}), file=sys.stderr, flush=True)
