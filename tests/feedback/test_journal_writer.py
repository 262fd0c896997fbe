"""The journal's writer as a process of its own: the same promises, and what happens when one side dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import psutil
import pytest

from feedback.errors import SpoolUnavailable
from feedback.journal import Journal
from feedback.journal_line import PIPE_BYTES, Carrier, ProcessCarrier, as_process
from feedback.journal_writer import GROUP, Plan, work
from feedback.segment_files import LOCK, begin_segment, lock, segment_numbers, segment_path
from feedback.segments import CRC_BYTES, FRAME, Header, unpack_header
from tests.feedback.journals import frame_offsets, keep, keep_all, names, names_in, open_journal, overwrite
from tests.serving.waiting import eventually

MIB = 1024 * 1024


def writer_of(journal: Journal) -> int:
    """The process id of a journal's writer."""
    assert journal._line is not None
    assert isinstance(journal._line.carrier, ProcessCarrier)
    return journal._line.carrier.process.pid


async def test_what_a_process_acknowledged_can_be_read(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", start_writer=as_process)
    assert all(await keep_all(journal, names(0, 300)))
    assert journal.size().rows == 300
    assert names_in(tmp_path / "j") == names(0, 300)
    pid = writer_of(journal)
    journal.close()
    assert not psutil.pid_exists(pid)


async def test_groups_larger_than_the_pipe(tmp_path: Path) -> None:
    """They go through piece by piece, in order, while the loop goes on."""
    journal = open_journal(tmp_path / "j", start_writer=as_process, segment_bytes=16 * MIB, max_bytes=128 * MIB)
    large = os.urandom(3 * PIPE_BYTES)
    kept = await asyncio.gather(*(keep(journal, name, large) for name in names(0, 5)), keep(journal, b"small"))
    assert all(kept)
    journal.close()
    assert names_in(tmp_path / "j") == [*names(0, 5), b"small"]


async def test_closing_sends_what_waits_to_the_process(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", start_writer=as_process, segment_bytes=MIB)
    answers: list[bool] = []
    for name in names(0, 1200):
        journal.append(name, b"q" * 3000, b"", answers.append)
    await asyncio.to_thread(journal.close)
    await asyncio.sleep(0)
    assert answers == [True] * 1200
    assert names_in(tmp_path / "j") == names(0, 1200)


async def test_a_writer_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """What was on its way is not acknowledged, and nothing that was is lost."""
    journal = open_journal(tmp_path / "j", start_writer=as_process)
    assert all(await keep_all(journal, names(0, 20)))
    first = writer_of(journal)
    os.kill(first, signal.SIGSTOP)
    unanswered = asyncio.gather(*(keep(journal, name) for name in names(20, 40)))
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    assert await unanswered == [False] * 20
    assert not journal.is_healthy
    assert not await keep(journal, b"while there is none")
    await asyncio.to_thread(eventually, lambda: journal.is_healthy is True, within_s=60)
    assert writer_of(journal) != first
    assert all(await keep_all(journal, names(40, 60)))
    journal.close()
    kept = names_in(tmp_path / "j")
    assert [name for name in kept if name not in names(20, 40)] == names(0, 20) + names(40, 60)


async def test_signals_are_for_the_gateway(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j", start_writer=as_process)
    assert await keep(journal, b"it runs")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(writer_of(journal), number)
    assert await keep(journal, b"it still does")
    journal.close()


PROGRAM = """
import asyncio, pathlib, sys
from feedback.journal import Journal
from feedback.journal_line import as_process
async def main():
    journal = Journal(pathlib.Path(sys.argv[1]), max_bytes=1 << 28, segment_bytes=1 << 16, start_writer=as_process)
    journal.bind(asyncio.get_running_loop())
    done = asyncio.get_running_loop().create_future()
    journal.append(b"kept", b"", b"", done.set_result)
    assert await done
    print(journal._line.carrier.process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_gateway_that_is_killed_leaves_no_writer_and_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "j")], stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        writer = int(gateway.stdout.readline())
        with pytest.raises(SpoolUnavailable):
            lock(tmp_path / "j" / LOCK)
        gateway.kill()
    eventually(lambda: not psutil.pid_exists(writer), within_s=60)
    lock(tmp_path / "j" / LOCK).close()
    assert names_in(tmp_path / "j") == [b"kept"]


async def test_writers_that_cannot_be_started_cost_nothing(tmp_path: Path) -> None:
    """No descriptor is left open by an attempt, and there is another one."""
    attempts: list[int] = []

    def start(plan: Plan, incoming: int, outgoing: int, lock: int) -> Carrier:
        attempts.append(n_descriptors())
        if 1 < len(attempts) < 5:
            os.close(incoming)
            os.close(outgoing)
            raise RuntimeError("can't start new thread")
        return as_process(plan, incoming, outgoing, lock)

    journal = open_journal(tmp_path / "j", start_writer=start)
    assert await keep(journal, b"before")
    n_before = n_descriptors()
    os.kill(writer_of(journal), signal.SIGKILL)
    await asyncio.to_thread(eventually, lambda: len(attempts) > 4 and journal.is_healthy, within_s=60)
    assert await keep(journal, b"after")
    assert n_descriptors() <= n_before
    journal.close()
    assert names_in(tmp_path / "j") == [b"before", b"after"]


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_records_that_were_refused_take_no_later_ones_with_them(tmp_path: Path) -> None:
    """They are on disk, behind the last acknowledged one, and the newest segment says nothing of them."""
    directory = tmp_path / "j"
    journal = open_journal(directory, start_writer=as_process)
    assert all(await keep_all(journal, names(0, 5)))
    journal.close()
    (number,) = segment_numbers(directory)
    header = unpack_header(segment_path(directory, number).read_bytes())
    assert header is not None
    salt = header.salt
    refused = b"".join(frame_of(salt, seq) for seq in (6, 7, 8))
    overwrite(segment_path(directory, number), frame_offsets(segment_path(directory, number))[-1], refused)
    begin_segment(directory, Header(salt, number + 1, 5, MIB, 0.0))
    again = open_journal(directory, start_writer=as_process)
    assert all(await keep_all(again, names(10, 21)))
    again.close()
    kept = names_in(directory)
    assert [name for name in kept if name != b"refused"] == names(0, 5) + names(10, 21)


def frame_of(salt: bytes, seq: int) -> bytes:
    frame = FRAME.pack(salt, seq, 0.0, len(b"refused"), 0, 0) + b"refused"
    return frame + zlib.crc32(frame).to_bytes(CRC_BYTES, "little")


@pytest.mark.parametrize("n_sent", [0, 7, GROUP.size, GROUP.size + 50])
def test_a_group_that_was_not_sent_whole_is_not_written(tmp_path: Path, n_sent: int) -> None:
    directory, salt = tmp_path / "j", b"saltsalt"
    directory.mkdir()
    frame = FRAME.pack(salt, 1, 0.0, 100, 0, 0) + bytes(100 + CRC_BYTES)
    incoming, sending = os.pipe()
    hearing, outgoing = os.pipe()
    os.write(sending, (GROUP.pack(len(frame), 1) + frame)[:n_sent])
    os.close(sending)
    work(Plan(directory, salt, 0, MIB, MIB // 4), incoming, outgoing)
    os.close(hearing)
    assert list(directory.glob("*.segment")) == []


def test_a_plan_survives_the_command_line(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "with a space", b"\x00\xff\n'\"-- ", 2**63, 1 << 40, 1 << 26)
    assert Plan.from_arguments(plan.to_arguments()) == plan
