"""What drains do about their files when somebody is erased: wipe what the database has, lose nothing else, say so."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from feedback.drain import Drain
from feedback.erasure_run import Eraser
from feedback.journal_reader import JournalReader
from feedback.segment_files import SLOT_BYTES, segment_path
from feedback.spool import Spool
from feedback.tombstone_store import Place, open_watch, places
from feedback.tombstones import Subject
from pawl.cli.erasing import drain_whole
from pawl.database import Database
from pawl.schema import interactions
from tests.feedback.journals import keep, names_in, open_journal
from tests.feedback.people import SECRET, eraser
from tests.feedback.test_drain import count, feedback_record, fill
from tests.feedback.test_journal_drain import Tally, interaction_record

ANN = Subject("ann")


def erase_ann(database: Database, directory: Path) -> Eraser:
    at_work = eraser(database, directory, clock=time.time)
    at_work.erase(at_work.bury(at_work.tombstone(ANN, "")), ANN)
    return at_work


def confirmed(database: Database) -> list[int]:
    return [place.number for place in places(database)]


async def test_the_segment_being_written_is_wiped_and_goes_on(tmp_path: Path, database: Database) -> None:
    spool = tmp_path / "spool"
    watch = open_watch(database, tmp_path / "state", SECRET, spool, clock=time.time)
    journal = open_journal(spool / "j")
    tally = Tally()
    drain = tally.drain(spool, database, erasures=watch)
    for number in range(5):
        assert await keep(journal, *interaction_record(number, user_id="ann"))
    while drain.drain_once():
        pass
    assert confirmed(database) == [0]
    erase_ann(database, tmp_path)
    assert await keep(journal, *interaction_record(5, user_id="bob"))
    segment = segment_path(spool / "j", 1)
    assert b"question 3" in segment.read_bytes()
    watch.book._looked_at = 0.0  # As if two seconds had passed.
    while drain.drain_once():
        pass
    assert confirmed(database) == [1]
    assert b"question" not in segment.read_bytes()
    assert await keep(journal, *interaction_record(6, user_id="bob"))
    drain.stop(30.0)
    assert len(names_in(spool / "j")) == 1
    again = tally.drain(spool, database)
    assert again.drain_once() == 1
    again.stop(30.0)
    journal.close()
    assert (count(database, interactions), tally.n_damaged, tally.n_dead) == (7, 0, 0)


async def test_what_comes_while_an_erasure_becomes_known_is_wiped_before_that_is_confirmed(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a pass's look at the journals and its look at the tombstones comes a record, and its owner is erased."""
    spool = tmp_path / "spool"
    watch = open_watch(database, tmp_path / "state", SECRET, spool, clock=time.time)
    journal, loop = open_journal(spool / "j"), asyncio.get_running_loop()
    drain = Tally().drain(spool, database, erasures=watch)
    look = watch.book.look

    def look_late() -> None:
        monkeypatch.undo()
        record = interaction_record(1, user_id="ann", created_at=time.time())
        assert asyncio.run_coroutine_threadsafe(keep(journal, *record), loop).result(30)
        erase_ann(database, tmp_path)
        look()

    monkeypatch.setattr(watch.book, "look", look_late)
    assert await asyncio.to_thread(drain.drain_once) == 0
    segment = segment_path(spool / "j", 1)
    assert b"question 1" in segment.read_bytes()
    assert confirmed(database) == [0]
    while confirmed(database) == [0]:
        await asyncio.to_thread(drain.drain_once)
    assert b"question" not in segment.read_bytes()
    drain.stop(30.0)
    journal.close()


async def test_a_record_of_somebody_erased_that_comes_late_is_wiped_too(tmp_path: Path, database: Database) -> None:
    """The request was still running when its owner was erased."""
    spool = tmp_path / "spool"
    watch = open_watch(database, tmp_path / "state", SECRET, spool, clock=time.time)
    journal = open_journal(spool / "j")
    drain = Tally().drain(spool, database, erasures=watch)
    begun_at = time.time()
    erase_ann(database, tmp_path)
    drain_whole(drain)
    assert confirmed(database) == [1]
    assert await keep(journal, *interaction_record(2, user_id="ann", created_at=begun_at))
    segment = segment_path(spool / "j", 1)
    assert b"question 2" in segment.read_bytes()
    drain_whole(drain)
    assert b"question" not in segment.read_bytes()
    assert confirmed(database) == [1]
    drain.stop(30.0)
    journal.close()


async def test_what_is_not_drained_yet_is_not_wiped(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    for number in range(4):
        assert await keep(journal, f"record {number}".encode(), b"question", b"answer")
    damage: list[int] = []
    reader = JournalReader(tmp_path / "j", on_damage=damage.append)
    assert [frame.meta for frame in reader.take(2)] == [b"record 0", b"record 1"]
    assert not reader.is_past(0.0)
    reader.commit()
    assert reader.is_past(0.0)
    assert not reader.is_past(time.time() + 60)
    reader.wipe()
    content = segment_path(tmp_path / "j", 1).read_bytes()
    assert [f"record {number}".encode() in content for number in range(4)] == [False, False, True, True]
    assert names_in(tmp_path / "j") == [b"record 2", b"record 3"]
    assert [frame.meta for frame in reader.take(9)] == [b"record 2", b"record 3"]
    reader.commit()
    assert reader.take(9) == []
    assert reader.is_past(time.time() + 60)
    journal.close()
    assert damage == []


async def test_a_place_that_is_torn_afterwards_still_leads_behind_the_zeros(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    for number in range(4):
        assert await keep(journal, f"record {number}".encode())
    reader = JournalReader(tmp_path / "j")
    assert len(reader.take(3)) == 3
    reader.commit()
    reader.wipe()
    position = tmp_path / "j" / "position"
    content = position.read_bytes()
    for slot in range(2):
        torn = bytearray(content)
        torn[slot * SLOT_BYTES + 9] ^= 1
        position.write_bytes(torn)
        assert names_in(tmp_path / "j") == [b"record 3"]
    journal.close()


def test_a_spool_confirms_when_what_is_older_has_left_it(tmp_path: Path, database: Database) -> None:
    spool = Spool(tmp_path / "spool.db")
    watch = open_watch(database, tmp_path / "state", SECRET, spool.path, clock=time.time)
    drain = Drain(spool, database, clock=time.time, erasures=watch)
    fill(spool, feedback_record(1))
    erase_ann(database, tmp_path)
    assert drain.drain_once() == 1
    assert confirmed(database) == [0]
    assert drain.drain_once() == 0
    assert confirmed(database) == [1]
    spool.close()


def test_a_place_says_now_and_then_that_it_is_there(tmp_path: Path, database: Database) -> None:
    now = 1000.0
    watch = open_watch(database, tmp_path / "state", SECRET, tmp_path / "spool", clock=lambda: now)
    for now in (1000.0, 1010.0, 1070.0):
        watch.run(lambda _: True)
        (place,) = places(database)
        assert place == Place(place.name, 0, 1070.0 if now == 1070.0 else 1000.0)
