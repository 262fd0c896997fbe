"""Disks that fail or fill up: nothing is acknowledged that is not kept, and it is over without a restart."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import structlog

from feedback.journal_reader import JournalReader
from feedback.segment_files import segment_numbers
from tests.feedback.journals import SEGMENT_BYTES, keep, keep_all, names, names_in, open_journal
from tests.serving.waiting import eventually

DISK_BYTES = 512 * 1024


@pytest.fixture(autouse=True)
def _quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.segment_writer.PROBE_S", 0.02)
    monkeypatch.setattr("feedback.segment_writer.HOUSEKEEPING_S", 0.02)


class Disk:
    """What the system's call for a durable write answers."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.is_short = False
        self.n_refused = 0
        self.written_to: list[int] = []
        self._write = os.pwritev

    def pwritev(self, descriptor: int, parts: Sequence[bytes], offset: int, flags: int) -> int:
        inode = os.fstat(descriptor).st_ino
        if self.error is not None:
            self.n_refused += 1
            self._write(descriptor, parts, offset)  # A flush that fails comes after a write that did not.
            raise OSError(self.error, os.strerror(self.error))
        self.written_to.append(inode)
        n_bytes = self._write(descriptor, parts, offset, flags)
        return n_bytes // 2 if self.is_short else n_bytes


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "pwritev", disk.pwritev)
    return disk


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
async def test_a_flush_that_fails_acknowledges_nothing_and_is_not_tried_again(
    tmp_path: Path, disk: Disk, code: int
) -> None:
    journal = open_journal(tmp_path / "j")
    assert all(await keep_all(journal, names(0, 5)))
    eventually(lambda: (tmp_path / "j" / "spare").exists())
    given_up = (tmp_path / "j" / f"{segment_numbers(tmp_path / 'j')[-1]:012d}.segment").stat().st_ino
    with structlog.testing.capture_logs() as logs:
        disk.error = code
        assert await keep_all(journal, names(5, 15)) == [False] * 10
        assert not journal.is_healthy
        n_refused = disk.n_refused
        assert await keep_all(journal, names(15, 500)) == [False] * 485
        eventually(lambda: disk.n_refused > n_refused), "it is tried again"
        assert not journal.is_healthy
        disk.error = None
        disk.written_to.clear()
        await asyncio.to_thread(eventually, lambda: journal.is_healthy is True)
        assert all(await keep_all(journal, names(500, 510)))
    assert given_up not in disk.written_to
    assert [log["event"] for log in logs] == ["journal_unwritable", "journal_writable_again"]
    journal.close()
    kept = names_in(tmp_path / "j")
    assert [name for name in kept if name not in names(5, 15)] == names(0, 5) + names(500, 510)


async def test_a_write_that_is_cut_short_is_not_acknowledged(tmp_path: Path, disk: Disk) -> None:
    journal = open_journal(tmp_path / "j")
    assert await keep(journal, b"before")
    disk.is_short = True
    assert not await keep(journal, b"lost", b"x" * 1000)
    disk.is_short = False
    await asyncio.to_thread(eventually, lambda: journal.is_healthy is True)
    assert await keep(journal, b"after")
    journal.close()
    assert [name for name in names_in(tmp_path / "j") if name != b"lost"] == [b"before", b"after"]


async def test_records_the_disk_refused_are_not_missed(tmp_path: Path, disk: Disk) -> None:
    losses: list[int] = []
    journal = open_journal(tmp_path / "j")
    for _ in range(3):
        assert await keep(journal, b"kept")
        disk.is_short = True
        await keep_all(journal, names(0, 7))
        disk.is_short = False
        await asyncio.to_thread(eventually, lambda: journal.is_healthy is True)
    assert await keep(journal, b"kept")
    reader = JournalReader(tmp_path / "j", on_damage=losses.append)
    while reader.take(100):
        reader.commit()
    reader.commit()
    assert losses == []
    journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount file systems")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


async def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """Filled by somebody else, too: what was acknowledged is there, and draining makes room again."""
    journal = open_journal(small_disk / "j", segment_bytes=64 * 1024)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(128 * 1024))
    kept: list[bytes] = []
    while journal.is_healthy or not journal.is_full:
        if await keep(journal, name := b"%d" % len(kept), b"x" * 900):
            kept.append(name)
    assert len(kept) > 100
    assert not any(await keep_all(journal, names(0, 10)))
    reader = JournalReader(small_disk / "j")
    drained: list[bytes] = []
    while frames := reader.take(50):
        drained += [frame.meta for frame in frames]
        reader.commit()
    ballast.unlink()
    await asyncio.to_thread(eventually, lambda: journal.is_healthy is True and not journal.is_full)
    assert await keep(journal, b"after")
    journal.close()
    drained += names_in(small_disk / "j")
    assert [name for name in drained if name in kept] == kept
    assert drained[-1] == b"after"


PROGRAM = """
import asyncio, pathlib, sys
from feedback import journal, segment_writer
segment_writer.HOUSEKEEPING_S = 0.02
async def main():
    one = journal.Journal(pathlib.Path(sys.argv[1]), max_bytes=1 << 24, segment_bytes=1 << 14)
    one.bind(asyncio.get_running_loop())
    for number in range(400):
        done = asyncio.get_running_loop().create_future()
        one.append(b"%d" % number, b"q" * 100, b"r" * 100, done.set_result)
        print(number, await done, flush=True)
        if not one.is_healthy:
            return
asyncio.run(main())
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
@pytest.mark.parametrize(
    "call", ["pwritev2:error=EIO:when=90", "pwritev2:error=ENOSPC:when=130", "pwritev2:retval=7:when=90"]
)
def test_an_error_from_the_system_itself(tmp_path: Path, call: str) -> None:
    directory = tmp_path / "j"
    strace = ["strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=pwritev2", "-e", f"inject={call}"]
    command = [*strace, sys.executable, "-c", PROGRAM, str(directory)]
    ended = subprocess.run(command, capture_output=True, timeout=120, check=False)
    if b"(INJECTED)" not in (tmp_path / "trace").read_bytes():
        pytest.skip("this machine lets nobody trace processes")
    answers = [words for line in ended.stdout.decode().splitlines() if len(words := line.split()) == 2]
    assert answers[-1][1] == "False"
    acknowledged = [number.encode() for number, ok in answers if ok == "True"]
    assert len(acknowledged) == len(answers) - 1
    assert len(acknowledged) > 5
    assert [name for name in names_in(directory) if name in set(acknowledged)] == acknowledged


async def test_a_spare_that_cannot_be_made_is_no_trouble_while_there_is_room(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", segment_bytes=4 * SEGMENT_BYTES)
    assert await keep(journal, b"first")
    for path in (tmp_path / "j").glob("spare*"):
        path.unlink()
    assert await keep(journal, b"second")
    assert journal.is_healthy
    assert not journal.is_full
    await asyncio.sleep(0)
    journal.close()


async def test_closing_does_not_wait_for_ever_for_a_file_to_be_made_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = threading.Event()
    monkeypatch.setattr("feedback.segment_writer.make_spare", lambda *_, **__: answers.wait(60))
    monkeypatch.setattr("feedback.segment_writer.CLOSE_S", 0.05)
    journal = open_journal(tmp_path / "j")
    assert await keep(journal, b"kept")
    journal.close()
    assert "journal_spare_hangs" in capsys.readouterr().err
    assert names_in(tmp_path / "j") == [b"kept"]
    answers.set()
