"""A journal's directory: segments by number, files ready to become the next one, the lock, and the drain's place.

lock                     held by the process that writes here
000000000007.segment     records; the highest number is the one being written
spare                    zeros, ready to become the next segment
free-000000000005        the same, handed back by the drain
used-000000000006        drained, and on its way to being zeros
position                 how far the drain is
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from feedback.errors import SpoolUnavailable
from feedback.segments import (
    HEADER_BYTES,
    Header,
    Position,
    pack_header,
    sealed,
    unpack_header,
    unpack_position,
    unsealed,
)
from pawl.durability import sync_directory

SUFFIX = ".segment"
LOCK, SPARE, POSITION = "lock", "spare", "position"
FREE, USED = "free-", "used-"
PAGE_BYTES = 4096
ZEROS = memoryview(mmap.mmap(-1, 1024 * 1024, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ))
"""Files are filled in steps of this, each on disk before the next, so that records never wait behind a long flush. It
begins where a page does, as writes past the page cache must."""
DIRECT: int = getattr(os, "O_DIRECT", 0)
SLOT_BYTES = 64
WRITE_FLAGS: int = getattr(os, "RWF_DSYNC", 0)
"""What `fdatasync` does, as a part of the write (Linux)."""
LOCK_POLL_S = 0.02


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:012d}{SUFFIX}"


def segment_numbers(directory: Path) -> list[int]:
    """In order."""
    with suppress(FileNotFoundError):
        return sorted(int(name.removesuffix(SUFFIX)) for name in os.listdir(directory) if name.endswith(SUFFIX))
    return []


def bytes_in(directory: Path, segment_bytes: int) -> int:
    """What the directory's files take; a segment counts as full, for it will be."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                least = segment_bytes if entry.name.endswith(SUFFIX) else 0
                total += max(least, entry.stat().st_size)
    return total


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The file's descriptor, for as long as the block runs."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(path: Path, *, patience_s: float = 0.0) -> IO[str]:
    """Hold an advisory lock on a file until the result is closed.

    Raises:
        SpoolUnavailable: another process holds it, or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as exc:
        raise SpoolUnavailable(f"the spool {path.parent} cannot be opened: {exc.strerror}") from exc
    return hold(handle, path.parent, patience_s=patience_s)


def hold(handle: IO[str], guarded: Path, *, patience_s: float) -> IO[str]:
    """Lock an open file until it is closed.

    Raises:
        SpoolUnavailable: another process holds it, and so what it guards.
    """
    until = time.monotonic() + patience_s
    while not _has_locked(handle):
        if time.monotonic() >= until:
            handle.close()
            raise SpoolUnavailable(f"the spool {guarded} is in use by another process")
        time.sleep(LOCK_POLL_S)
    return handle


def is_abandoned(directory: Path) -> bool:
    """Whether no process writes here at this moment. One that starts meanwhile only opens later segments."""
    try:
        lock(directory / LOCK).close()
    except SpoolUnavailable:
        return False
    return True


def _has_locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_durably(descriptor: int, parts: Sequence[bytes | memoryview], n_bytes: int, offset: int) -> None:
    """Put the parts at `offset` and wait until the disk has them; the interpreter's lock is free meanwhile.

    Where the system can write and flush in one call, the thread has to get that lock back once, not twice: on a
    saturated event loop each time takes milliseconds.

    Raises:
        OSError: they may be there in part, or not at all, and the file is not to be trusted any more.
    """
    if os.pwritev(descriptor, parts, offset, WRITE_FLAGS) != n_bytes:
        raise OSError(errno.ENOSPC, "the disk took only a part")
    if not WRITE_FLAGS:
        os.fsync(descriptor)


def drop_cached(descriptor: int, start: int, end: int) -> None:
    """Let the page cache forget what the disk has of a file's whole pages before `end`, from the one with `start` on.

    The pages are then free for the next write. Kept until a drain has read them, they would take ever new memory, which
    the processor has in none of its caches: to fill that can cost it more than all else about a write.
    """
    start, end = start - start % PAGE_BYTES, end - end % PAGE_BYTES
    if end > start and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # It is advice: whoever cannot take it keeps the pages.
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def make_spare(directory: Path, n_bytes: int, *, goes_on: Callable[[], bool] = lambda: True) -> bool:
    """Have a file of zeros ready: one that the drain handed back, else a new one of `n_bytes` (0: none).

    Overwriting blocks that exist costs a journal's flush about a third less than appending (91 against 135
    microseconds where this was measured), because the file system has nothing of its own to write.
    """
    spare, growing = directory / SPARE, directory / f"{SPARE}.part"
    if _take_free(directory, spare):
        return True
    if n_bytes == 0:
        return False
    try:
        fill_with_zeros(growing, n_bytes, goes_on=goes_on)
        growing.rename(spare)
    except OSError:
        growing.unlink(missing_ok=True)
        raise
    return True


def _take_free(directory: Path, target: Path) -> bool:
    for name in sorted(os.listdir(directory)):
        if name.startswith(FREE):
            with suppress(FileNotFoundError):
                (directory / name).rename(target)
                return True
    return False


def fill_with_zeros(path: Path, n_bytes: int, *, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Overwrite or make the file; afterwards it holds zeros and nothing else, on disk.

    Raises:
        OSError: the disk refuses, or `goes_on` said no between two steps.
    """
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.ftruncate(descriptor, min(n_bytes, os.fstat(descriptor).st_size))
        n_filled = _fill_past_cache(path, n_bytes, goes_on=goes_on)
        write_zeros(descriptor, n_filled, n_bytes, goes_on=goes_on)


def _fill_past_cache(path: Path, n_bytes: int, *, goes_on: Callable[[], bool]) -> int:
    """Fill a file's whole pages without a copy of each in the page cache; return how far that went.

    The copies cost the processor more than the records that are written over them later. Whoever writes a part of such
    a page must write the rest of it too, or the disk is read first.
    """
    whole = n_bytes - n_bytes % PAGE_BYTES if DIRECT else 0
    try:
        with opened(path, os.O_WRONLY | DIRECT) as descriptor:
            write_zeros(descriptor, 0, whole, goes_on=goes_on)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return 0  # Not every file system can.
    return whole


def write_zeros(descriptor: int, start: int, end: int, *, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Overwrite a part of a file; the disk has the zeros afterwards."""
    for place in range(start, end, len(ZEROS)):
        if not goes_on():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        step = min(len(ZEROS), end - place)
        write_durably(descriptor, [ZEROS[:step]], step, place)


def begin_segment(directory: Path, header: Header) -> int:
    """Turn the spare file (without one: a new, empty file) into the segment of that number; return its descriptor.

    The name is durable before the first byte is written, and the header before the first record.

    Raises:
        OSError: the disk refuses; nothing of the attempt remains.
    """
    path = segment_path(directory, header.number)
    packed = pack_header(header)
    n_page = max(len(packed), min(PAGE_BYTES, header.n_bytes))  # Whole, as in `_fill_past_cache`.
    with suppress(FileNotFoundError):
        (directory / SPARE).rename(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            sync_directory(directory)
            write_durably(descriptor, [packed.ljust(n_page, b"\0")], n_page, 0)
        except OSError:
            os.close(descriptor)
            raise
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return descriptor


def read_header(descriptor: int) -> Header | None:
    return unpack_header(os.pread(descriptor, HEADER_BYTES, 0))


def hand_back(directory: Path, number: int, *, keep: int) -> None:
    """Give a drained segment's space back: as zeros to write on, up to `keep` such files, else to the disk.

    Nothing of what it held stays in a file. The drain does this work, not the process that relays.
    """
    path, used = segment_path(directory, number), directory / f"{USED}{number:012d}"
    with suppress(FileNotFoundError):
        with opened(path) as descriptor:
            header = read_header(descriptor)
        path.rename(used)  # First: a segment that is half zeros must not look like a damaged one.
        if header is not None and len(list(directory.glob(f"{FREE}*"))) < keep:
            with suppress(OSError):  # A full disk may not take the zeros either.
                fill_with_zeros(used, header.n_bytes)
                used.rename(directory / f"{FREE}{number:012d}")
        used.unlink(missing_ok=True)


def remove_half_used(directory: Path) -> None:
    """What a drain left that ended in `hand_back`."""
    for used in directory.glob(f"{USED}*"):
        used.unlink(missing_ok=True)


def remove_spares(directory: Path) -> None:
    """Give back what a journal that nobody writes kept ready. A writer that starts meanwhile does without."""
    for name in os.listdir(directory):
        if name == SPARE or name.startswith(FREE):
            (directory / name).unlink(missing_ok=True)


class Slots:
    """A small value on disk that outlives a crash in the middle of a write: two slots, written in turn.

    Nothing waits for the disk here, and a full one does no harm once the file exists: after a power cut the value may
    be an older one, or none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = 0

    def read(self) -> bytes:
        """The newest whole value; empty without one."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        found = [unsealed(data[start + 1 : start + 1 + data[start]]) for start in range(0, len(data), SLOT_BYTES)]
        values = [(int.from_bytes(value[:8], "little"), value[8:]) for value in found if value and len(value) > 8]
        self._turn, newest = max(values, default=(0, b""))
        return newest

    def write(self, value: bytes, *, is_durable: bool = False) -> None:
        """Replace it. `read` must have been called once before."""
        self._turn += 1
        slot = sealed(self._turn.to_bytes(8, "little") + value)
        with opened(self._path, os.O_RDWR | os.O_CREAT) as descriptor:
            os.pwrite(descriptor, bytes([len(slot)]) + slot, (self._turn % 2) * SLOT_BYTES)
            if is_durable:
                os.fdatasync(descriptor)


def reserve_position(directory: Path) -> None:
    """Have the file for the drain's place on disk while there is room."""
    with suppress(OSError), opened(directory / POSITION, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        os.write(descriptor, bytes(2 * SLOT_BYTES))


def read_position(directory: Path) -> Position | None:
    return unpack_position(Slots(directory / POSITION).read())
