"""The journals' drain: everything arrives once, from the living and the dead, however often it is interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback.interactions import Interaction
from feedback.journal_drain import BATCH, JournalDrain
from feedback.journal_reader import JournalReader
from feedback.recording import exchange_to_json
from feedback.segment_files import segment_numbers, segment_path
from pawl.database import Database
from pawl.schema import dead_letters, interactions
from tests.feedback.journals import SEGMENT_BYTES, keep, open_journal
from tests.feedback.test_drain import count
from tests.feedback.test_recording import exchange, request_of, whole
from tests.serving.waiting import eventually

WAIT_S = 30.0
Record = tuple[bytes, bytes, bytes]


def interaction_record(number: int, **changes: Any) -> Record:
    name = f"{number:048x}"
    meta = exchange_to_json(exchange(id=name, completion_id=f"chatcmpl-{name}", **changes))
    return meta, request_of(f"question {number}"), whole("answer")


async def fill(directory: Path, *records: Record) -> None:
    """By a writer that ends afterwards."""
    journal = open_journal(directory)
    assert all(await asyncio.gather(*(keep(journal, *record) for record in records)))
    journal.close()


class Tally:
    """What a drain reported."""

    def __init__(self) -> None:
        self.stored: list[Interaction] = []
        self.n_dead = 0
        self.n_damaged = 0

    def drain(self, spool: Path, database: Database, **changes: Any) -> JournalDrain:
        told = {"on_stored": self.stored.extend, "on_dead_letters": self._bury, "on_damage": self._miss}
        return JournalDrain(spool, database, clock=time.time, **(told | changes))

    def _bury(self, n: int) -> None:
        self.n_dead += n

    def _miss(self, n: int) -> None:
        self.n_damaged += n


def drained(drain: JournalDrain) -> int:
    """Everything there is, in as many batches as it takes."""
    total = 0
    while moved := drain.drain_once():
        total += moved
    drain.stop(WAIT_S)
    return total


def stored_numbers(database: Database) -> list[int]:
    with database.read() as connection:
        return [int(name, 16) for name in connection.execute(sa.select(interactions.c.id)).scalars()]


async def test_all_journals_are_drained_and_the_dead_ones_removed(tmp_path: Path, database: Database) -> None:
    await fill(tmp_path / "gateway-1", *(interaction_record(n) for n in range(BATCH + 5)))
    await fill(tmp_path / "gateway-2", *(interaction_record(n) for n in range(1000, 1010)))
    living = open_journal(tmp_path / "gateway-3")
    assert await keep(living, *interaction_record(2000))
    (tmp_path / "gateway-1.db").touch()
    tally = Tally()
    assert drained(tally.drain(tmp_path, database)) == BATCH + 5 + 10 + 1
    assert sorted(stored_numbers(database)) == [*range(BATCH + 5), *range(1000, 1010), 2000]
    assert len(tally.stored) == BATCH + 16
    assert segment_numbers(tmp_path / "gateway-1") == segment_numbers(tmp_path / "gateway-2") == []
    assert living.size() == (0, None)
    assert await keep(living, *interaction_record(2001))
    assert drained(tally.drain(tmp_path, database)) == 1
    living.close()


async def test_a_crash_between_the_database_and_the_place_doubles_nothing(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path / "j", *(interaction_record(n) for n in range(300)))
    drain = Tally().drain(tmp_path, database)
    with monkeypatch.context() as crash:
        crash.setattr(JournalReader, "commit", _crash)
        with pytest.raises(KeyboardInterrupt):
            drain.drain_once()
    n_before = count(database, interactions)
    assert n_before > 0
    drain._let_go()
    assert drained(Tally().drain(tmp_path, database)) == 300
    assert sorted(stored_numbers(database)) == list(range(300))


def _crash(_: JournalReader) -> None:
    raise KeyboardInterrupt


POISON: dict[str, Record] = {
    "meta that is no JSON": (b"\xff{", b"secret\x00", b"x"),
    "meta that is no object": (b"[1]", b"secret", b"x"),
    "meta of another version": (b'{"new": 1}', b"secret", b"x"),
    "a text in place of a number": interaction_record(99, latency_ms={"a": 1}),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=list(POISON))
async def test_a_poisoned_record_is_put_aside_and_the_others_are_stored(
    tmp_path: Path, database: Database, poison: Record
) -> None:
    healthy = [interaction_record(n) for n in range(99)]
    await fill(tmp_path / "j", *healthy[:50], poison, *healthy[50:])
    tally = Tally()
    assert drained(tally.drain(tmp_path, database)) == 100
    assert sorted(stored_numbers(database)) == list(range(99))
    assert (tally.n_dead, len(tally.stored)) == (1, 99)
    with database.read() as connection:
        buried = connection.execute(sa.select(dead_letters)).one()
    assert (buried.kind, bool(buried.reason)) == ("interaction", True)
    assert poison[0].decode("utf-8", "backslashreplace")[:4] in buried.payload


async def test_a_dead_letter_is_named_by_its_interaction_and_kept_once(tmp_path: Path, database: Database) -> None:
    poison = interaction_record(7, latency_ms={"a": 1})
    for name in ("j", "other"):  # The same record twice, as after a crash.
        await fill(tmp_path / name, poison)
    assert drained(Tally().drain(tmp_path, database)) == 2
    with database.read() as connection:
        assert connection.execute(sa.select(dead_letters.c.id)).scalars().all() == [f"interact-{7:048x}"]


async def test_damage_costs_what_it_hits_and_is_counted(tmp_path: Path, database: Database) -> None:
    await fill(tmp_path / "j", *(interaction_record(n) for n in range(100)))
    path = segment_path(tmp_path / "j", 1)
    content = bytearray(path.read_bytes())
    content[content.index(b"question 3")] ^= 1
    path.write_bytes(content)
    tally = Tally()
    assert drained(tally.drain(tmp_path, database)) == 99
    assert sorted(stored_numbers(database)) == [n for n in range(100) if n != 3]
    assert tally.n_damaged == 1


@contextmanager
def running(drain: JournalDrain) -> Iterator[JournalDrain]:
    drain.start()
    try:
        yield drain
    finally:
        drain.stop(WAIT_S)


async def test_a_database_that_goes_and_comes_back(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.drain.LONGEST_PAUSE_S", 0.3)
    journal = open_journal(tmp_path / "j")
    with running(Tally().drain(tmp_path, database)) as drain:
        with monkeypatch.context() as outage:
            outage.setattr(Database, "write", _is_down)
            for number in range(5):
                assert await keep(journal, *interaction_record(number))
            drain.wake()
            eventually(lambda: not drain.is_database_up)
            assert journal.size().rows == 5
        eventually(lambda: count(database, interactions) == 5)
        eventually(lambda: journal.size().rows == 0)
        eventually(lambda: drain.is_database_up)
    journal.close()


def _is_down(_: Database) -> Any:
    raise sa.exc.OperationalError("connect", {}, Exception("connection refused"))


async def test_stopping_brings_everything_over(tmp_path: Path, database: Database) -> None:
    await fill(tmp_path / "j", *(interaction_record(n) for n in range(3 * BATCH)))
    drain = Tally().drain(tmp_path, database)
    drain.start()
    drain.stop(WAIT_S)
    assert count(database, interactions) == 3 * BATCH


async def test_records_pass_through_the_hook(tmp_path: Path, database: Database) -> None:
    await fill(tmp_path / "j", *(interaction_record(n, user_id=f"user {n % 3}") for n in range(9)))
    tally = Tally()

    def prepare(interaction: Interaction) -> Interaction:
        return replace(interaction, user_id="someone")

    drained(tally.drain(tmp_path, database, prepare=prepare))
    with database.read() as connection:
        rows = connection.execute(sa.select(interactions.c.user_id)).scalars()
        assert list(rows) == ["someone"] * 9
    assert len(tally.stored) == 9


async def test_of_two_drains_one_works(tmp_path: Path, database: Database) -> None:
    await fill(tmp_path / "j", *(interaction_record(n) for n in range(BATCH + 9)))
    first, second = (Tally().drain(tmp_path, database) for _ in range(2))
    assert first.drain_once() > 0
    assert second.drain_once() == 0
    first.stop(WAIT_S)
    assert drained(second) > 0
    assert count(database, interactions) == BATCH + 9


async def test_a_journal_that_cannot_be_read_does_not_hold_up_the_others(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        await fill(tmp_path / name, interaction_record(ord(name)))
    really_take = JournalReader.take

    def take(reader: JournalReader, limit: int) -> Sequence[Any]:
        if reader.directory.name == "a":
            raise OSError(5, "Input/output error")
        return really_take(reader, limit)

    monkeypatch.setattr(JournalReader, "take", take)
    assert drained(Tally().drain(tmp_path, database)) == 1
    assert stored_numbers(database) == [ord("b")]


async def test_a_place_that_cannot_be_written_does_not_stop_the_drain(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is what the drain makes room on."""
    await fill(tmp_path / "j", *(interaction_record(n) for n in range(200)))
    n_segments = len(segment_numbers(tmp_path / "j"))
    drain = Tally().drain(tmp_path, database)
    monkeypatch.setattr("feedback.segment_files.Slots.write", _no_space)
    assert drained(drain) == 200
    assert n_segments > 3
    assert segment_numbers(tmp_path / "j") == []


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


async def test_memory_is_bounded_by_bytes_too(tmp_path: Path) -> None:
    await fill(tmp_path / "j", *((b"meta", b"x" * SEGMENT_BYTES * 20, b"answer") for _ in range(9)))
    taken = []
    reader = JournalReader(tmp_path / "j")
    while frames := reader.take(BATCH):
        taken.append(len(frames))
    assert sum(taken) == 9
    assert max(taken) <= 3
