"""The worker's scores over a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring import score_api
from monitoring.errors import ScoringFailed
from monitoring.score_api import PIECE, ScoreServer, SharedScorer, parse_texts
from tests.serving.waiting import eventually


def lengths(texts: Sequence[str]) -> list[float]:
    return [len(text) / 100 for text in texts]


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    server = ScoreServer("127.0.0.1", 0, lambda: lengths)
    server.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server: ScoreServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client:
        yield client


def test_each_text_gets_its_score(client: httpx2.Client) -> None:
    response = client.post("/score", json={"texts": ["a", "bb", ""]})
    assert response.json() == {"toxicity": [0.01, 0.02, 0.0]}
    assert client.post("/score", json={"texts": []}).json() == {"toxicity": []}


def test_metrics_are_where_they_were(client: httpx2.Client) -> None:
    assert "pawl_guard_seconds" in client.get("/metrics").text
    assert client.get("/else").status_code == 404


@pytest.mark.parametrize(
    "body", [b"", b"no JSON", b"[]", b"{}", b'{"texts": "a"}', b'{"texts": [1]}', b'{"texts": ["\xff"]}']
)
def test_what_is_no_request_is_refused(client: httpx2.Client, body: bytes) -> None:
    assert client.post("/score", content=body).status_code == 400


def test_requests_are_bounded(client: httpx2.Client) -> None:
    assert client.post("/score", json={"texts": ["a"] * 65}).status_code == 400
    assert client.post("/score", json={"texts": ["a" * 200_000]}).status_code == 400
    for unread in (b" " * (score_api.MAX_BODY_BYTES + 1), iter([b"{}"])):
        refused = client.post("/score", content=unread)
        assert (refused.status_code, refused.headers["connection"]) == (413, "close")
    assert client.post("/score", json={"texts": ["a"]}).status_code == 200


def test_connections_are_bounded() -> None:
    server = ScoreServer("127.0.0.1", 0, lambda: lengths, max_connections=1)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as first:
        first.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        assert first.recv(8) == b"HTTP/1.1"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as second:
            second.sendall(b"GET")
            with suppress(ConnectionError):  # Closed with something unread, it is reset.
                assert second.recv(8) == b""
    server.shutdown()
    server.server_close()


def test_without_a_scorer_there_is_no_telling(server: ScoreServer, client: httpx2.Client) -> None:
    server.find_scorer = lambda: None
    assert client.post("/score", json={"texts": ["a"]}).status_code == 503

    def broken(_: Sequence[str]) -> list[float]:
        raise ScoringFailed("not a number")

    server.find_scorer = lambda: broken
    assert client.post("/score", json={"texts": ["a"]}).status_code == 500


def test_too_many_at_once_are_told_so(server: ScoreServer, client: httpx2.Client) -> None:
    for _ in range(score_api.MAX_WAITING):
        server.asking.acquire()
    assert client.post("/score", json={"texts": ["a"]}).status_code == 503
    server.asking.release()
    assert client.post("/score", json={"texts": ["a"]}).status_code == 200


def test_who_waits_goes_before_the_duty() -> None:
    seen: list[str] = []
    gate = threading.Semaphore(0)

    def slow(texts: Sequence[str]) -> list[float]:
        gate.acquire()
        seen.extend(texts)
        return lengths(texts)

    shared = SharedScorer(slow)
    duty = threading.Thread(target=shared.score, args=([f"duty {place}" for place in range(3 * PIECE)],))
    duty.start()
    eventually(lambda: shared._is_busy)
    urgent = threading.Thread(target=shared.score_now, args=(["urgent"],))
    urgent.start()
    eventually(lambda: shared._n_urgent)
    for _ in range(4):
        gate.release()
    urgent.join(10)
    duty.join(10)
    assert seen.index("urgent") == PIECE
    assert len(seen) == 3 * PIECE + 1


def test_a_failure_lets_the_next_one_go() -> None:
    def broken(_: Sequence[str]) -> list[float]:
        raise ScoringFailed("no")

    shared = SharedScorer(broken)
    for _ in range(2):
        with pytest.raises(ScoringFailed):
            shared.score_now(["a"])


JSON = st.recursive(
    st.none() | st.integers(-9, 9) | st.text("ab", max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["texts", "a"]), inner),
)


@given(JSON)
def test_any_json_can_be_sent(value: object) -> None:
    texts = parse_texts(orjson.dumps(value))
    assert texts is None or all(isinstance(text, str) for text in texts)
