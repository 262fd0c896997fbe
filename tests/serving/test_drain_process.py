"""The drain of a machine's journals: what it counts, and how it lives and ends as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feedback.segment_files import segment_path
from feedback.segments import HEADER_BYTES
from monitoring.board import Board
from monitoring.metrics import REGISTRY
from pawl.database import Database
from pawl.schema import interactions
from pawl.settings import Settings
from serving.drain_process import NICEST, drain_of
from serving.supervisor import DRAIN, Spawner
from tests.feedback.test_drain import count
from tests.feedback.test_journal_drain import drained, fill, interaction_record, stored_numbers
from tests.serving.waiting import eventually

SOMEWHERE = HEADER_BYTES + 60
"""In the first record."""


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_damaged_records_and_dead_letters_are_counted(tmp_path: Path, database: Database) -> None:
    spool = tmp_path / "spool"
    await fill(spool / "gateway-1", *(interaction_record(n) for n in range(3)), (b"[1]", b"", b""))
    path = segment_path(spool / "gateway-1", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:SOMEWHERE] + b"\xaa" + whole[SOMEWHERE + 1 :])
    names = ("pawl_records_damaged_total", "pawl_dead_letters_total")
    before = [counted(name) for name in names]
    tokens = counted("pawl_tokens_total", direction="input")
    drained(drain_of(Settings(state_dir=tmp_path), database))
    assert sorted(stored_numbers(database)) == [1, 2]
    assert [counted(name) - was for name, was in zip(names, before, strict=True)] == [1, 1]
    assert counted("pawl_tokens_total", direction="input") > tokens


@pytest.fixture
def environment(tmp_path: Path, database_url: str) -> dict[str, str]:
    """Of a process whose state is in `state`."""
    return {**os.environ, "PAWL_DATABASE__URL": database_url, "PAWL_STATE_DIR": str(tmp_path / "state")}


async def test_the_process(tmp_path: Path, database: Database, environment: dict[str, str]) -> None:
    """Drains what is there and what comes, makes way for others, and stops when it is told."""
    spool = tmp_path / "state" / "spool"

    async def until_stored(n: int) -> None:
        await asyncio.to_thread(eventually, lambda: count(database, interactions) == n, within_s=60)

    await fill(spool / "gateway-1", *(interaction_record(n) for n in range(50)))
    process = (await Spawner([], Board.create(), environment).start(DRAIN)).process
    try:
        await until_stored(50)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICEST
        assert os.sched_getscheduler(process.pid) in (os.SCHED_BATCH, os.SCHED_IDLE)
        await fill(spool / "gateway-2", *(interaction_record(n) for n in range(50, 60)))
        await until_stored(60)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


PARENT = """
import asyncio, os
from monitoring.board import Board
from serving.supervisor import DRAIN, Spawner

async def main():
    child = await Spawner([], Board.create(), os.environ).start(DRAIN)
    print(child.process.pid, flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def test_the_process_ends_with_its_parent(tmp_path: Path, database: Database, environment: dict[str, str]) -> None:
    asyncio.run(fill(tmp_path / "state" / "spool" / "j", interaction_record(1)))
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        eventually(lambda: count(database, interactions) == 1, within_s=60)
        parent.kill()
    eventually(lambda: not _is_running(child), within_s=60)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
