"""Clients that open connections and say little: they are sent away in time, and nobody else notices."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import httpx2
import orjson
import pytest

from pawl.settings import Settings
from serving.patience import PatientHttpProtocol
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import serving
from tests.serving.faulty_engine import Asked, completion, faulty_engine, whole
from tests.serving.raw_server import connected, request, rest_of, said, served_raw
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.test_faults_leaving import LANES
from tests.serving.test_faults_slow_readers import slow_reader
from tests.serving.test_framing import BODY, COLD, HOT
from tests.serving.waiting import eventually

N_SLOW = 200
BRISK = {"request_head_s": 1.0, "idle_s": 1.5}


def beginning(address: tuple[str, int]) -> socket.socket:
    """A connection with the first part of a head."""
    connection = connected(address)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: gateway\r\nx-slow: ".encode())
    return connection


class Trickle(threading.Thread):
    """Sends one byte of an endless head on each connection, again and again, until all are closed."""

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        super().__init__(daemon=True)
        self._open = set(connections)
        self._is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while self._open and not self._is_over.wait(0.2):
            for connection in list(self._open):
                try:
                    connection.send(b"x")
                except OSError:
                    self._open.discard(connection)

    def stop(self) -> None:
        self._is_over.set()
        self.join()


def test_silent_and_trickling_clients_are_sent_away(make_settings: Callable[..., Settings]) -> None:
    with served_raw(make_settings(timeouts=BRISK)) as address, ExitStack() as stack:
        silent = [stack.enter_context(connected(address)) for _ in range(N_SLOW)]
        trickling = [stack.enter_context(beginning(address)) for _ in range(N_SLOW)]
        trickle = Trickle(trickling)
        stack.callback(trickle.stop)
        with httpx2.Client(base_url="http://{}:{}".format(*address), timeout=20) as client:
            assert [client.post(CHAT, json=QUESTION).status_code for _ in range(20)] == [200] * 20
        assert [rest_of(connection) for connection in silent] == [b""] * N_SLOW
        # A byte that was sent after the refusal may reset the connection before that was read.
        answers = [rest_of(connection)[:12] for connection in trickling]
        assert set(answers) <= {b"HTTP/1.1 408", b""}
        assert answers.count(b"HTTP/1.1 408") > N_SLOW / 2


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(
    make_settings: Callable[..., Settings], engine: FakeVLLM
) -> None:
    engine.behaviour.delay_s = 3.0
    with served_raw(make_settings(timeouts=BRISK)) as address:
        answer = said(address, request(HOT, BODY))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" not in answer


@pytest.mark.parametrize("path", [HOT, COLD])
@pytest.mark.parametrize("n_headers", [1, 2000])
def test_a_head_that_is_too_large_is_refused(make_settings: Callable[..., Settings], path: str, n_headers: int) -> None:
    lines = [f"x-{number}: {'v' * (40_000 // n_headers)}" for number in range(n_headers)]
    with served_raw(make_settings()) as address:
        for data in (request(path, BODY, *lines), request(path, BODY, *lines).partition(b"\r\n\r\n")[0]):
            answer = said(address, data)
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b'"code":"headers_too_large"' in answer
        assert said(address, request(path, BODY, f"x-fits: {'v' * 20_000}", "connection: close"))[:12] != answer[:12]


def test_a_large_body_is_not_taken_for_a_large_head(make_settings: Callable[..., Settings]) -> None:
    body = BODY[:-1] + b" " * 500_000 + b"}"
    with served_raw(make_settings()) as address:
        assert said(address, request(HOT, body, "connection: close")).startswith(b"HTTP/1.1 200")


def test_the_oldest_idle_connection_makes_room(make_settings: Callable[..., Settings]) -> None:
    with served_raw(make_settings(max_connections=4)) as address, ExitStack() as stack:
        idle = [stack.enter_context(connected(address)) for _ in range(4)]
        for _ in range(3):
            assert said(address, request(HOT, BODY, "connection: close")).startswith(b"HTTP/1.1 200")
        assert rest_of(idle[0]) == b""


def test_without_an_idle_connection_the_newcomer_is_refused(
    make_settings: Callable[..., Settings], engine: FakeVLLM
) -> None:
    engine.behaviour.gap_s = 1.0
    with served_raw(make_settings(max_connections=3)) as address, ExitStack() as stack:
        busy = [stack.enter_context(connected(address)) for _ in range(3)]
        for connection in busy:
            connection.sendall(request(HOT, orjson.dumps(STREAM), "connection: close"))
        eventually(lambda: engine.n_running == 3)
        with suppress(ConnectionError):
            answer = said(address, request(HOT, BODY))
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: " in answer
        assert all(b"data: [DONE]" in rest_of(connection) for connection in busy)


LARGE = "x" * 6_000_000


async def at_length(asked: Asked) -> None:
    """More than the system takes for a client that does not read."""
    await asked.say(whole(completion(LARGE)))


@LANES
def test_an_answer_that_is_still_being_read_is_not_cut_off(
    make_settings: Callable[..., Settings], fast_lane: bool
) -> None:
    with faulty_engine(at_length) as engine:
        settings = make_settings(model={"engines": [engine.url]}, fast_lane=fast_lane, timeouts={"idle_s": 0.3})
        with serving(settings, FakeVLLM()) as served, slow_reader(served.address, QUESTION) as connection:
            eventually(lambda: engine.asked and not served.gateway.relay.calls)
            time.sleep(1.5)  # Longer than a connection may be idle.
            assert_read_to_its_end(connection)


@LANES
def test_an_answer_that_is_still_being_read_makes_no_room(
    make_settings: Callable[..., Settings], fast_lane: bool
) -> None:
    with faulty_engine(at_length) as engine:
        settings = make_settings(model={"engines": [engine.url]}, fast_lane=fast_lane, max_connections=1)
        with serving(settings, FakeVLLM()) as served, slow_reader(served.address, QUESTION) as connection:
            eventually(lambda: engine.asked and not served.gateway.relay.calls)
            assert said(served.address, b"").startswith(b"HTTP/1.1 503 ")
            assert_read_to_its_end(connection)


def assert_read_to_its_end(connection: socket.socket) -> None:
    """The whole large answer comes."""
    received = bytearray()
    while not received.endswith(b"}}"):
        part = connection.recv(65536)
        assert part
        received += part
    assert received.count(b"x" * 1000) == len(LARGE) // 1000


def test_a_fault_at_one_connection_does_not_end_the_limits(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    overdue = PatientHttpProtocol.overdue
    faults = [ZeroDivisionError()]

    def faulty(connection: PatientHttpProtocol) -> None:
        if faults:
            raise faults.pop()
        overdue(connection)

    monkeypatch.setattr(PatientHttpProtocol, "overdue", faulty)
    with served_raw(make_settings(timeouts=BRISK)) as address, ExitStack() as stack:
        silent = [stack.enter_context(connected(address)) for _ in range(2)]
        assert [rest_of(connection) for connection in silent] == [b"", b""]
    assert not faults
