"""Reading journals back: torn, damaged, recycled and living ones."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.journal_reader import JournalReader
from feedback.segment_files import segment_numbers, segment_path
from feedback.segment_writer import MAX_AGE_S
from feedback.segments import (
    FRAME,
    HEADER_BYTES,
    Header,
    crc_of,
    pack_header,
    scan_frames,
    sealed,
    unpack_header,
    unsealed,
)
from tests.feedback.journals import (
    SEGMENT_BYTES,
    everything_in,
    frame_offsets,
    keep,
    keep_all,
    names,
    names_in,
    open_journal,
    overwrite,
)

SALT = b"salt\x00\xff12"
PARTS = st.tuples(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))


def framed(seq: int, parts: tuple[bytes, bytes, bytes], salt: bytes = SALT) -> bytes:
    frame = FRAME.pack(salt, seq, float(seq), *map(len, parts)) + b"".join(parts)
    return frame + crc_of(frame)


def parts_of(data: bytes, after: int = 0) -> list[tuple[bytes, bytes, bytes]]:
    return [(f.meta, f.request, f.response) for f in scan_frames(data, SALT, after, 1000).frames]


@given(
    records=st.lists(PARTS, max_size=8), rest=st.sampled_from([b"", bytes(100), SALT, framed(1, (b"old", b"", b""))])
)
def test_every_record_comes_back_and_nothing_else(records: list[tuple[bytes, bytes, bytes]], rest: bytes) -> None:
    data = b"".join(framed(seq, record) for seq, record in enumerate(records, start=5))
    assert parts_of(data + rest, after=4) == records


@given(before=st.lists(PARTS, max_size=3), last=PARTS)
def test_a_torn_tail_is_cut_at_every_offset(
    before: list[tuple[bytes, bytes, bytes]], last: tuple[bytes, bytes, bytes]
) -> None:
    """Cut short, or followed by the zeros or the older frames of the file: only whole frames count."""
    whole = b"".join(framed(seq, record) for seq, record in enumerate(before, start=100))
    tail = framed(100 + len(before), last)
    leftover = framed(1, (b"older", b"record", b"here")) * 9
    for cut in range(len(tail)):
        for below in (b"", bytes(len(tail)), leftover[cut : len(tail)]):
            torn = tail[:cut] + below
            if not torn.startswith(tail):  # What was cut off may be zeros itself.
                assert parts_of(whole + torn, after=99) == before


@given(record=PARTS, data=st.data())
def test_a_changed_bit_is_noticed(record: tuple[bytes, bytes, bytes], data: st.DataObject) -> None:
    frame = bytearray(framed(1, record))
    position = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[position // 8] ^= 1 << position % 8
    assert parts_of(bytes(frame) + bytes(50)) == []


@given(st.binary(max_size=200))
def test_seals(content: bytes) -> None:
    assert unsealed(sealed(content)) == (content or None)
    assert unsealed(bytes(len(content))) is None


def test_headers() -> None:
    header = Header(SALT, 7, 3, 1000, 12.5)
    assert unpack_header(pack_header(header) + b"frames") == header
    assert unpack_header(bytes(HEADER_BYTES)) is None
    assert unpack_header(pack_header(header)[:-1]) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a dead writer: 200 records in several segments."""
    directory = tmp_path_factory.mktemp("written") / "j"

    async def write() -> None:
        journal = open_journal(directory)
        for start in range(0, 200, 10):
            assert all(await keep_all(journal, names(start, start + 10)))
        journal.close()

    asyncio.run(write())
    assert len(segment_numbers(directory)) >= 3
    return directory


@pytest.fixture
def journal_copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


async def test_a_writer_goes_on_after_a_torn_tail(journal_copy: Path) -> None:
    last = segment_path(journal_copy, segment_numbers(journal_copy)[-1])
    *_, begin, end = frame_offsets(last)
    overwrite(last, end - 10, bytes(10))
    losses: list[int] = []
    journal = open_journal(journal_copy)
    assert await keep(journal, b"new")
    found = everything_in(reader := JournalReader(journal_copy, on_damage=losses.append))
    assert [frame.meta for frame in found] == [*names(0, 199), b"new"]
    assert [frame.seq for frame in found] == list(range(1, 201))
    reader.commit()
    assert losses == [], "nobody was told that it was kept"
    journal.close()
    assert begin < end


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_in_the_middle_costs_what_it_hits(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = Path(shutil.copytree(written, tmp_path_factory.mktemp("damaged") / "j"))
    numbers = segment_numbers(directory)
    number = data.draw(st.sampled_from(numbers[:-1]))
    offsets = frame_offsets(segment_path(directory, number))
    first_hit = data.draw(st.integers(0, len(offsets) - 2))
    last_hit = data.draw(st.integers(first_hit, min(first_hit + 2, len(offsets) - 2)))
    start = offsets[first_hit] + data.draw(st.integers(0, 30))
    overwrite(segment_path(directory, number), start, b"\xaa" * (offsets[last_hit + 1] - 2 - start))
    losses: list[int] = []
    reader = JournalReader(directory, on_damage=losses.append)
    before = sum(len(frame_offsets(segment_path(written, n))) - 1 for n in numbers if n < number)
    hit = set(names(before + first_hit, before + last_hit + 1))
    assert [frame.meta for frame in everything_in(reader)] == [name for name in names(0, 200) if name not in hit]
    assert losses == []
    reader.commit()
    assert sum(losses) == len(hit)
    shutil.rmtree(directory)


def test_damage_is_told_once_however_often_the_database_fails(journal_copy: Path) -> None:
    path = segment_path(journal_copy, 1)
    overwrite(path, frame_offsets(path)[3] + 60, b"\xaa")
    losses: list[int] = []
    reader = JournalReader(journal_copy, on_damage=losses.append)
    for _ in range(3):
        assert len(everything_in(reader)) == 199
        reader.forget()
    assert losses == []
    everything_in(reader)
    reader.commit()
    reader.commit()
    assert losses == [1]


def test_a_damaged_head_costs_nothing(journal_copy: Path) -> None:
    for number in segment_numbers(journal_copy)[1:]:
        overwrite(segment_path(journal_copy, number), 12, b"\xaa" * 20)
    assert names_in(journal_copy) == names(0, 200)


def test_a_segment_of_which_nothing_is_left(journal_copy: Path) -> None:
    path = segment_path(journal_copy, 2)
    n_lost = len(frame_offsets(path)) - 1
    path.write_bytes(b"\xaa" * SEGMENT_BYTES)
    losses: list[int] = []
    reader = JournalReader(journal_copy, on_damage=losses.append)
    assert len(everything_in(reader)) == 200 - n_lost
    reader.commit()
    assert sum(losses) >= n_lost


def test_a_segment_that_is_gone_is_missed(journal_copy: Path) -> None:
    path = segment_path(journal_copy, 2)
    n_lost = len(frame_offsets(path)) - 1
    path.unlink()
    losses: list[int] = []
    reader = JournalReader(journal_copy, on_damage=losses.append)
    assert len(everything_in(reader)) == 200 - n_lost
    reader.commit()
    assert losses == [n_lost]


async def test_a_recycled_file_gives_no_old_records(journal_copy: Path, tmp_path: Path) -> None:
    """Even if its old bytes were still there, of this writer or of an earlier one, right where the next frame goes."""
    directory = tmp_path / "j"
    now = 0.0
    journal = open_journal(directory, clock=lambda: now)
    assert await keep(journal, b"first")
    own = segment_path(directory, 1).read_bytes()
    foreign = segment_path(journal_copy, 1).read_bytes()
    for turn, leftover in enumerate((own, foreign)):
        target = segment_path(directory, segment_numbers(directory)[-1])
        offset = frame_offsets(target)[-1]
        overwrite(target, offset, leftover[HEADER_BYTES:][: SEGMENT_BYTES - offset])
        now += MAX_AGE_S + 1.0  # The next record begins another segment.
        assert await keep(journal, f"after {turn}".encode())
    journal.close()
    assert names_in(directory) == [b"first", b"after 0", b"after 1"]


async def test_a_living_journal_is_read_up_to_its_end(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j")
    reader = JournalReader(tmp_path / "j")
    assert reader.take(10) == []
    for turn in range(40):
        wanted = names(turn * 7, turn * 7 + 7)
        assert all(await keep_all(journal, wanted))
        assert [frame.meta for frame in everything_in(reader)] == wanted
        assert reader.take(10) == []
        if turn % 3 == 0:
            reader.commit()
    journal.close()


async def test_a_batch_is_read_whole_and_of_the_zeros_behind_it_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those zeros are on the disk alone, and to read them costs what writing past the page cache has saved."""
    journal = open_journal(tmp_path / "j", segment_bytes=2 * 1024**2)
    assert all(await keep_all(journal, names(0, 100), size=3_000))
    assert all(await keep_all(journal, names(100, 110), size=40_000))
    asked: list[int] = []
    really_read = os.pread

    def read(descriptor: int, n_bytes: int, offset: int) -> bytes:
        asked.append(n_bytes)
        return really_read(descriptor, n_bytes, offset)

    reader = JournalReader(tmp_path / "j")
    assert [frame.meta for frame in reader.take(105)] == names(0, 105)
    assert [frame.meta for frame in reader.take(105)] == names(105, 110)
    assert all(await keep_all(journal, [b"one more"]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", read)
        assert [frame.meta for frame in reader.take(105)] == [b"one more"]
    assert sum(asked) < 32 * 1024
    journal.close()


async def test_a_half_written_frame_of_a_living_journal_is_waited_for(tmp_path: Path) -> None:
    directory = tmp_path / "j"
    journal = open_journal(directory)
    assert await keep(journal, b"first")
    path = segment_path(directory, 1)
    end = frame_offsets(path)[-1]
    assert await keep(journal, b"second", b"x" * 500)
    content = path.read_bytes()
    reader = JournalReader(directory)
    for n_bytes in (0, 4, 20, 60, 300):
        overwrite(path, end, content[end : end + n_bytes] + bytes(600))
        reader.forget()
        assert [frame.meta for frame in everything_in(reader)] == [b"first"]
    overwrite(path, end, content[end:])
    assert [frame.meta for frame in everything_in(reader)] == [b"second"]
    journal.close()


async def test_a_place_is_not_taken_for_one_in_another_segment_of_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut that took back a segment's very name after it had been drained."""
    directory = tmp_path / "j"
    journal = open_journal(directory)
    assert await keep(journal, b"a", b"x" * 300)
    journal.close()
    reader = JournalReader(directory)
    assert len(reader.take(1)) == 1
    reader.commit()
    segment_path(directory, 1).unlink()
    monkeypatch.setattr("feedback.segment_writer.read_position", lambda _: None)  # Its numbers begin anew.
    again = open_journal(directory)
    assert all(await keep_all(again, names(0, 9)))
    assert segment_numbers(directory) == [1]
    assert names_in(directory) == names(0, 9)
    again.close()


def test_a_damaged_place_means_from_the_start(journal_copy: Path) -> None:
    reader = JournalReader(journal_copy)
    for _ in range(2):
        reader.take(10)
        reader.commit()
    assert names_in(journal_copy) == names(20, 200)
    content = (journal_copy / "position").read_bytes()
    slots = content[:64], content[64:]
    (journal_copy / "position").write_bytes(bytes(64) + slots[1])
    one_left = names_in(journal_copy)
    (journal_copy / "position").write_bytes(slots[0])
    assert {len(one_left), len(names_in(journal_copy))} == {190, 180}, "the slots are written in turn"
    (journal_copy / "position").write_bytes(bytes(len(content)))
    assert names_in(journal_copy) == names(0, 200)


def test_an_abandoned_journal_leaves_no_segments(journal_copy: Path) -> None:
    reader = JournalReader(journal_copy)
    while reader.take(500):
        reader.commit()
    reader.commit()
    assert {path.name for path in journal_copy.iterdir()} == {"lock", "position"}
