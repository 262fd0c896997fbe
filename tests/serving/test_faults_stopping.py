"""SIGTERM while many streams run, under `pawl serve`: every client hears how its stream ended, every record says so."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from feedback.interactions import Status
from pawl.database import open_database
from pawl.schema import interactions
from pawl.settings import DatabaseSettings
from tests.fake_vllm import FakeVLLM
from tests.serving.faulty_engine import drain_the_rest
from tests.serving.gateway_process import process_in
from tests.serving.talk import CHAT, STREAM, events_of
from tests.serving.test_supervisor import is_refused
from tests.serving.waiting import eventually

N_WORKERS = 2
N_SHORT, N_LONG = 15, 15


class Reader(threading.Thread):
    """A client of one stream, to its end."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.events: list[bytes] = []
        self.start()

    def run(self) -> None:
        self.events = events_of(httpx2.post(self._url + CHAT, json=STREAM, timeout=120).content)


def recorded(directory: Path) -> list[tuple[str, bool]]:
    """Status and completeness of every record."""
    database = open_database(DatabaseSettings(url=f"sqlite:///{directory}/shared.db"))
    try:
        drain_the_rest(directory / "state" / "spool", database)
        with database.read() as connection:
            columns = sa.select(interactions.c.status, interactions.c.is_complete)
            return sorted((row.status, row.is_complete) for row in connection.execute(columns))
    finally:
        database.close()


@pytest.mark.parametrize(("fast_lane", "n_signals"), [(True, 1), (False, 2)])
def test_streams_that_run_end_well_or_are_told(
    tmp_path: Path, engine: FakeVLLM, engine_url: str, fast_lane: bool, n_signals: int
) -> None:
    """Short ones end within the grace period; long ones are cut off when it is over, or at the second signal."""
    grace_s = 10.0 if n_signals == 1 else 120.0
    process = process_in(tmp_path, engine_url, workers=N_WORKERS, fast_lane=fast_lane, drain_grace_s=grace_s)
    try:
        process.start()
        eventually(lambda: len(process.ready_workers()) == N_WORKERS, within_s=60)
        engine.behaviour.gap_s, engine.behaviour.text, engine.behaviour.n_chunks = 0.2, "x" * 2_000, 2_000
        long = [Reader(process.url) for _ in range(N_LONG)]
        eventually(lambda: engine.n_running == N_LONG, within_s=30)
        engine.behaviour.n_chunks = 6
        short = [Reader(process.url) for _ in range(N_SHORT)]
        eventually(lambda: len(engine.seen) == N_LONG + N_SHORT, within_s=30)
        process.terminate()
        eventually(lambda: is_refused(process.url))
        for reader in short:
            reader.join(60)
        if n_signals == 2:
            process.terminate()
        assert process.wait(60) == 0
        for reader in long:
            reader.join(30)
    finally:
        process.close()
    assert [reader.events[-1] for reader in short] == [b"[DONE]"] * N_SHORT
    for reader in long:
        assert b"[DONE]" not in reader.events
        assert b'"code":"shutting_down"' in reader.events[-1]
    eventually(lambda: engine.n_running == 0)
    assert recorded(tmp_path) == [(Status.OK, True)] * N_SHORT + [(Status.SHUTDOWN, False)] * N_LONG
