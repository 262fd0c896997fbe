"""What the drain of a machine's journals counts."""

from __future__ import annotations

from pathlib import Path

from feedback.segment_files import segment_path
from feedback.segments import HEADER_BYTES
from monitoring.metrics import REGISTRY
from pawl.database import Database
from pawl.settings import Settings
from serving.drain_process import drain_of
from tests.feedback.test_journal_drain import drained, fill, interaction_record, stored_numbers

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
