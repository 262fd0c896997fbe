"""Requests whose end two parsers could see in different places are refused and their connection is closed.

The corpus follows the families of request smuggling (RFC 9112 §5-7 and §11.2), on a route of the relay and on one of
the framework. What is not ambiguous is answered, each request as itself.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import orjson
import pytest

from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import settings_of
from tests.servers import running
from tests.serving.raw_server import connected, request, rest_of, said, served_raw
from tests.serving.talk import CHAT, QUESTION

HOT, COLD = CHAT, "/v1/feedback"
BODY = orjson.dumps(QUESTION)
LENGTH = f"content-length: {len(BODY)}"
CHUNKED = "transfer-encoding: chunked"
IN_ONE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def with_lines(*lines: str, body: bytes = BODY) -> bytes:
    """A request of exactly these header lines; `PATH` is put in later."""
    return "\r\n".join(["POST PATH HTTP/1.1", "host: gateway", *lines]).encode() + b"\r\n\r\n" + body


ATTACKS = {
    "length and chunked": with_lines(LENGTH, CHUNKED, body=IN_ONE_CHUNK),
    "chunked and length": with_lines(CHUNKED, LENGTH, body=IN_ONE_CHUNK),
    "two lengths, equal": with_lines(LENGTH, LENGTH),
    "two lengths": with_lines(LENGTH, "content-length: 3"),
    "list of lengths": with_lines(f"{LENGTH}, {len(BODY)}"),
    "signed length": with_lines(f"content-length: +{len(BODY)}"),
    "negative length": with_lines("content-length: -1"),
    "hexadecimal length": with_lines("content-length: 0x10"),
    "length with a space": with_lines("content-length: 1 0"),
    "empty length": with_lines("content-length:"),
    "length beyond 64 bits": with_lines("content-length: 99999999999999999999999"),
    "unknown coding": with_lines("transfer-encoding: xchunked", body=IN_ONE_CHUNK),
    "chunked not last": with_lines("transfer-encoding: chunked, identity", body=IN_ONE_CHUNK),
    "identity": with_lines("transfer-encoding: identity"),
    "chunked twice": with_lines(CHUNKED, CHUNKED, body=IN_ONE_CHUNK),
    "vertical tab before chunked": with_lines("transfer-encoding: \x0bchunked", body=IN_ONE_CHUNK),
    "space before colon": with_lines(f"content-length : {len(BODY)}"),
    "space before colon of coding": with_lines("transfer-encoding : chunked", body=IN_ONE_CHUNK),
    "folded line": with_lines("x-a: b\r\n c", LENGTH),
    "folded coding": with_lines("transfer-encoding:\r\n chunked", body=IN_ONE_CHUNK),
    "space before the first name": b"POST PATH HTTP/1.1\r\n host: gateway\r\n\r\n",
    "bare line feeds": b"POST PATH HTTP/1.1\nhost: gateway\ncontent-length: 2\n\n{}",
    "one bare line feed": with_lines(f"x-a: b\n{LENGTH}"),
    "bare carriage return": with_lines(f"x-a: b\r{LENGTH}"),
    "NUL in a value": with_lines("x-a: a\x00b", LENGTH),
    "NUL in a name": with_lines("x\x00a: b", LENGTH),
    "line without a colon": with_lines("nonsense", LENGTH),
    "empty name": with_lines(": b", LENGTH),
    "chunk size that is none": with_lines(CHUNKED, body=b"zz\r\n\r\n"),
    "chunk size with a prefix": with_lines(CHUNKED, body=b"0x2\r\n{}\r\n0\r\n\r\n"),
    "negative chunk size": with_lines(CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk size with a space": with_lines(CHUNKED, body=b"2 \r\n{}\r\n0\r\n\r\n"),
    "chunk size beyond 64 bits": with_lines(CHUNKED, body=b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    "chunk lines with bare line feeds": with_lines(CHUNKED, body=b"2\n{}\n0\n\n"),
    "chunk longer than it says": with_lines(CHUNKED, body=b"2\r\n{}{}\r\n0\r\n\r\n"),
    "space in the target": b"POST PATH x HTTP/1.1\r\nhost: gateway\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 PATH",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"POST PATH HTTP/9.9\r\nhost: gateway\r\n\r\n",
    "unknown method": b"SMUGGLE PATH HTTP/1.1\r\nhost: gateway\r\n\r\n",
}


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, framing_engine: tuple[FakeVLLM, str]
) -> Iterator[tuple[str, int]]:
    with served_raw(settings_of(tmp_path_factory.mktemp("framing"), framing_engine[1])) as found:
        yield found


@pytest.fixture(scope="module")
def framing_engine() -> Iterator[tuple[FakeVLLM, str]]:
    engine = FakeVLLM("base-model")
    with running(engine.app) as url:
        yield engine, url


@pytest.mark.parametrize("path", [HOT, COLD])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_ambiguous_is_refused_and_closed(
    address: tuple[str, int], framing_engine: tuple[FakeVLLM, str], attack: str, path: str
) -> None:
    framing_engine[0].seen.clear()
    after = request(HOT, BODY, "connection: close")  # What a smuggler wants to be taken for a request of its own.
    answer = said(address, ATTACKS[attack].replace(b"PATH", path.encode()) + after)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nconnection: close\r\n" in answer
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert framing_engine[0].seen == []


@pytest.mark.parametrize("paths", [(HOT, HOT), (HOT, COLD), (COLD, HOT), (COLD, COLD)])
def test_requests_on_one_connection_are_answered_in_turn(address: tuple[str, int], paths: tuple[str, str]) -> None:
    first, second = paths
    data = request(first, BODY, "x-request-id: first") + request(
        second, BODY, "x-request-id: second", "connection: close"
    )
    answer = said(address, data)
    assert answer.count(b"HTTP/1.1 ") == 2
    assert 0 < answer.find(b"x-request-id: first") < answer.find(b"x-request-id: second")


@pytest.mark.parametrize("path", [HOT, COLD])
def test_a_body_in_pieces_and_chunks_is_one_body(address: tuple[str, int], path: str) -> None:
    whole = said(address, request(path, BODY, "connection: close"))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:])) + b"0\r\n\r\n"
    data = request(path, chunks, CHUNKED, "connection: close")
    with connected(address) as connection:
        for start in range(0, len(data), 50):
            connection.sendall(data[start : start + 50])
        assert rest_of(connection)[:13] == whole[:13]


@pytest.mark.parametrize("path", [HOT, COLD])
def test_trailers_are_not_headers(address: tuple[str, int], path: str) -> None:
    chunks = b"%x\r\n%b\r\n0\r\nx-request-id: from a trailer\r\n\r\n" % (len(BODY), BODY)
    answer = said(address, request(path, chunks, CHUNKED, "x-request-id: mine", "connection: close"))
    assert b"x-request-id: mine" in answer
    assert b"from a trailer" not in answer


@pytest.mark.parametrize("path", ["/health/live", "/v1/models", "/nowhere"])
def test_a_client_that_says_at_once_that_it_has_no_more_gets_its_answer(address: tuple[str, int], path: str) -> None:
    for _ in range(20):
        with connected(address) as connection:
            connection.sendall(request(path, b"", method="GET"))
            connection.shutdown(socket.SHUT_WR)
            answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 404" if path == "/nowhere" else b"HTTP/1.1 200")
        assert orjson.loads(answer.partition(b"\r\n\r\n")[2])
