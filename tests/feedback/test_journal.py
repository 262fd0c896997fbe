"""The journal's writer: durable before it answers, in order, bounded, and one process per directory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from feedback import segment_files
from feedback.errors import SpoolUnavailable
from feedback.journal_reader import JournalReader
from feedback.segment_files import segment_numbers
from feedback.segment_writer import SegmentWriter
from feedback.segments import FRAME_BYTES
from tests.feedback.journals import SEGMENT_BYTES, keep, keep_all, names, names_in, open_journal, unbound_journal
from tests.serving.waiting import eventually


async def test_what_is_acknowledged_can_be_read(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", clock=lambda: 12.5)
    assert await keep(journal, b"meta", b"\x00request", b"response\xff")
    (frame,) = JournalReader(tmp_path / "j").take(10)
    assert frame == (1, 12.5, b"meta", b"\x00request", b"response\xff")
    journal.close()


async def test_done_is_never_called_before_the_bytes_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every durable write is held back until it is let go: nothing is acknowledged meanwhile, and all of it after."""
    journal = open_journal(tmp_path / "j")
    assert await keep(journal, b"opens the segment")
    may_go = threading.Event()
    on_disk: list[bytes] = []
    really_write = os.pwritev

    def slow(descriptor: int, parts: Sequence[bytes], offset: int, flags: int) -> int:
        assert flags == os.RWF_DSYNC
        assert may_go.wait(10)
        n_bytes = really_write(descriptor, parts, offset, flags)
        on_disk.extend(map(bytes, parts))
        return n_bytes

    async def keep_and_look(name: bytes) -> bool:
        return await keep(journal, name) and any(name in part for part in on_disk)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", slow)
        answers = [asyncio.ensure_future(keep_and_look(name)) for name in names(0, 20)]
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not any(answer.done() for answer in answers)
        may_go.set()
        assert all(await asyncio.gather(*answers))
    journal.close()


async def test_a_system_without_a_write_that_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the flush is a call of its own, and nothing is acknowledged before it returned."""
    events = []
    really_flush = os.fsync

    def flush(descriptor: int) -> None:
        really_flush(descriptor)
        events.append("flush")

    with monkeypatch.context() as patch:
        patch.setattr(segment_files, "WRITE_FLAGS", 0)
        patch.setattr(os, "fsync", flush)
        journal = open_journal(tmp_path / "j")
        await keep(journal, b"opens the segment")
        eventually(lambda: (tmp_path / "j" / "spare").exists())
        events.clear()
        assert await keep(journal, b"record")
        events.append("done")
        journal.close()
    assert events[:2] == ["flush", "done"]


async def test_thousands_at_once_keep_their_order(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", segment_bytes=256 * 1024)
    order: list[bytes] = []
    wanted = names(0, 5000)

    async def client(name: bytes, turn: int) -> None:
        for _ in range(turn):
            await asyncio.sleep(0)
        started.append(name)
        if await keep(journal, name):
            order.append(name)

    started: list[bytes] = []
    await asyncio.gather(*(client(name, position % 17) for position, name in enumerate(wanted)))
    journal.close()
    assert sorted(order) == sorted(wanted)
    assert order == started
    assert names_in(tmp_path / "j") == started


async def test_what_comes_in_one_turn_of_the_loop_shares_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path / "j")
    await keep(journal, b"opens the segment")
    eventually(lambda: (tmp_path / "j" / "spare").exists())
    writes = []
    really_write = os.pwritev

    def write(descriptor: int, parts: Sequence[bytes], offset: int, flags: int) -> int:
        writes.append(len(parts))
        return really_write(descriptor, parts, offset, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", write)
        assert all(await keep_all(journal, names(0, 10)))
    assert len(writes) == 1
    journal.close()


@pytest.mark.parametrize(("body", "n_wanted"), [(b"", 12), (b"a" * 300, 8)])
async def test_a_group_that_follows_a_large_one_grows_to_half_of_what_is_under_way_and_further_if_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, n_wanted: int
) -> None:
    monkeypatch.setattr("feedback.journal.HOLD_S", 60.0)
    monkeypatch.setattr("feedback.journal.SMALL_BYTES", 2_000)
    journal = unbound_journal(tmp_path / "j")
    journal.bind(asyncio.get_running_loop(), lambda: 16)
    assert all(await keep_all(journal, names(0, 6)))
    held = [asyncio.ensure_future(keep(journal, name, body)) for name in names(6, 6 + n_wanted - 1)]
    await asyncio.sleep(0.05)
    assert not any(answer.done() for answer in held)
    async with asyncio.timeout(10):
        assert await keep(journal, b"the last one", body)
    assert all(await asyncio.gather(*held))
    journal.close()


async def test_of_a_crowd_even_records_that_come_one_by_one_share_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.journal.CROWD_HOLD_S", 60.0)
    n_under_way = 99
    journal = unbound_journal(tmp_path / "j")
    journal.bind(asyncio.get_running_loop(), lambda: n_under_way)
    assert await keep(journal, b"of few")
    assert await keep(journal, b"of few again")
    n_under_way = 100
    assert await keep(journal, b"of a crowd")
    held = [asyncio.ensure_future(keep(journal, name)) for name in names(3, 77)]
    await asyncio.sleep(0.05)
    assert not any(answer.done() for answer in held)
    async with asyncio.timeout(10):
        assert await keep(journal, b"three quarters of them")
    assert all(await asyncio.gather(*held))
    journal.close()


@pytest.mark.parametrize("n_before", [1, 6])
async def test_a_group_that_does_not_grow_is_not_held_for_long(tmp_path: Path, n_before: int) -> None:
    journal = unbound_journal(tmp_path / "j")
    journal.bind(asyncio.get_running_loop(), lambda: 1000)
    assert all(await keep_all(journal, names(0, n_before)))
    async with asyncio.timeout(10):
        assert await keep(journal, b"alone")
    journal.close()


async def test_closing_does_not_wait_for_a_group_to_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.journal.HOLD_S", 60.0)
    monkeypatch.setattr("feedback.journal.SMALL_BYTES", 2_000)
    journal = unbound_journal(tmp_path / "j")
    journal.bind(asyncio.get_running_loop(), lambda: 16)
    assert all(await keep_all(journal, names(0, 6)))
    held = asyncio.ensure_future(keep(journal, b"held"))
    await asyncio.sleep(0)
    journal.close()
    assert await held
    assert names_in(tmp_path / "j")[-1] == b"held"


async def test_it_says_once_per_group_that_everybody_was_told(tmp_path: Path) -> None:
    journal, told = unbound_journal(tmp_path / "j"), list[bool]()
    calls = asyncio.Queue[tuple[int, int]]()
    journal.bind(asyncio.get_running_loop(), after_group=lambda: calls.put_nowait((threading.get_ident(), len(told))))
    for name in names(0, 10):
        journal.append(name, b"", b"", told.append)
    assert await calls.get() == (threading.get_ident(), 10)
    await asyncio.sleep(0)
    assert calls.empty()
    assert told == [True] * 10
    journal.close()


async def test_a_callback_that_fails_keeps_nobody_waiting(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    journal.append(b"broken", b"", b"", lambda _: 1 / 0)  # type: ignore[arg-type]
    assert await keep(journal, b"whole")
    journal.close()


async def test_closing_keeps_what_waits_and_refuses_what_comes_later(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    answers: list[bool] = []
    for name in names(0, 1200):
        journal.append(name, b"", b"", answers.append)
    journal.close()
    journal.close()
    assert names_in(tmp_path / "j") == names(0, 1200)
    assert not await keep(journal, b"late")
    assert answers == [True] * 1200


async def test_closing_on_another_thread(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    answers: list[bool] = []
    for name in names(0, 700):
        journal.append(name, b"", b"", answers.append)
    await asyncio.to_thread(journal.close)
    await asyncio.sleep(0)
    assert answers == [True] * 700
    assert names_in(tmp_path / "j") == names(0, 700)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_ended_before_anybody_listened_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.journal.RESTART_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(SegmentWriter, "pause_s", "not a number")  # It fails after it has said that it is well.
        journal = unbound_journal(tmp_path / "j")
        assert journal._line is not None
        assert await asyncio.to_thread(journal._line.carrier.join, 10.0)
    journal.bind(asyncio.get_running_loop())
    async with asyncio.timeout(10):
        assert not await keep(journal, b"nobody writes it")
    await asyncio.to_thread(eventually, lambda: journal.is_healthy is True)
    assert await keep(journal, b"written")
    journal.close()
    assert names_in(tmp_path / "j") == [b"written"]


async def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    for start in (0, 50, 100):
        journal = open_journal(tmp_path / "j")
        assert all(await keep_all(journal, names(start, start + 50)))
        assert journal.size().rows == start + 50
        journal.close()
    frames = JournalReader(tmp_path / "j").take(500)
    assert [frame.seq for frame in frames] == list(range(1, 51))
    assert names_in(tmp_path / "j") == names(0, 150)


async def test_a_start_without_records_leaves_no_segment(tmp_path: Path) -> None:
    for _ in range(3):
        open_journal(tmp_path / "j").close()
    assert segment_numbers(tmp_path / "j") == []


async def test_what_waits_and_since_when(tmp_path: Path) -> None:
    times = iter(range(1000))
    journal = open_journal(tmp_path / "j", clock=lambda: float(next(times)))
    assert journal.size() == (0, None)
    await keep_all(journal, names(0, 300))
    assert journal.size() == (300, 0.0)
    reader = JournalReader(tmp_path / "j")
    taken = reader.take(120)
    assert journal.size() == (300, 0.0), "taken is not drained"
    reader.commit()
    first_waiting = JournalReader(tmp_path / "j").take(1)[0]
    assert journal.size() == (300 - len(taken), first_waiting.at)
    everything_taken = len(taken)
    while frames := reader.take(500):
        everything_taken += len(frames)
        reader.commit()
    assert everything_taken == 300
    assert journal.size() == (0, None)
    journal.close()
    again = open_journal(tmp_path / "j")
    assert again.size() == (0, None)
    again.close()


async def test_a_record_larger_than_a_segment(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    huge = b"x" * (5 * SEGMENT_BYTES)
    assert await keep(journal, b"before")
    assert await keep(journal, b"huge", huge, huge)
    assert await keep(journal, b"after")
    assert names_in(tmp_path / "j") == [b"before", b"huge", b"after"]
    journal.close()


async def test_too_much_waiting_for_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path / "j", segment_bytes=4 * 1024**2)
    await keep(journal, b"opens the segment")
    monkeypatch.setattr("feedback.journal.MAX_WAITING_BYTES", 1000)
    kept = await keep_all(journal, names(0, 20), size=100)
    n_kept = sum(kept)
    assert kept == [True] * n_kept + [False] * (20 - n_kept)
    assert 0 < n_kept <= 1000 // (200 + FRAME_BYTES) + 1
    assert all(await keep_all(journal, names(0, 2)))
    journal.close()


async def test_a_full_journal_refuses_and_takes_again_when_it_was_drained(tmp_path: Path) -> None:
    """New work is turned away before records are: `is_full` comes while there is still room for what runs."""
    journal = open_journal(tmp_path / "j", max_bytes=5 * SEGMENT_BYTES)
    was_full_before_refusing = False
    n_kept = 0
    while await keep(journal, b"record", b"x" * 500):
        n_kept += 1
        was_full_before_refusing = was_full_before_refusing or journal.is_full
    assert was_full_before_refusing
    assert journal.is_full
    assert journal.is_healthy
    assert n_kept > 3 * SEGMENT_BYTES / 600
    assert sum(path.stat().st_size for path in (tmp_path / "j").iterdir()) <= 5 * SEGMENT_BYTES + 200
    reader = JournalReader(tmp_path / "j")
    n_drained = 0
    while frames := reader.take(500):
        n_drained += len(frames)
        reader.commit()
    assert n_drained == n_kept
    await asyncio.to_thread(eventually, lambda: not journal.is_full)
    assert await keep(journal, b"record")
    journal.close()


async def test_drained_segments_come_back_as_zeros(tmp_path: Path) -> None:
    """And nothing of what they held is found in any file that is left, but for the segment being written."""
    directory = tmp_path / "j"
    journal = open_journal(directory)
    reader = JournalReader(directory)
    for turn in range(8):
        wanted = [f"turn {turn} of {number}".encode() for number in range(60)]
        assert all(await keep_all(journal, wanted, size=200))
        taken = []
        while frames := reader.take(500):
            taken += [frame.meta for frame in frames]
            reader.commit()
        assert taken == wanted
    journal.close()
    current = segment_numbers(directory)
    assert len(current) == 1
    others = [path.read_bytes() for path in directory.iterdir() if not path.name.endswith(".segment")]
    assert not any(b"turn" in content for content in others)
    assert sum(1 for path in directory.glob("free-*")) <= 2
    assert (directory / "spare").read_bytes() == bytes(SEGMENT_BYTES)


async def test_an_old_segment_is_closed_even_if_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.segment_writer.HOUSEKEEPING_S", 0.02)
    now = 0.0
    journal = open_journal(tmp_path / "j", clock=lambda: now)
    assert await keep(journal, b"secret")
    now = 7 * 3600.0
    eventually(lambda: len(segment_numbers(tmp_path / "j")) == 2)
    reader = JournalReader(tmp_path / "j")
    assert [frame.meta for frame in reader.take(10)] == [b"secret"]
    reader.commit()
    assert reader.take(10) == []
    reader.commit()
    journal.close()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "j").iterdir())


def test_two_processes_cannot_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = unbound_journal(tmp_path / "j")
    monkeypatch.setattr("feedback.journal.LOCK_PATIENCE_S", 0.0)
    with pytest.raises(SpoolUnavailable, match="in use"):
        unbound_journal(tmp_path / "j")
    program = (
        "import pathlib, sys\n"
        "from feedback import journal\n"
        "journal.LOCK_PATIENCE_S = 0\n"
        "journal.Journal(pathlib.Path(sys.argv[1]), max_bytes=1 << 20, segment_bytes=1 << 14)\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "j")], capture_output=True, timeout=240, check=False
    )
    assert b"SpoolUnavailable" in other.stderr
    journal.close()
    unbound_journal(tmp_path / "j").close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolUnavailable):
        unbound_journal(tmp_path / "file" / "j")
