"""SIGTERM: what can finish finishes, what cannot is told so and recorded, and the process ends in time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from feedback.interactions import Status
from feedback.store import get_interaction
from pawl.database import open_database
from pawl.settings import DatabaseSettings, Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import serving
from tests.serving.faulty_engine import drain_the_rest
from tests.serving.gateway_process import GatewayProcess, process_in
from tests.serving.talk import CHAT, QUESTION, STREAM, events_of
from tests.serving.waiting import eventually

GRACE_S = 5.0


@pytest.fixture
def process(tmp_path: Path, engine_url: str) -> Iterator[GatewayProcess]:
    gateway = process_in(tmp_path, engine_url, drain_grace_s=GRACE_S)
    gateway.start()
    yield gateway
    gateway.close()


class Stream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.events: list[bytes] = []
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        self.events = events_of(httpx2.post(self._url + CHAT, json=STREAM, timeout=20).content)
        self.seconds = time.monotonic() - started


def test_streams_end_in_order(process: GatewayProcess, engine: FakeVLLM, tmp_path: Path) -> None:
    engine.behaviour.gap_s, engine.behaviour.text, engine.behaviour.n_chunks = 0.1, "x" * 4_000, 4_000
    slow = Stream(process.url)
    eventually(lambda: engine.n_running == 1)
    engine.behaviour.n_chunks = 5
    quick = Stream(process.url)
    eventually(lambda: len(engine.seen) == 2)

    stopped_at = time.monotonic()
    process.terminate()
    eventually(lambda: is_refused(process.url))
    assert process.wait(90) == 0
    assert time.monotonic() - stopped_at < GRACE_S + 60, "the stream alone would have taken four hundred seconds"
    slow.join(30)
    quick.join(30)

    assert quick.events[-1] == b"[DONE]"
    assert b"[DONE]" not in slow.events
    assert b'"code":"shutting_down"' in slow.events[-1]
    assert slow.seconds < GRACE_S + 100
    eventually(lambda: engine.n_running == 0)
    assert recorded(tmp_path, engine) == [(Status.SHUTDOWN, False), (Status.OK, True)]


def test_what_still_runs_is_ended_and_its_record_waited_for(
    make_settings: Callable[..., Settings], engine: FakeVLLM
) -> None:
    engine.behaviour.gap_s, engine.behaviour.text, engine.behaviour.n_chunks = 0.1, "x" * 400, 400
    with serving(make_settings(), engine) as served:
        relay, loop = served.gateway.relay, served.gateway.records.journal._loop
        assert loop is not None

        def is_empty_within(timeout_s: float) -> bool:
            return asyncio.run_coroutine_threadsafe(relay.wait_until_empty(timeout_s), loop).result(60)

        reader = Stream(served.url)
        eventually(lambda: engine.n_running == 1)
        assert not is_empty_within(0.01)
        loop.call_soon_threadsafe(relay.cut_off)
        assert is_empty_within(30)
        reader.join(20)
        assert b'"code":"shutting_down"' in reader.events[-1]
        assert served.last_stored().status == Status.SHUTDOWN


def is_refused(url: str) -> bool:
    """Whether the gateway takes no more work."""
    try:
        return httpx2.post(url + CHAT, json=QUESTION, timeout=2).status_code == 503
    except httpx2.HTTPError:
        return True


def recorded(directory: Path, engine: FakeVLLM) -> list[tuple[Status, bool]]:
    """How the requests that the engine saw first and second are kept in the database."""
    database = open_database(DatabaseSettings(url=f"sqlite:///{directory}/shared.db"))
    drain_the_rest(directory / "state" / "spool", database)
    kept = [get_interaction(database, headers["x-request-id"]) for headers in engine.seen_headers[:2]]
    database.close()
    return [(interaction.status, interaction.is_complete) for interaction in kept if interaction]
