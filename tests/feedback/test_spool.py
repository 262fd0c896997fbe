"""The spool: durable before it answers, one bad caller never harms another, a full disk is survived."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from feedback.errors import SpoolUnavailable
from feedback.spool import MAX_TAKEN_BYTES, Connection, Spool, SpoolRecord, insert

WAIT_S = 5.0


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db")
    yield spool
    spool.close()


def record(name: str, *, subject: str | None = None, size: int = 10) -> SpoolRecord:
    return SpoolRecord(0, "interaction", name, subject or name, 1.0, b"{}", b"x" * size, None)


def test_what_is_acknowledged_is_in_the_file(spool: Spool) -> None:
    spool.append(record("a")).result(WAIT_S)
    reader = sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True)
    assert reader.execute("SELECT id FROM records").fetchall() == [("a",)]
    reader.close()


def test_it_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    program = (
        "import os, sys, pathlib\n"
        "from feedback.spool import Spool, SpoolRecord\n"
        "spool = Spool(pathlib.Path(sys.argv[1]))\n"
        "for name in 'abc':\n"
        "    spool.append(SpoolRecord(0, 'feedback', name, name, 1.0, b'{}', None, None)).result()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=30)
    spool = Spool(path)
    assert [row.id for row in spool.oldest(10).result(WAIT_S)] == ["a", "b", "c"]
    spool.close()


def test_order_and_discarding(spool: Spool) -> None:
    for name in "abc":
        spool.append(record(name)).result(WAIT_S)
    first, second = spool.oldest(2).result(WAIT_S)
    assert (first.id, second.id) == ("a", "b")
    spool.discard([first.seq, second.seq]).result(WAIT_S)
    assert spool.size().result(WAIT_S) == (1, 1.0)
    spool.append(record("d")).result(WAIT_S)
    assert [row.id for row in spool.oldest(9).result(WAIT_S)] == ["c", "d"]


def test_the_same_record_twice_is_one(spool: Spool) -> None:
    wait([spool.append(record("a")) for _ in range(5)], WAIT_S)
    assert spool.size().result(WAIT_S).rows == 1


def test_many_threads(spool: Spool) -> None:
    def append(thread: int) -> None:
        wait([spool.append(record(f"{thread}/{number}")) for number in range(100)], WAIT_S)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spool.size().result(WAIT_S).rows == 800


def test_an_operation_that_fails_leaves_its_neighbours_alone(spool: Spool) -> None:
    def fail(connection: Connection) -> None:
        insert(connection, record("half"))
        raise ValueError("of its own")

    hold = threading.Event()
    spool.submit(lambda _: hold.wait(WAIT_S))
    before, failing, after = spool.append(record("a")), spool.submit(fail), spool.append(record("b"))
    hold.set()
    before.result(WAIT_S)
    after.result(WAIT_S)
    with pytest.raises(ValueError, match="of its own"):
        failing.result(WAIT_S)
    assert {row.id for row in spool.oldest(9).result(WAIT_S)} == {"a", "b"}
    assert spool.is_healthy


def test_a_caller_that_leaves_undoes_nothing(spool: Spool) -> None:
    hold = threading.Event()
    spool.submit(lambda _: hold.wait(WAIT_S))
    left = spool.append(record("a"))
    assert not left.cancel()
    hold.set()
    left.result(WAIT_S)
    assert spool.size().result(WAIT_S).rows == 1


def test_a_full_disk_refuses_and_recovers(spool: Spool) -> None:
    """SQLite's own page limit behaves as a full disk does: SQLITE_FULL on the write that does not fit."""
    spool.append(record("a")).result(WAIT_S)

    def fill(connection: Connection) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    spool.submit(fill).result(WAIT_S)
    hold = threading.Event()
    spool.submit(lambda _: hold.wait(WAIT_S))
    too_large, in_its_group = spool.append(record("big", size=100_000)), spool.append(record("small"))
    hold.set()
    for future in (too_large, in_its_group):
        with pytest.raises(SpoolUnavailable):
            future.result(WAIT_S)
    assert not spool.is_healthy
    assert spool.size().result(WAIT_S).rows == 1
    assert not spool.is_healthy, "reading proves nothing about the disk"
    spool.probe().result(WAIT_S)  # The limit went with the connection: the disk has room again.
    assert spool.is_healthy
    spool.append(record("big", size=100_000)).result(WAIT_S)


def test_a_disk_that_stays_full(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.append(record("a")).result(WAIT_S)
    monkeypatch.setattr("feedback.spool._open", _refuse)
    spool.submit(_fail_like_a_disk).exception(WAIT_S)
    for _ in range(3):
        with pytest.raises(SpoolUnavailable):
            spool.probe().result(WAIT_S)
    monkeypatch.undo()
    spool.probe().result(WAIT_S)
    assert spool.is_healthy
    assert spool.size().result(WAIT_S).rows == 1


def _refuse(_: Path) -> sqlite3.Connection:
    raise SpoolUnavailable("no space left on the device")


def _fail_like_a_disk(_: Connection) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def test_too_much_waiting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.spool.MAX_WAITING", 2)
    spool = Spool(tmp_path / "spool.db")
    hold, running = threading.Event(), threading.Event()

    def block(_: Connection) -> None:
        running.set()
        hold.wait(WAIT_S)

    spool.submit(block)
    running.wait(WAIT_S)
    waiting = [spool.append(record(str(number))) for number in range(2)]
    with pytest.raises(SpoolUnavailable):
        spool.append(record("one too many")).result(WAIT_S)
    hold.set()
    wait(waiting, WAIT_S)
    assert spool.size().result(WAIT_S).rows == 2
    spool.close()


def test_a_backlog_of_large_records_is_taken_in_parts(spool: Spool) -> None:
    third = MAX_TAKEN_BYTES // 3
    for name, size in [("a", third), ("b", third), ("c", third), ("huge", 2 * MAX_TAKEN_BYTES), ("d", 1)]:
        spool.append(record(name, size=size)).result(WAIT_S)
    taken = []
    while rows := spool.oldest(10).result(WAIT_S):
        taken.append([row.id for row in rows])
        spool.discard([row.seq for row in rows]).result(WAIT_S)
    assert taken == [["a", "b"], ["c"], ["huge"], ["d"]]


def test_what_a_dead_process_left_is_taken_over_once(tmp_path: Path) -> None:
    left = Spool(tmp_path / "left.db")
    for name in "abc":
        left.append(record(name)).result(WAIT_S)
    left.keep("routes", b"1").result(WAIT_S)
    left.close()
    spool = Spool(tmp_path / "spool.db")
    spool.append(record("b")).result(WAIT_S)  # As after a crash in the middle of an earlier attempt.
    spool.close()
    for _ in range(2):
        spool = Spool(tmp_path / "spool.db", orphans=[tmp_path / "left.db"])
        assert [row.id for row in spool.oldest(10).result(WAIT_S)] == ["b", "a", "c"]
        spool.append(record("b")).result(WAIT_S)
        spool.close()
    left = Spool(tmp_path / "left.db")
    assert left.size().result(WAIT_S).rows == 0
    assert left.kept("routes").result(WAIT_S) == b"1"
    left.close()


def test_a_spool_in_use_and_one_that_is_no_spool_are_left_alone(spool: Spool, tmp_path: Path) -> None:
    spool.append(record("a")).result(WAIT_S)
    odd = tmp_path / "odd.db"
    odd.write_bytes(b"no database" * 1000)
    other = Spool(tmp_path / "other.db", orphans=[spool.path, odd])
    other.append(record("b")).result(WAIT_S)
    assert [row.id for row in other.oldest(10).result(WAIT_S)] == ["b"]
    assert [row.id for row in spool.oldest(10).result(WAIT_S)] == ["a"]
    assert odd.read_bytes() == b"no database" * 1000
    other.close()


def test_one_process_per_file(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.spool.LOCK_PATIENCE_S", 0.0)
    with pytest.raises(SpoolUnavailable, match="in use"):
        Spool(spool.path)


def test_closing_commits_what_waits_and_refuses_what_comes_later(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    waiting = [spool.append(record(str(number))) for number in range(50)]
    spool.close()
    spool.close()
    assert all(future.done() and future.exception() is None for future in waiting)
    with pytest.raises(SpoolUnavailable):
        spool.append(record("late")).result(WAIT_S)
    again = Spool(tmp_path / "spool.db")
    assert again.size().result(WAIT_S).rows == 50
    again.close()


def test_closing_does_not_wait_for_ever_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.spool.CLOSE_S", 0.05)
    spool = Spool(tmp_path / "spool.db")
    begun, answers = threading.Event(), threading.Event()

    def hang(_: Connection) -> None:
        begun.set()
        answers.wait(60)

    hanging = spool.submit(hang)
    assert begun.wait(WAIT_S)
    waiting = spool.append(record("a"))
    with capture_logs() as said:
        spool.close()
        spool.close()
    # Gateways of other tests may run in this process, and say something too.
    assert [bool(line["advice"]) for line in said if line["event"] == "spool_hangs"] == [True]
    with pytest.raises(SpoolUnavailable):
        waiting.result(WAIT_S)
    answers.set()  # The disk is back: what had begun is done, and the file is let go.
    hanging.result(WAIT_S)
    spool._thread.join(60)
    again = Spool(tmp_path / "spool.db")
    assert again.size().result(WAIT_S).rows == 0
    again.close()


def test_closing_leaves_no_log_though_somebody_else_reads(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    words = b"what somebody wrote " * 500
    say(spool, words)
    reader = sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True)
    assert reader.execute("SELECT count(*) FROM records").fetchone() == (1,)
    spool.discard([row.seq for row in spool.oldest(9).result(WAIT_S)]).result(WAIT_S)
    spool.close()
    assert not any(words[:20] in file.read_bytes() for file in tmp_path.iterdir())
    reader.close()


def test_small_values_are_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    assert spool.kept("routes").result(WAIT_S) is None
    spool.keep("routes", b"\x00 1")
    spool.close()
    spool = Spool(tmp_path / "spool.db")
    assert spool.kept("routes").result(WAIT_S) == b"\x00 1"
    spool.close()


def say(spool: Spool, words: bytes) -> None:
    spool.append(SpoolRecord(0, "feedback", "a", "s", 1.0, words, None, None)).result(WAIT_S)


def test_nothing_of_what_was_discarded_stays_in_the_files(spool: Spool) -> None:
    words = b"what somebody wrote " * 500
    say(spool, words)
    files = [spool.path, spool.path.with_name(spool.path.name + "-wal")]
    assert any(words[:40] in file.read_bytes() for file in files)
    spool.discard([row.seq for row in spool.oldest(9).result(WAIT_S)]).result(WAIT_S)
    spool.tidy().result(WAIT_S)
    spool.size().result(WAIT_S)  # The log is cut after the commit that tidying came with, before the next one.
    assert not any(words[:20] in file.read_bytes() for file in spool.path.parent.iterdir())
    spool.append(record("b")).result(WAIT_S)
    assert [row.id for row in spool.oldest(9).result(WAIT_S)] == ["b"]


def repeated(spool: Spool) -> list[tuple[str, str]]:
    return spool.submit(lambda c: c.execute("SELECT owner, key FROM repeats ORDER BY key").fetchall()).result(WAIT_S)


def remember(spool: Spool, key: str) -> None:
    row = ("o", key, "sha", 201, 1.0, 2.0)
    spool.submit(lambda c: c.execute("INSERT INTO repeats VALUES (?, ?, ?, ?, ?, ?)", row).rowcount).result(WAIT_S)


def test_answers_to_repeated_calls_are_taken_over_too(tmp_path: Path) -> None:
    left = Spool(tmp_path / "left.db")
    remember(left, "k1")
    left.close()
    spool = Spool(tmp_path / "spool.db", orphans=[tmp_path / "left.db"])
    remember(spool, "k2")
    assert repeated(spool) == [("o", "k1"), ("o", "k2")]
    spool.close()
    left = Spool(tmp_path / "left.db")
    assert repeated(left) == []
    left.close()


def test_the_file_of_an_earlier_version_is_used_and_taken_over(tmp_path: Path) -> None:
    for name in ("own.db", "left.db"):
        old = sqlite3.connect(tmp_path / name)
        old.executescript(
            "CREATE TABLE records (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL,"
            " subject TEXT NOT NULL, at REAL NOT NULL, meta BLOB NOT NULL, request BLOB, response BLOB);"
            "CREATE INDEX records_by_subject ON records (kind, subject);"
            "CREATE TABLE answers (principal TEXT, key TEXT, body BLOB);"
            f"INSERT INTO records (kind, id, subject, at, meta) VALUES ('feedback', '{name}', 's', 1.0, x'7b7d')"
        )
        old.close()
    spool = Spool(tmp_path / "own.db", orphans=[tmp_path / "left.db"])
    assert [row.id for row in spool.oldest(9).result(WAIT_S)] == ["own.db", "left.db"]
    remember(spool, "k")
    spool.close()
