"""`pawl serve` with several workers: they share a port, replace each other, and one scrape speaks for all."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from monitoring.board import FIRST_PAGE, Board
from pawl.errors import ConfigurationError
from pawl.settings import DatabaseSettings
from serving import supervisor
from serving.supervisor import Child, Keeper, Role, Spawner, StartFailed, listen
from tests.fake_vllm import Behaviour, FakeVLLM
from tests.gateway_configuration import configuration_of, make_schema
from tests.servers import free_port, running
from tests.serving.gateway_process import GatewayProcess, command_of
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.waiting import eventually

N_WORKERS = 2
ROUTE = "completions"
"""Used by the test that counts, and by no other."""
PROMPT = {"model": "assistant", "prompt": "When do I water roses?"}


@pytest.fixture(scope="module")
def engine() -> FakeVLLM:
    return FakeVLLM("base-model")


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory, engine: FakeVLLM) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("supervised")
    with running(engine.app) as engine_url:
        configuration = configuration_of(directory, engine_url, drain_grace_s=20.0, workers=N_WORKERS)
        make_schema(DatabaseSettings(**configuration["database"]))
        yield configuration


def elsewhere(configuration: dict[str, Any], **serving: Any) -> dict[str, Any]:
    """The configuration of another gateway beside that one."""
    return {**configuration, "serving": {**configuration["serving"], "port": free_port(), **serving}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, configuration: dict[str, Any]) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path_factory.mktemp("process"), configuration)
    gateway.start()
    yield gateway
    gateway.close()


@pytest.fixture
def process(shared: GatewayProcess, engine: FakeVLLM) -> GatewayProcess:
    """A gateway with all its workers, whatever became of the ones before."""
    engine.behaviour = Behaviour()
    eventually(lambda: len(shared.ready_workers()) == N_WORKERS, within_s=60)
    return shared


def ask(url: str, path: str = CHAT, body: Any = QUESTION) -> int:
    """The status of one question on a connection of its own."""
    return httpx2.post(url + path, json=body, timeout=20).status_code


@contextmanager
def stands_still(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile, and goes on afterwards whatever happened."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_every_worker_answers_on_the_one_port(process: GatewayProcess) -> None:
    workers = process.workers()
    assert len(workers) == N_WORKERS
    for stopped in workers:
        with stands_still(stopped):
            assert [ask(process.url) for _ in range(5)] == [200] * 5


def test_a_killed_worker_is_replaced_and_the_others_go_on(process: GatewayProcess) -> None:
    killed, other = process.workers()
    os.kill(killed, signal.SIGKILL)
    assert [ask(process.url) for _ in range(10)] == [200] * 10
    now = eventually(lambda: found if len(found := process.ready_workers()) == N_WORKERS else None, within_s=90)
    assert killed not in now
    assert other in now


class Client(threading.Thread):
    """Asks again and again, on one connection for as long as the server keeps it."""

    def __init__(self, url: str, body: Any, is_over: threading.Event) -> None:
        super().__init__()
        self._url = url
        self._body = body
        self._is_over = is_over
        self.n_answered = 0
        self.failures: list[object] = []
        self.start()

    def run(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=30) as client:
            while not self._is_over.is_set():
                try:
                    response = client.post(CHAT, json=self._body)
                    is_whole = self._body is not STREAM or response.content.endswith(b"data: [DONE]\n\n")
                    if response.status_code != 200 or not is_whole:
                        self.failures.append((response.status_code, response.content[-200:]))
                except httpx2.HTTPError as exc:
                    self.failures.append(exc)
                self.n_answered += 1


def test_a_restart_under_load_fails_no_request(
    process: GatewayProcess, configuration: dict[str, Any], engine: FakeVLLM
) -> None:
    engine.behaviour.gap_s = 0.01
    before = process.workers()
    models = configuration["serving"]["models"]
    process.configure(
        {**configuration, "serving": configuration["serving"] | {"models": models | {"more": models["assistant"]}}}
    )
    is_over = threading.Event()
    clients = [Client(process.url, body, is_over) for body in (QUESTION, STREAM, QUESTION, STREAM)]
    try:
        eventually(lambda: all(client.n_answered for client in clients), within_s=90)
        process.reload()
        eventually(lambda: not any(b"worker_process" in command_of(pid) for pid in before), within_s=90)
        counts = [client.n_answered for client in clients]
        eventually(lambda: all(client.n_answered > count for client, count in zip(clients, counts, strict=True)))
    finally:
        is_over.set()
        for client in clients:
            client.join(30)
    assert [failure for client in clients for failure in client.failures] == []
    served = {model["id"] for model in httpx2.get(f"{process.url}/v1/models", timeout=20).json()["data"]}
    assert served == {"assistant", "more"}
    process.configure(configuration)


def test_a_restart_with_a_configuration_that_is_wrong_changes_nothing(
    process: GatewayProcess, configuration: dict[str, Any]
) -> None:
    before = process.ready_workers()
    process.configure({**configuration, "no_such_section": {}})
    process.reload()
    eventually(lambda: "configuration_refused" in process.log.read_text(), within_s=90)
    assert ask(process.url) == 200
    assert process.ready_workers() == before
    process.configure(configuration)


def counted(process: GatewayProcess) -> dict[str, float]:
    """The sums of one scrape on a fresh connection; of series with a route, those of `ROUTE`."""
    text = httpx2.get(f"{process.url}/metrics", timeout=20).text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("route", ROUTE) == ROUTE:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def test_one_scrape_counts_for_all_workers_and_the_dead(process: GatewayProcess) -> None:
    first, second = process.workers()
    for stopped in (first, second):
        with stands_still(stopped):  # So that each answers some.
            assert [ask(process.url, "/v1/completions", PROMPT) for _ in range(3)] == [200] * 3

    def all_six() -> dict[str, float] | None:
        """A worker shows what it has counted now and then, and a request may be between its counters at that moment."""
        sums = counted(process)
        n_counted = (sums.get("pawl_requests_total"), sums.get("pawl_request_duration_seconds_count"))
        return sums if n_counted == (6, 6) and sums["pawl_requests_in_flight"] == 0 else None

    sums = eventually(all_six, within_s=90)
    assert sums["pawl_build_info"] == 1
    assert sums["pawl_rollout_weight"] == len(httpx2.get(f"{process.url}/v1/models", timeout=20).json()["data"])
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(process.ready_workers()) == N_WORKERS, within_s=90)
    eventually(all_six, within_s=90)


def test_a_second_signal_cuts_off_at_once(tmp_path: Path, configuration: dict[str, Any], engine: FakeVLLM) -> None:
    engine.behaviour = Behaviour(gap_s=0.5, text="x" * 400, n_chunks=400)
    process = GatewayProcess(tmp_path, elsewhere(configuration, drain_grace_s=150.0))
    try:
        process.start()
        reader = Reader(process.url)
        eventually(lambda: engine.n_running == 1)
        process.terminate()
        eventually(lambda: is_refused(process.url))
        process.terminate()
        assert process.wait(60) == 0, "the grace period is longer"
        reader.join(10)
    finally:
        process.close()
    assert b'"code":"shutting_down"' in reader.answer


class Reader(threading.Thread):
    """A client of one stream."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.answer = b""
        self.start()

    def run(self) -> None:
        self.answer = httpx2.post(self._url + CHAT, json=STREAM, timeout=120).content


def is_refused(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx2.get(f"{url}/health/live", timeout=5)
    except httpx2.ConnectError:
        return True
    except httpx2.HTTPError:
        pass
    return False


def test_wrong_configuration_is_said_once(tmp_path: Path, configuration: dict[str, Any]) -> None:
    gateway = GatewayProcess(tmp_path, elsewhere(configuration, models={}))
    gateway.launch()
    assert gateway.wait(60) == 2
    lines = gateway.log.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pawl: serving.models is empty")


def test_a_taken_port_is_one_line(tmp_path: Path, configuration: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway = GatewayProcess(tmp_path, elsewhere(configuration, port=port))
        gateway.launch("--workers", "3")
        assert gateway.wait(60) == 2
    assert gateway.log.read_text() == f"pawl: serving.port {port} is in use by another process\n"


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"serving\.host 192\.0\.2\.1"):
        listen("192.0.2.1", free_port())


def test_a_name_with_several_addresses_is_listened_on_at_all_of_them() -> None:
    port = free_port()
    listeners = listen("localhost", port)
    try:
        for listener in listeners:
            socket.create_connection(listener.getsockname()[:2], timeout=5).close()
    finally:
        for listener in listeners:
            listener.close()


QUICK = Role("quick", "keyword", is_worker=False)
"""Ends at once."""


async def ended(spawner: Spawner, child: Child) -> None:
    """Wait for a child's end."""
    await child.process.wait()
    await child.is_ready
    spawner.release(child)


def test_children_that_start_together_have_pages_of_their_own() -> None:
    async def pages() -> list[int]:
        spawner = Spawner([], Board.create(), os.environ)
        children = await asyncio.gather(*(spawner.start(QUICK) for _ in range(3)))
        await asyncio.gather(*(ended(spawner, child) for child in children))
        return [child.page for child in children]

    assert sorted(asyncio.run(pages())) == [FIRST_PAGE, FIRST_PAGE + 1, FIRST_PAGE + 2]


def test_a_child_that_cannot_be_started_takes_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page() -> int:
        spawner = Spawner([], Board.create(), os.environ)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/program")
            with pytest.raises(FileNotFoundError):
                await spawner.start(QUICK)
        child = await spawner.start(QUICK)
        await ended(spawner, child)
        return child.page

    assert asyncio.run(page()) == FIRST_PAGE


class LateSpawner(Spawner):
    """The system has no room for the first children."""

    n_asked = 0

    async def start(self, role: Role) -> Child:
        self.n_asked += 1
        if self.n_asked < 3:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await super().start(role)


@pytest.fixture
def late(tmp_path: Path) -> LateSpawner:
    """Knows a module whose process never becomes ready."""
    (tmp_path / "hangs.py").write_text("import time\n\ntime.sleep(600)\n")
    return LateSpawner([], Board.create(), {**os.environ, "PYTHONPATH": str(tmp_path)})


def test_a_worker_that_does_not_become_ready_is_killed_and_has_failed(
    late: LateSpawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_S", 0.5)
    late.n_asked = 3

    async def start() -> int | None:
        keeper = Keeper(Role("worker", "hangs", is_worker=True), late)
        with pytest.raises(StartFailed):
            await keeper.start()
        assert keeper._child is not None
        return keeper._child.process.returncode

    assert asyncio.run(start()) == -signal.SIGKILL


def test_a_child_that_cannot_be_started_is_tried_again(late: LateSpawner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_PAUSES_S", (0.01,))

    async def n_asked() -> int:
        keeper = Keeper(Role("drain", "hangs", is_worker=False), late)
        keeper.begin()
        await asyncio.to_thread(eventually, lambda: keeper._child, within_s=90)
        await keeper.stop(signal.SIGKILL, 10.0)
        return late.n_asked

    assert asyncio.run(n_asked()) == 3


class HangingSpawner(Spawner):
    """The system takes for ever over a child, as one that was killed does which waits for a disk."""

    async def start(self, role: Role) -> Child:  # noqa: ARG002 - the signature of what it stands for
        never: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        return await never


def test_a_child_that_does_not_end_though_it_was_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "KILL_S", 0.01)
    monkeypatch.setattr(supervisor, "START_S", 0.01)

    async def stop() -> None:
        spawner = HangingSpawner([], Board.create(), {})
        with pytest.raises(StartFailed):
            await Keeper(Role("worker", "hangs", is_worker=True), spawner).start()
        keeper = Keeper(Role("drain", "hangs", is_worker=False), spawner)
        keeper.begin()
        await keeper.stop(signal.SIGTERM, 0.01)

    with capture_logs() as said:
        asyncio.run(stop())
    left = [line for line in said if line["event"] == "child_left_behind"]
    assert [line["child"] for line in left] == ["worker", "drain"]
    assert all(line["advice"] for line in left)
