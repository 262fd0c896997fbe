"""Files of zeros, and writes that end where a page does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from feedback import journal_line, segment_files
from feedback.segment_files import PAGE_BYTES, fill_with_zeros
from tests.feedback.journals import SEGMENT_BYTES, keep, names_in, open_journal
from tests.serving.waiting import eventually

SIZES = (0, 1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES + 5, 1024**2 + 7)


@pytest.mark.parametrize("n_bytes", SIZES)
def test_a_file_is_zeros_to_its_end_whatever_was_in_it(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2 * PAGE_BYTES)
    fill_with_zeros(path, n_bytes)
    assert path.read_bytes() == bytes(n_bytes)


def test_a_file_system_without_direct_writes_gets_the_zeros_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open
    refused: list[Any] = []

    def refuse(path: Any, flags: int, *rest: int) -> int:
        if segment_files.DIRECT and flags & segment_files.DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    fill_with_zeros(tmp_path / "file", 3 * PAGE_BYTES)
    assert refused == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == bytes(3 * PAGE_BYTES)


def test_a_disk_that_is_full_is_not_taken_for_one_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        fill_with_zeros(tmp_path / "file", PAGE_BYTES)


async def test_groups_are_written_to_the_end_of_a_page_but_not_of_the_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the disk would have to be read for the rest of the page: the zeros in the file are in no cache."""
    journal = open_journal(tmp_path / "j", segment_bytes=SEGMENT_BYTES - 100)
    eventually(lambda: (tmp_path / "j" / "spare").exists())
    ends: list[int] = []
    really_write = os.pwritev

    def write(descriptor: int, parts: Sequence[bytes], offset: int, flags: int) -> int:
        n_bytes = really_write(descriptor, parts, offset, flags)
        if threading.current_thread().name == "journal-writer":  # Not of the thread that makes the next file ready.
            ends.append(offset + n_bytes)
        return n_bytes

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", write)
        for number in range(3):
            assert await keep(journal, b"%d" % number, b"q" * 3000, b"r" * 2000)
    journal.close()
    assert ends == [PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES, SEGMENT_BYTES - 100]
    assert names_in(tmp_path / "j") == [b"0", b"1", b"2"]


async def test_what_the_disk_has_leaves_the_page_cache_in_whole_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page that is not full yet stays: the next group begins in it."""
    dropped: list[tuple[int, int]] = []

    def advise(_: int, start: int, n_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, n_bytes))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    journal = open_journal(tmp_path / "j")
    for number, n_bytes in enumerate((100, 5000, 100, 9000)):
        assert await keep(journal, b"%d" % number, bytes(n_bytes))
    journal.close()
    assert dropped == [(0, PAGE_BYTES), (PAGE_BYTES, 2 * PAGE_BYTES)]


async def test_a_thread_gets_the_core_with_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits there until the disk is asked sees it asked."""
    asked = threading.Event()
    given: list[bool] = []
    really_write = os.pwritev

    def write(descriptor: int, parts: Sequence[bytes], offset: int, flags: int) -> int:
        if threading.current_thread().name == "journal-writer":
            asked.set()
        return really_write(descriptor, parts, offset, flags)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(journal_line, "yield_core", lambda: given.append(asked.wait(5.0)))
    journal = open_journal(tmp_path / "j")
    assert await keep(journal, b"0")
    journal.close()
    assert given == [True]
