"""Mining in several processes: what one process gives, its errors told, and nobody left behind."""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bench.mining_history import ALIAS, Size, build_history
from feedback.errors import WorkerLost
from feedback.history import read_history
from feedback.mining import PartTask, mine_alias, mine_part, unpaired_in_part
from feedback.part_work import Work
from feedback.part_workers import AHEAD, Processes
from feedback.partitions import Part, cut
from pawl.database import Database, open_database, upgrade
from pawl.schema import pairs
from pawl.settings import DatabaseSettings
from tests.feedback import part_deeds
from tests.serving.waiting import eventually

SIZE = Size(interactions=1000, signals=200, users=50)
PART_ROWS = 60
N, FEW_PARTS = 2, 3
PATIENCE_S = 120.0
"""For three processes to start on a loaded machine."""


@pytest.fixture
def processes(database_url: str) -> Processes:
    return Processes(DatabaseSettings(url=database_url), N, few_parts=1)


@pytest.fixture
def sqlite_processes(tmp_path: Path) -> Processes:
    return Processes(DatabaseSettings(url=f"sqlite:///{tmp_path}/shared.db"), N, few_parts=FEW_PARTS)


def rows(database: Database) -> list[dict[str, Any]]:
    """The pairs as they are stored."""
    with database.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(pairs).order_by(pairs.c.id)).mappings()]


def parts(n: int) -> list[Part]:
    return [Part([str(number)], []) for number in range(n)]


def test_several_processes_find_what_one_finds(database: Database, processes: Processes) -> None:
    build_history(database, SIZE, 1)
    mined = mine_alias(database, ALIAS, 100.0, part_rows=PART_ROWS)
    alone = rows(database)
    with database.write() as connection:
        connection.execute(pairs.delete())
    assert mine_alias(database, ALIAS, 100.0, part_rows=PART_ROWS, place=processes) == mined
    assert rows(database) == alone
    assert len(alone) == mined.n_added > 0


@pytest.mark.parametrize("stage", ["mined", "unpaired"])
def test_what_goes_to_processes_and_back_arrives_as_it_was(tmp_path: Path, stage: str) -> None:
    with closing(open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/shared.db"))) as database:
        upgrade(database)
        build_history(database, SIZE, 1)
        part = max(cut(read_history(database, ALIAS), PART_ROWS), key=lambda part: len(part.events))
        work: Work[Any, Any] = partial(mine_part, mined_at=100.0, since=1e12) if stage == "mined" else unpaired_in_part
        task = PartTask(part, []) if stage == "mined" else part
        result = work(database, task)
        sent, given = pickle.loads(pickle.dumps((work, task)))
        assert sent(database, given) == pickle.loads(pickle.dumps(result)) == result
    assert result


def test_parts_are_taken_as_they_are_needed_and_errors_come_back(sqlite_processes: Processes) -> None:
    taken = []

    def taking() -> Iterator[Part]:
        for part in parts(20):
            taken.append(part)
            yield part

    results = sqlite_processes.each(part_deeds.tell_process, taking())
    done = [next(results)]
    assert len(taken) <= FEW_PARTS + N + AHEAD + 1
    with pytest.raises(LookupError, match="no 19"):
        done.extend(results)
    assert [name for name, _ in done] == [str(number) for number in range(19)]
    assert os.getpid() not in {process for _, process in done}


def test_few_parts_are_done_here(sqlite_processes: Processes) -> None:
    done = list(sqlite_processes.each(part_deeds.tell_process, parts(2)))
    assert done == [("0", os.getpid()), ("1", os.getpid())]


KEEPING = """
from feedback.part_workers import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1])
keep_freed_memory()
held = [bytearray(b"x" * (1 << 20)) for _ in range(32)]
n_held = resident()
held.clear()
print(n_held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_a_part_frees_is_there_for_the_next() -> None:
    found = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 32 * 256 / 4  # Pages of 4 KB; of the 32 MB all would be handed back.


def test_a_process_that_is_killed_is_an_error(sqlite_processes: Processes) -> None:
    with pytest.raises(WorkerLost):
        list(sqlite_processes.each(part_deeds.be_killed, parts(9)))


def test_processes_do_not_outlive_the_one_that_started_them(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(N)]
    command = [sys.executable, "-m", "tests.feedback.part_deeds", f"sqlite:///{tmp_path}/none.db", *map(str, paths)]
    with subprocess.Popen(command) as parent:
        try:
            eventually(lambda: all(path.exists() and path.read_text() for path in paths), within_s=PATIENCE_S)
        finally:
            parent.kill()
    eventually(lambda: not any(is_alive(int(path.read_text())) for path in paths), within_s=PATIENCE_S)


def is_alive(pid: int) -> bool:
    """Whether it runs; what has ended and waits for init to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
