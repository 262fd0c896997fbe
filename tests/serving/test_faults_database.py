"""The shared database goes away under load: known keys go on, unknown ones are not called wrong, nothing is lost."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from pawl.api_keys import ID_BYTES, SECRET_BYTES, key_text, make_key
from pawl.database import open_database
from pawl.settings import DatabaseSettings, Settings
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of
from tests.servers import PostgreSQL
from tests.serving.faulty_engine import stored_ids
from tests.serving.gateway_process import GatewayProcess
from tests.serving.keyed import add_key, bearer
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.waiting import eventually

POOL_SIZE = 3
N_WORKERS = 2
N_PROCESSES = N_WORKERS + 1
"""The workers and the drain."""
AWAY_S = 3.0
N_CLIENTS = 6


class Client(threading.Thread):
    """Asks again and again with a good key; notes what it was answered."""

    def __init__(self, url: str, key: str, is_over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._http = httpx2.Client(base_url=url, timeout=60, headers=bearer(key))
        self._is_over = is_over
        self.statuses: Counter[int] = Counter()
        self.answered: list[str] = []
        self.start()

    def run(self) -> None:
        with self._http:
            while not self._is_over.is_set():
                whole = self._http.post(CHAT, json=QUESTION)
                self.statuses[whole.status_code] += 1
                if whole.status_code == 200:
                    self.answered.append(whole.json()["id"])
                streamed = self._http.post(CHAT, json=STREAM)
                is_done = streamed.content.endswith(b"data: [DONE]\n\n")
                self.statuses[streamed.status_code if is_done else 0] += 1


@pytest.fixture
def shared(own_postgresql: PostgreSQL, tmp_path: Path, engine_url: str) -> Iterator[tuple[GatewayProcess, str, str]]:
    """A gateway on a PostgreSQL that may be stopped, a good key, and the database's address."""
    url = own_postgresql.create_database("outage")
    configuration = configuration_of(tmp_path, engine_url, workers=N_WORKERS, limits={"store": "database"})
    configuration |= {
        "database": {"url": url, "connect_timeout_s": 1.0, "pool_size": POOL_SIZE},
        "auth": {"required": True, "key_cache_s": 1.0},
    }
    key = add_key(Settings.model_validate(configuration), "infer")
    process = GatewayProcess(tmp_path, configuration)
    try:
        process.start()
        eventually(lambda: len(process.ready_workers()) == N_WORKERS, within_s=60)
        yield process, key, url
    finally:
        process.close()


def stranger() -> dict[str, str]:
    """The header of a key that looks right and that nobody made."""
    return bearer(key_text(make_key(os.urandom(ID_BYTES), os.urandom(SECRET_BYTES))))


def status_of_a_stranger(process: GatewayProcess) -> int:
    """What such a key is answered; a reading of the keys that takes too long is answered as an outage."""
    return httpx2.post(process.url + CHAT, json=QUESTION, headers=stranger(), timeout=30).status_code


def n_connections(url: str) -> int:
    """Connections of the gateway that the database counts."""
    database = open_database(DatabaseSettings(url=url))
    try:
        with database.read() as connection:
            mine = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'outage' AND pid <> pg_backend_pid()"
            return int(connection.execute(sa.text(mine)).scalar_one())
    finally:
        database.close()


def test_an_outage_under_load(
    shared: tuple[GatewayProcess, str, str], own_postgresql: PostgreSQL, engine: FakeVLLM, tmp_path: Path
) -> None:
    process, key, url = shared
    engine.behaviour.gap_s = 0.005
    is_over = threading.Event()
    clients = [Client(process.url, key, is_over) for _ in range(N_CLIENTS)]
    try:
        eventually(lambda: all(client.answered for client in clients), within_s=30)
        before = n_connections(url)
        eventually(lambda: status_of_a_stranger(process) == 401)
        own_postgresql.stop()
        until = time.monotonic() + AWAY_S
        unknown: set[int] = set()
        n_at_stop = sum(len(client.answered) for client in clients)
        while time.monotonic() < until:
            unknown.add(status_of_a_stranger(process))
            assert httpx2.get(f"{process.url}/health/live", timeout=30).status_code == 200
            assert httpx2.get(f"{process.url}/health/ready", timeout=30).status_code == 200
        assert sum(len(client.answered) for client in clients) > n_at_stop
        own_postgresql.start()
        n_at_start = sum(len(client.answered) for client in clients)
        eventually(lambda: sum(len(client.answered) for client in clients) > n_at_start + 20, within_s=60)
        after = n_connections(url)
    finally:
        is_over.set()
        for client in clients:
            client.join(60)
    assert unknown == {503}
    statuses = sum((client.statuses for client in clients), Counter[int]())
    assert set(statuses) == {200}, statuses
    assert max(before, after) <= N_PROCESSES * POOL_SIZE
    answered = [completion_id for client in clients for completion_id in client.answered]
    eventually(lambda: set(answered) <= set(stored_ids(url)), within_s=60)
    eventually(lambda: n_connections(url) <= N_PROCESSES * POOL_SIZE)
    process.terminate()
    assert process.wait(60) == 0
    kept = stored_ids(url, tmp_path / "state" / "spool")
    assert len(kept) == len(set(kept)) == sum(statuses.values())
