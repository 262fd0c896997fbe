"""Heads that come again are recognised without the parser, and mean what the parser would have said."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.repeated_heads import RepeatedHead, repeated_head
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import settings_of
from tests.servers import running
from tests.serving.raw_server import connected, request, rest_of, served_raw
from tests.serving.talk import QUESTION
from tests.serving.test_connections import answer_of, pool_before, saying
from tests.serving.test_framing import ATTACKS, BODY, HOT, with_lines

START = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
NAMES = st.sampled_from([b"content-length", b"Content-Length", b"CONTENT-LENGTH"])
BODIES = st.binary(max_size=2000)
PRIMER = with_lines(f"content-length: {len(BODY)}").replace(b"PATH", HOT.encode())


def message(name: bytes, body: bytes, after: bytes = b"x-a: b\r\n") -> bytes:
    return START + b"%b: %d\r\n" % (name, len(body)) + after + b"\r\n" + body


def learned(name: bytes, body: bytes) -> RepeatedHead:
    head = repeated_head(message(name, body), len(body))
    assert head is not None
    return head


@given(NAMES, BODIES, BODIES)
def test_the_same_head_with_another_length_is_recognised(name: bytes, first: bytes, second: bytes) -> None:
    assert learned(name, first).body_of(message(name, second)) == second


@given(NAMES, BODIES, BODIES, st.data())
def test_nothing_else_is(name: bytes, first: bytes, second: bytes, draw: st.DataObject) -> None:
    """A byte of the head changed, taken out or put in, or one more or less at the end."""
    data = message(name, second)
    place = draw.draw(st.integers(0, len(data) - len(second) - 1))
    byte = draw.draw(st.binary(min_size=0, max_size=2))
    changed = data[:place] + byte + data[place + 1 :]
    if changed != data:
        same_meaning = _is_the_same_but_for_digits(changed, name)
        assert learned(name, first).body_of(changed) is None or same_meaning
    assert learned(name, first).body_of(data + b"x") is None
    assert learned(name, first).body_of(data[:-1]) is None


@pytest.mark.parametrize("n_bytes", [*range(14), *range(86, 116), *range(986, 1016), *range(9984, 10016)])
def test_where_a_length_gets_a_digit_more_only_the_right_one_is_taken(n_bytes: int) -> None:
    head, body = learned(b"content-length", b"ab"), b"x" * n_bytes
    start, _, _ = message(b"content-length", b"").rpartition(b"0\r\nx-a")
    for announced in [*map(str, range(max(0, n_bytes - 20), n_bytes + 20)), f"0{n_bytes}", f"+{n_bytes}", "-1", ""]:
        data = start + announced.encode() + b"\r\nx-a: b\r\n\r\n" + body
        assert head.body_of(data) == (body if announced == str(n_bytes) else None)


def _is_the_same_but_for_digits(data: bytes, name: bytes) -> bool:
    """Whether other digits announce exactly the bytes that follow: `007` for `7`, which every parser reads alike."""
    start = START + name + b": "
    digits, found, rest = data[len(start) :].partition(b"\r\n")
    after = b"x-a: b\r\n\r\n"
    is_same = data.startswith(start) and bool(found) and digits.isdigit() and rest.startswith(after)
    return is_same and int(digits) == len(rest) - len(after)


@pytest.mark.parametrize(
    "data",
    [
        START + b"content-length:2\r\n\r\n{}",
        START + b"content-length: 2 \r\n\r\n{}",
        START + b"content-length: 3\r\n\r\n{}",
        START + b"content-length: %b2\r\n\r\n{}" % (b"0" * 5000),
        START + b"transfer-encoding: chunked\r\n\r\n{}",
        START + b"content-length: 2\r\n\r\n{}{}",
        START + b"x-a: %b\r\ncontent-length: 2\r\n\r\n{}" % (b"a" * 9000),
        START + b"content-length: 2",
        b"\r\n\r\n" + START + b"content-length: 2\r\n\r\n{}",
        b"",
    ],
)
def test_what_is_not_plain_is_not_remembered(data: bytes) -> None:
    assert repeated_head(data, 2) is None


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[FakeVLLM, str]]:
    engine = FakeVLLM("base-model")
    with running(engine.app) as url:
        yield engine, url


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, engine: tuple[FakeVLLM, str]) -> Iterator[tuple[str, int]]:
    with served_raw(settings_of(tmp_path_factory.mktemp("repeated"), engine[1])) as found:
        yield found


def one_answer(connection: socket.socket) -> bytes:
    """The head and the body of one whole answer."""
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        if found and len(body) == int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            return data
        part = connection.recv(65536)
        assert part, data
        data += part


def primed(address: tuple[str, int]) -> socket.socket:
    """A connection that has sent one good request twice."""
    connection = connected(address)
    for _ in range(2):
        connection.sendall(PRIMER)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
    return connection


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_ambiguous_is_refused_behind_a_good_request_too(
    address: tuple[str, int], engine: tuple[FakeVLLM, str], attack: str
) -> None:
    with primed(address) as connection:
        engine[0].seen.clear()
        connection.sendall(ATTACKS[attack].replace(b"PATH", HOT.encode()) + request(HOT, BODY, "connection: close"))
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert engine[0].seen == []


def test_each_request_is_itself(address: tuple[str, int], engine: tuple[FakeVLLM, str]) -> None:
    """Of one head with bodies of different lengths, in pieces, two at once, and with another head between."""
    longer = orjson.dumps({**QUESTION, "user": "ada" * 9})
    data = with_lines(f"content-length: {len(longer)}", body=longer).replace(b"PATH", HOT.encode())
    with primed(address) as connection:
        engine[0].seen.clear()
        for part in (data, data[:30], data[30:], data[:-1], data[-1:], PRIMER):
            connection.sendall(part)
            if part not in (data[:30], data[:-1]):
                assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        assert len(engine[0].seen) == 4
        connection.sendall(
            data + request(HOT, BODY, "x-request-id: other") + PRIMER + request(HOT, BODY, "connection: close")
        )
        answer = rest_of(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 4
    assert answer.count(b"x-request-id: other") == 1


def test_a_body_that_came_too_late_is_no_part_of_the_next_head(address: tuple[str, int]) -> None:
    """The framework may answer before it has read a body; the rest of that one can come with the next request."""
    late = b"late"
    with connected(address) as connection:
        connection.sendall(request("/health/live", b"", f"content-length: {len(late)}", method="GET"))
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(late + PRIMER)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(late + PRIMER)
        assert rest_of(connection).startswith(b"HTTP/1.1 400 ")


def test_a_repeated_head_is_taken_without_the_parser(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes | None] = []
    body_of = RepeatedHead.body_of

    def noted(head: RepeatedHead, data: bytes) -> bytes | None:
        taken.append(body_of(head, data))
        return taken[-1]

    monkeypatch.setattr(RepeatedHead, "body_of", noted)
    with primed(address):
        assert BODY in taken


async def test_answers_with_one_head_are_each_themselves() -> None:
    bodies = (b"ok", b"better", b"x" * 1000, b"", b"last")
    answers = [b"HTTP/1.1 200 OK\r\nServer: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies]
    async with pool_before(saying(*answers)) as (pool, _):
        for body in bodies:
            told = await answer_of(pool)
            assert (told.status, told.body, told.headers[0]) == (200, body, (b"server", b"a"))
            assert told.failure is None
            assert pool.n_open == 1


@pytest.mark.parametrize(
    "odd",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 204 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_an_odd_answer_behind_a_good_one_closes_its_connection(odd: bytes) -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with pool_before(saying(good, good, odd)) as (pool, _):
        await answer_of(pool)
        await answer_of(pool)
        await answer_of(pool)
        assert pool.n_idle == 0
