"""Both lanes speak HTTP alike: pipelining, chunks, old versions and small pieces change nothing in what is answered."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import settings_of
from tests.serving.faulty_engine import FaultyEngine, answer_well, faulty_engine
from tests.serving.raw_server import connected, request, rest_of, said, served_raw
from tests.serving.talk import CHAT
from tests.serving.test_faults_leaving import LANES
from tests.serving.waiting import eventually

CHUNKED = "transfer-encoding: chunked"
HEALTH = b"GET /health/live HTTP/1.1\r\nhost: gateway\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n"


@dataclass(frozen=True)
class Lane:
    """A gateway of one lane and its engine, which answers each question with the question."""

    address: tuple[str, int]
    engine: FaultyEngine


@pytest.fixture(scope="module", params=[True, False], ids=["fast lane", "ASGI"])
def lane(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lane]:
    directory = tmp_path_factory.mktemp("lanes")
    with faulty_engine(answer_well) as engine:
        settings = settings_of(directory, engine.url, fast_lane=request.param, max_body_bytes=300_000)
        with served_raw(settings) as address:
            yield Lane(address, engine)


def question(text: str, **more: Any) -> bytes:
    return orjson.dumps({"model": "assistant", "messages": [{"role": "user", "content": text}], **more})


def asking(text: str, *lines: str, **more: Any) -> bytes:
    """A whole completion request."""
    return request(CHAT, question(text, **more), *lines)


def in_chunks(body: bytes, size: int) -> bytes:
    """A body in HTTP chunks."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """One of several answers on a connection."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers_in(data: bytes) -> list[Answer]:
    """All answers of a connection, each delimited by its own framing."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        status = int(first.split()[1])
        if status == 100:
            continue
        if headers.get("transfer-encoding") == "chunked":
            body, data = dechunked(data)
        else:
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
        found.append(Answer(status, headers, body))
    return found


def dechunked(data: bytes) -> tuple[bytes, bytes]:
    """A chunked body, and what follows it."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        n_bytes = int(size, 16)
        body += data[:n_bytes]
        assert data[n_bytes : n_bytes + 2] == b"\r\n"
        data = data[n_bytes + 2 :]
        if n_bytes == 0:
            return body, data


def marks_of(answers: Sequence[Answer]) -> list[str]:
    """What each answer is about."""
    return [
        found[0] if (found := re.findall(r'mark-\d+|"object": ?"list"', each.body.decode())) else "" for each in answers
    ]


def test_pipelined_completions_are_answered_in_turn(lane: Lane) -> None:
    n_requests = 12
    requests = [asking(f"mark-{n}", stream=n % 3 == 0) for n in range(n_requests - 1)]
    requests.append(asking(f"mark-{n_requests - 1}", "connection: close"))
    answers = answers_in(said(lane.address, b"".join(requests)))
    assert [answer.status for answer in answers] == [200] * n_requests
    assert marks_of(answers) == [f"mark-{n}" for n in range(n_requests)]


def test_pipelined_completions_among_other_requests(lane: Lane) -> None:
    bad = request(CHAT, orjson.dumps({"model": "nobody", "messages": [{"role": "user", "content": "?"}]}))
    requests = [asking("mark-0"), MODELS, asking("mark-1", stream=True), bad, MODELS, asking("mark-2")]
    requests.append(asking("mark-3", "connection: close", stream=True))
    answers = answers_in(said(lane.address, b"".join(requests)))
    assert [answer.status for answer in answers] == [200, 200, 200, 404, 200, 200, 200]
    marks = [mark.replace(" ", "") for mark in marks_of(answers)]
    assert marks == ["mark-0", '"object":"list"', "mark-1", "", '"object":"list"', "mark-2", "mark-3"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pipelined_requests_in_small_pieces(lane: Lane, size: int) -> None:
    data = asking("mark-0") + asking("mark-1", stream=True) + asking("mark-2", "connection: close")
    with connected(lane.address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), size):
            connection.sendall(data[start : start + size])
        answers = answers_in(rest_of(connection))
    assert marks_of(answers) == ["mark-0", "mark-1", "mark-2"]


def test_a_connection_is_used_again(lane: Lane) -> None:
    with connected(lane.address) as connection:
        for n in range(20):
            connection.sendall(asking(f"mark-{n}"))
            answer = b""
            while not answer.endswith(b"}}"):
                part = connection.recv(65536)
                assert part, n
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert f"mark-{n}".encode() in answer
            assert b"connection: close" not in answer


@pytest.mark.parametrize("is_stream", [False, True])
def test_expect_continue(lane: Lane, is_stream: bool) -> None:
    body = question("mark-1", stream=is_stream)
    head, _, _ = request(CHAT, body, "expect: 100-continue", "connection: close").partition(b"\r\n\r\n")
    with connected(lane.address) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        (answer,) = answers_in(rest_of(connection))
    assert (answer.status, marks_of([answer])) == (200, ["mark-1"])


def test_http_1_0_gets_a_whole_answer_and_a_close(lane: Lane) -> None:
    body = question("mark-1")
    head = f"POST {CHAT} HTTP/1.0\r\nhost: gateway\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    answer = said(lane.address, head + body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"transfer-encoding" not in answer.lower()
    assert b"mark-1" in answer


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_wants_the_connection_closed(lane: Lane, is_stream: bool) -> None:
    (answer,) = answers_in(said(lane.address, asking("mark-1", "Connection: Close", stream=is_stream)))
    assert answer.headers["connection"] == "close"
    assert marks_of([answer]) == ["mark-1"]


@pytest.mark.parametrize("size", [1, 3, 64, 10_000])
def test_chunked_requests(lane: Lane, size: int) -> None:
    body = question("mark-1")
    data = request(CHAT, in_chunks(body, size), CHUNKED) + request(
        CHAT, in_chunks(question("mark-2"), size), CHUNKED, "connection: close"
    )
    assert marks_of(answers_in(said(lane.address, data))) == ["mark-1", "mark-2"]


def test_a_request_split_at_every_byte(lane: Lane) -> None:
    """Each time on the same connection, so that what one split leaves behind would be seen by the next."""
    with connected(lane.address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        n_bytes = len(asking("mark-1000"))
        for n in range(1, n_bytes):
            data = asking(f"mark-{1000 + n}")
            connection.sendall(data[:n])
            connection.sendall(data[n:])
            answer = b""
            while not answer.endswith(b"}}"):
                part = connection.recv(65536)
                assert part, n
                answer += part
            assert marks_of(answers_in(answer)) == [f"mark-{1000 + n}"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_there(lane: Lane, is_chunked: bool) -> None:
    body = question("x" * 400_000)
    lines = [CHUNKED] if is_chunked else []
    n_asked = len(lane.engine.asked)
    data = request(CHAT, in_chunks(body, 10_000) if is_chunked else body, *lines)
    with connected(lane.address) as connection:
        connection.sendall(data[:350_000])
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert len(lane.engine.asked) == n_asked


@LANES
@pytest.mark.parametrize(("path", "route"), [(CHAT, "chat.completions"), ("/v1/messages", "messages")])
@pytest.mark.parametrize(("inbound", "is_sane"), [("mine-1", True), ("x" * 200, False)])
def test_a_body_that_comes_too_slowly_is_answered_alike(
    make_settings: Callable[..., Settings], fast_lane: bool, path: str, route: str, inbound: str, is_sane: bool
) -> None:
    with served_raw(make_settings(fast_lane=fast_lane, timeouts={"request_body_s": 0.3})) as address:
        before = n_counted(address, route)
        with connected(address) as connection:
            connection.sendall(request(path, question("mark-1"), f"x-request-id: {inbound}")[:-5])
            (answer,) = answers_in(rest_of(connection))
        eventually(lambda: n_counted(address, route) > before)
    assert answer.status == 408
    assert (answer.headers["x-request-id"] == inbound) == is_sane
    assert answer.headers["connection"] == "close"
    assert answer.headers["date"]
    body = orjson.loads(answer.body)
    assert (body["error"]["code"], body.get("type")) == ("request_timeout", "error" if route == "messages" else None)


def n_counted(address: tuple[str, int], route: str) -> float:
    """Requests of a route that the metrics speak of."""
    text = httpx2.get("http://{}:{}/metrics".format(*address), timeout=20).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(
        sample.value for sample in samples if sample.name == "pawl_requests_total" and sample.labels["route"] == route
    )


def test_a_body_just_within_the_limit_is_taken(lane: Lane) -> None:
    text = "mark-7 " + "x" * (290_000 - len(question("")))
    (answer,) = answers_in(said(lane.address, asking(text, "connection: close")))
    assert (answer.status, marks_of([answer])) == (200, ["mark-7"])
    eventually(lambda: lane.engine.asked[-1].question == text)


def test_engines_are_asked_once_for_each_request(lane: Lane) -> None:
    n_asked = len(lane.engine.asked)
    said(lane.address, asking("a") + asking("b", stream=True) + HEALTH + asking("c", "connection: close"))
    assert [asked.question for asked in lane.engine.asked[n_asked:]] == ["a", "b", "c"]
    assert FakeVLLM().seen == []
