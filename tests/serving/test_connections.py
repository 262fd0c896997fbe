"""The pool of connections to an engine, against servers that do everything a server can do to it."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import uvloop

from serving.connections import MAX_HEAD_BYTES, EnginePool, Reason, Sent, _Connection, parse_address
from tests.servers import free_port
from tests.serving.raw_engine import Peer, RawEngine, Script, raw_engine

PATH = b"/v1/chat/completions"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = b"x" * (16 << 20)
"""More than the kernel takes off our hands."""


pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy(), uvloop.EventLoopPolicy()], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param
    return policy


class Told:
    """An answer that writes down what it was told; a test may act inside any callback."""

    def __init__(self, **inside: Callable[[], object]) -> None:
        self.inside = inside
        self.events: list[str] = []
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.failure: tuple[Reason, bool] | None = None
        self.is_over = asyncio.Event()
        self.sent: Sent | None = None

    def abort(self) -> None:
        assert self.sent is not None
        self.sent.abort()

    def pause(self) -> None:
        assert self.sent is not None
        self.sent.pause()

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status, self.headers = status, headers
        self._note("head")

    def on_body(self, data: bytes) -> None:
        assert data
        self.body += data
        self._note("body")

    def on_end(self) -> None:
        self.is_over.set()
        self._note("end")

    def on_failure(self, reason: Reason, was_sent: bool) -> None:
        self.failure = (reason, was_sent)
        self.is_over.set()
        self._note("failure")

    async def over(self) -> Told:
        async with asyncio.timeout(20):
            await self.is_over.wait()
        return self

    def _note(self, event: str) -> None:
        assert not {"end", "failure"} & set(self.events), "nothing may follow the end"
        self.events.append(event)
        if event in self.inside:
            self.inside[event]()


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not look():  # noqa: ASYNC110 - what is looked at has no event
            await asyncio.sleep(0.005)


async def a_moment() -> None:
    """Long enough for what must not happen to happen."""
    await asyncio.sleep(0.05)


def post(pool: EnginePool, told: Told, body: bytes = b"{}") -> Sent:
    told.sent = pool.send(PATH, b"x-request-id: 7\r\n", body, told)
    return told.sent


async def answer_of(pool: EnginePool) -> Told:
    told = Told()
    post(pool, told)
    return await told.over()


@asynccontextmanager
async def pool_before(
    script: Script, *, idle_s: float = 60.0, max_idle: int = 9
) -> AsyncIterator[tuple[EnginePool, RawEngine]]:
    """A pool and its engine; at the end nothing may be left open."""
    async with raw_engine(script) as engine:
        pool = EnginePool(engine.url, connect_s=10.0, idle_s=idle_s, max_idle=max_idle)
        try:
            yield pool, engine
        finally:
            await pool.close()
            assert (pool.n_open, pool.n_idle) == (0, 0)


def saying(*answers: bytes, at_once: int = 1 << 24) -> Script:
    """Each answer to one request, then a closed connection."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await peer.say(answer, at_once=at_once)

    return script


def repeating(answer: bytes, at_once: int = 1 << 24) -> Script:
    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.say(answer, at_once=at_once)

    return script


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.until_gone()


async def unreading(peer: Peer) -> None:
    """Takes no more than the kernel does."""
    await asyncio.sleep(60)
    await peer.close()


# What answers look like.

KEPT = {
    "length": (OK, 200, b"ok"),
    "no body": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
    "chunked": (CHUNKED + b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n", 200, b"hello"),
    "trailers": (CHUNKED + b"2\r\nhe\r\n0\r\nx-sum: 1\r\nx-other: 2\r\n\r\n", 200, b"he"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "204 with a length": (b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n", 204, b""),
    "304": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", 304, b""),
    "error": (b"HTTP/1.1 503 Busy\r\ncontent-length: 3\r\n\r\nno!", 503, b"no!"),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK,
        200,
        b"ok",
    ),
    "1.0 kept": (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
}
NOT_KEPT = {
    "close": (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
    "1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
    "until closed": (b"HTTP/1.1 200 OK\r\n\r\nto the end", 200, b"to the end"),
    "until closed, empty": (b"HTTP/1.1 200 OK\r\n\r\n", 200, b""),
    "until closed, 1.0": (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\nto the end", 200, b"to the end"),
    "another response": (OK + OK, 200, b"ok"),
    "another body": (OK + b"more", 200, b"ok"),
    "another beginning": (CHUNKED + b"2\r\nok\r\n0\r\n\r\nHTTP/1.", 200, b"ok"),
}


@pytest.mark.parametrize("at_once", [1 << 24, 7, 1])
@pytest.mark.parametrize("name", KEPT)
async def test_a_connection_is_used_again_after_a_whole_answer(name: str, at_once: int) -> None:
    answer, status, body = KEPT[name]
    async with pool_before(repeating(answer, at_once)) as (pool, engine):
        for _ in range(3):
            told = await answer_of(pool)
            assert (told.status, told.body, told.failure) == (status, body, None)
            assert (pool.n_open, pool.n_idle) == (1, 1)
        assert len(engine.peers) == 1


@pytest.mark.parametrize("at_once", [1 << 24, 7, 1])
@pytest.mark.parametrize("name", NOT_KEPT)
async def test_a_connection_with_anything_odd_about_it_is_closed(name: str, at_once: int) -> None:
    answer, status, body = NOT_KEPT[name]
    async with pool_before(saying(answer, at_once=at_once)) as (pool, engine):
        for n in range(1, 4):
            told = await answer_of(pool)
            assert (told.status, told.body, told.failure) == (status, body, None)
            await until(lambda: pool.n_open == 0)
            assert len(engine.peers) == n


async def test_names_are_lower_and_trailers_are_no_headers() -> None:
    answer = CHUNKED.replace(b"\r\n\r\n", b"\r\nX-Empty:\r\nSet-Cookie: A\r\nset-cookie: B\r\n\r\n")
    async with pool_before(saying(answer + b"0\r\nx-sum: 1\r\n\r\n")) as (pool, _):
        told = await answer_of(pool)
        await until(lambda: pool.n_open == 0)
    expected = [(b"transfer-encoding", b"chunked"), (b"x-empty", b""), (b"set-cookie", b"A"), (b"set-cookie", b"B")]
    assert (told.headers, told.events) == (expected, ["head", "end"])


async def test_one_read_is_told_once() -> None:
    async with pool_before(saying(CHUNKED + b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n")) as (pool, _):
        assert (await answer_of(pool)).events == ["head", "body", "end"]


async def test_bytes_that_come_when_nothing_was_asked_reach_nobody() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        await asyncio.sleep(0.05)
        await peer.say(OK)
        await peer.until_gone()

    async with pool_before(script) as (pool, engine):
        assert (await answer_of(pool)).body == b"ok"
        await until(lambda: pool.n_open == 0)
        assert pool.n_idle == 0
        assert (await answer_of(pool)).body == b"ok"
        assert len(engine.peers) == 2


async def test_an_answer_may_come_before_the_request_is_sent() -> None:
    async def script(peer: Peer) -> None:
        await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.sleep(60)

    async with pool_before(script) as (pool, _):
        told = Told()
        post(pool, told, LARGE)
        await told.over()
        assert (told.status, told.body, pool.n_idle) == (413, b"no", 0)
        await until(lambda: pool.n_open == 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\nx: y\n\n",
        CHUNKED + b"zz\r\nok\r\n",
        CHUNKED + b"1\r\nok\r\n",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 099 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_HEAD_BYTES,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4000,
        CHUNKED + b"0\r\n" + b"x: y\r\n" * 20000,
        CHUNKED + b"2;" + b"x" * 2 * MAX_HEAD_BYTES,
    ],
    ids=range(14),
)
@pytest.mark.parametrize("at_once", [1 << 24, 4096])
async def test_what_is_not_http_is_a_protocol_error(answer: bytes, at_once: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(answer, at_once=at_once)
        await peer.until_gone()

    async with pool_before(script) as (pool, _):
        told = await answer_of(pool)
        assert told.failure == ("protocol", True)
        await until(lambda: pool.n_open == 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 20",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
        CHUNKED,
        CHUNKED + b"2\r\nok\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\n",
    ],
    ids=range(8),
)
@pytest.mark.parametrize("is_reset", [False, True])
async def test_an_answer_that_breaks_off_is_a_reset(answer: bytes, is_reset: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(answer)
        if is_reset:
            peer.reset()

    async with pool_before(script) as (pool, _):
        told = await answer_of(pool)
        assert (told.failure, "end" in told.events) == (("reset", True), False)
        await until(lambda: pool.n_open == 0)


async def test_a_body_without_length_that_is_reset_has_not_ended() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\n\r\nsome")
        await heard.is_told.wait()
        peer.reset()

    heard = Heard()
    async with pool_before(script) as (pool, _):
        post(pool, heard)
        assert (await heard.over()).failure == ("reset", True)


class Heard(Told):
    """Sets `is_told` with the first of the body."""

    def __init__(self) -> None:
        self.is_told = asyncio.Event()
        super().__init__(body=self.is_told.set)


# Connections that die while idle.


async def test_a_connection_that_the_engine_closed_is_not_used() -> None:
    async with pool_before(saying(OK)) as (pool, engine):
        await answer_of(pool)
        await until(lambda: pool.n_open == 0)
        assert (await answer_of(pool)).body == b"ok"
        assert len(engine.peers) == 2


async def test_a_connection_closed_at_the_moment_of_its_use_is_stale() -> None:
    async with pool_before(repeating(OK)) as (pool, engine):
        await answer_of(pool)
        engine.peers[0].hang_up()
        told = Told()
        post(pool, told)  # Before the loop has seen the end of the stream.
        assert ((await told.over()).failure, told.events) == (("stale", True), ["failure"])
        assert (await answer_of(pool)).body == b"ok"


@pytest.mark.parametrize(("said", "reason"), [(b"", "stale"), (b"H", "reset"), (b"HTTP/1.1 100 C\r\n\r\n", "reset")])
async def test_only_a_connection_that_has_said_nothing_is_stale(said: bytes, reason: Reason) -> None:
    async with pool_before(saying(OK, said)) as (pool, _):
        await answer_of(pool)
        assert (await answer_of(pool)).failure == (reason, True)


async def test_a_stale_request_may_be_sent_again_at_once() -> None:
    async with pool_before(saying(OK, b"")) as (pool, engine):
        again = Told()
        await answer_of(pool)
        post(pool, Told(failure=lambda: post(pool, again)))
        assert (await again.over()).body == b"ok"
        assert [len(peer.requests) for peer in engine.peers] == [2, 1]


async def test_idle_connections_expire_when_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_before(repeating(OK), idle_s=60.0) as (pool, engine):
        await answer_of(pool)
        now_s = time.monotonic()
        monkeypatch.setattr("serving.connections.monotonic", lambda: now_s + 61)
        await answer_of(pool)
        await until(lambda: pool.n_open == 1)
        assert len(engine.peers) == 2


async def test_idle_connections_expire_when_nobody_looks() -> None:
    async with pool_before(repeating(OK), idle_s=0.05) as (pool, _):
        await answer_of(pool)
        await until(lambda: pool.n_open == 0)
        assert pool.n_idle == 0


async def test_the_connection_used_last_is_used_first_and_few_are_kept() -> None:
    async with pool_before(repeating(OK), max_idle=2) as (pool, engine):
        answers = [Told() for _ in range(5)]
        for told in answers:
            post(pool, told)
        for told in answers:
            await told.over()
        await until(lambda: (pool.n_open, pool.n_idle) == (2, 2))
        for _ in range(10):
            await answer_of(pool)
        assert sorted(len(peer.requests) for peer in engine.peers) == [1, 1, 1, 1, 11]


# Connections that are not made.


@asynccontextmanager
async def deaf_port() -> AsyncIterator[int]:
    """A port that lets a connection neither in nor down: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        try:
            await asyncio.sleep(0.02)
            yield listener.getsockname()[1]
        finally:
            for each in waiting:
                each.close()


async def test_a_refused_connection() -> None:
    pool = EnginePool(f"http://127.0.0.1:{free_port()}", connect_s=10.0)
    assert (await answer_of(pool)).failure == ("connect", False)
    await pool.close()


async def test_a_connection_that_does_not_come_in_time() -> None:
    async with deaf_port() as port:
        pool = EnginePool(f"http://127.0.0.1:{port}", connect_s=0.1)
        assert (await answer_of(pool)).failure == ("connect_timeout", False)
        assert pool.n_open == 0
        await pool.close()


async def test_an_engine_that_does_not_speak_tls() -> None:
    async with raw_engine(saying(OK)) as engine:
        pool = EnginePool(f"https://127.0.0.1:{engine.port}", connect_s=10.0)
        said = asyncio.create_task(answer_of(pool))
        await until(lambda: engine.peers)
        await engine.peers[0].say(b"HTTP/1.1 400 Bad\r\n\r\n")
        assert (await said).failure == ("connect", False)
        await pool.close()


# Aborting.


async def test_abort_while_connecting() -> None:
    async with deaf_port() as port:
        pool = EnginePool(f"http://127.0.0.1:{port}", connect_s=60.0)
        n_tasks = len(asyncio.all_tasks())
        told = Told()
        sent = [post(pool, told) for _ in range(3)]
        sent[0].abort()  # Before its task has run at all.
        await asyncio.sleep(0.02)
        for each in sent:
            each.abort()
            each.abort()
        await until(lambda: (len(asyncio.all_tasks()), pool.n_open) == (n_tasks, 0))
        await a_moment()
        assert told.events == []
        await pool.close()


@pytest.mark.parametrize("n_turns", range(13))
async def test_abort_at_any_turn_of_the_loop(n_turns: int) -> None:
    async with pool_before(repeating(OK)) as (pool, _):
        told = Told()
        sent = post(pool, told)
        for _ in range(n_turns):
            await asyncio.sleep(0)
        so_far = list(told.events)
        sent.abort()
        await until(lambda: pool.n_open == pool.n_idle)
        await a_moment()
        assert told.events == so_far
        assert (await answer_of(pool)).body == b"ok"


@pytest.mark.parametrize("n_turns", range(6))
async def test_an_aborted_connection_leaves_nothing_for_the_collector(n_turns: int) -> None:
    gc.collect()
    gc.disable()
    of_tests_before = connections_in_memory()  # Held here, so that their number stays what it is.
    try:
        async with pool_before(repeating(OK)) as (pool, _):
            sent = post(pool, Told())
            for _turn in range(n_turns):
                await asyncio.sleep(0)
            sent.abort()
            del sent
            await until(lambda: pool.n_open == pool.n_idle == len(connections_in_memory()) - len(of_tests_before))
    finally:
        gc.enable()


def connections_in_memory() -> list[_Connection]:
    return [each for each in gc.get_objects() if type(each) is _Connection]


async def test_abort_before_the_head() -> None:
    async with pool_before(silent) as (pool, engine):
        told = Told()
        sent = post(pool, told)
        await until(lambda: engine.peers and engine.peers[0].requests)
        sent.abort()
        await until(engine.peers[0].is_gone.is_set)
        await until(lambda: pool.n_open == 0)
        assert told.events == []


@pytest.mark.parametrize("answer", [OK, CHUNKED + b"2\r\nok\r\n", b"HTTP/1.1 200 OK\r\n\r\nok"])
@pytest.mark.parametrize("event", ["head", "body"])
async def test_abort_inside_a_callback(event: str, answer: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(answer)
        await peer.until_gone()

    async with pool_before(script) as (pool, engine):
        told = Told()
        told.inside[event] = told.abort
        post(pool, told)
        await until(lambda: event in told.events)
        await until(engine.peers[0].is_gone.is_set)
        await until(lambda: pool.n_open == 0)
        assert told.events == ["head", "body"][: ["head", "body"].index(event) + 1]


async def test_abort_inside_the_failure_changes_nothing() -> None:
    async with pool_before(saying(b"")) as (pool, _):
        told = Told()
        told.inside["failure"] = told.abort
        post(pool, told)
        assert (await told.over()).failure == ("reset", True)


async def test_nothing_touches_a_connection_that_now_answers_another() -> None:
    async with pool_before(saying(OK, OK + b"")) as (pool, engine):
        first, second = Told(), Told()
        sent = post(pool, first)
        await first.over()
        post(pool, second)
        for each in (sent.abort, sent.pause, sent.resume, sent.pause):
            each()
        assert (await second.over()).body == b"ok"
        assert len(engine.peers) == 1


async def test_a_large_request_to_an_engine_that_does_not_read_is_held_once_and_can_be_aborted() -> None:
    async with pool_before(unreading) as (pool, engine):
        told = Told()
        sent = post(pool, told, LARGE)
        await until(lambda: engine.peers and sent.connection)
        await a_moment()
        assert (pool.n_open, sent.connection is not None) == (1, True)
        assert sent.connection is not None
        assert 0 < sent.connection._transport.get_write_buffer_size() <= len(LARGE) + 1000
        sent.abort()
        await until(lambda: pool.n_open == 0)
        assert told.events == []


async def test_an_engine_that_hangs_up_on_a_large_request_is_a_reset() -> None:
    async def script(peer: Peer) -> None:
        await is_on_its_way.wait()
        peer.hang_up()

    is_on_its_way = asyncio.Event()
    async with pool_before(script) as (pool, engine):
        told = Told()
        post(pool, told, LARGE)
        await until(lambda: engine.peers and pool.n_open == 1)
        is_on_its_way.set()
        assert (await told.over()).failure == ("reset", True)
        await until(lambda: pool.n_open == 0)


# Pausing.


async def test_a_paused_answer_stays_with_the_engine() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(LARGE))
        await peer.say(LARGE)
        await peer.request()
        await peer.say(OK)

    async with pool_before(script) as (pool, engine):
        told = Told()
        told.inside["head"] = told.pause
        sent = post(pool, told)
        await until(lambda: told.status)
        n_first = len(told.body)
        await a_moment()
        assert (len(told.body), told.is_over.is_set()) == (n_first, False)
        sent.resume()
        assert (await told.over()).body == LARGE
        assert (await answer_of(pool)).body == b"ok"
        assert len(engine.peers) == 1


async def test_a_pause_before_the_connection_is_there_holds() -> None:
    has_answered = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        has_answered.set()
        await peer.until_gone()

    async with pool_before(script) as (pool, _):
        told = Told()
        sent = post(pool, told)
        sent.pause()
        await has_answered.wait()
        await a_moment()
        assert told.events == []
        sent.resume()
        assert (await told.over()).body == b"ok"


async def test_a_connection_paused_at_its_end_can_be_used_again() -> None:
    async with pool_before(repeating(OK)) as (pool, engine):
        told = Told()
        told.inside["body"] = told.pause
        post(pool, told)
        await told.over()
        assert (await answer_of(pool)).body == b"ok"
        assert len(engine.peers) == 1


async def test_pausing_and_resuming_twice_is_once() -> None:
    async with pool_before(silent) as (pool, engine):
        sent = post(pool, Told())
        await until(lambda: engine.peers and engine.peers[0].requests)
        for each in (
            sent.resume,
            sent.pause,
            sent.pause,
            sent.resume,
            sent.resume,
            sent.pause,
            sent.abort,
            sent.resume,
        ):
            each()
        await until(lambda: pool.n_open == 0)


# Callbacks that send, or raise.


async def test_the_end_may_send_the_next_request_on_the_same_connection() -> None:
    async with pool_before(repeating(OK)) as (pool, engine):
        last = Told()
        first = last
        for _ in range(20):
            first = Told(end=partial(post, pool, first))
        post(pool, first)
        assert (await last.over()).body == b"ok"
        assert [len(peer.requests) for peer in engine.peers] == [21]


class Boom(Exception):
    pass


def boom() -> None:
    raise Boom


@pytest.mark.parametrize(
    ("event", "events", "n_kept"),
    [("head", ["head", "failure"], 0), ("body", ["head", "body", "failure"], 0), ("end", ["head", "body", "end"], 1)],
)
async def test_a_callback_that_raises_hurts_nobody_else(event: str, events: list[str], n_kept: int) -> None:
    async with pool_before(repeating(OK)) as (pool, _):
        told = Told(**{event: boom})
        post(pool, told)
        assert (await told.over()).events == events
        await until(lambda: (pool.n_open, pool.n_idle) == (n_kept, n_kept))
        assert (await answer_of(pool)).body == b"ok"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 2", OK])
async def test_a_failure_that_raises_hurts_nobody_else(answer: bytes) -> None:
    async with pool_before(saying(answer)) as (pool, _):
        told = Told(head=boom, failure=boom)
        post(pool, told)
        assert (await told.over()).failure == ("reset", True)
        await until(lambda: pool.n_open == 0)
        await a_moment()
        assert told.events[-1] == "failure"


# Whose answer it is.


async def echo_with_jitter(peer: Peer) -> None:
    """The request's body back, in one of many ways, sometimes after a moment, sometimes not to the end."""
    rng = random.Random(len(peer.requests))
    while True:
        nonce = (await peer.request()).partition(b"\r\n\r\n")[2]
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.004)
        kind = rng.random()
        if kind < 0.03:
            return
        if kind < 0.4:
            await peer.say(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(nonce), nonce), at_once=rng.choice([9, 30, 999]))
        elif kind < 0.45:
            await peer.say(b"HTTP/1.1 200 OK\r\n\r\n" + nonce)
            return
        else:
            await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(nonce) + nonce)


class Fickle(Told):
    """Wants no more as soon as there is something."""

    def __init__(self) -> None:
        super().__init__(head=self.abort)


async def test_no_answer_ever_carries_anothers_bytes() -> None:
    rng = random.Random(7)
    answers: list[tuple[bytes, Told]] = []

    async def client(number: int) -> None:
        for turn in range(80):
            nonce = b"<%d/%d>" % (number, turn)
            told = Fickle() if rng.random() < 0.1 else Told()
            answers.append((nonce, told))
            sent = post(pool, told, nonce)
            if rng.random() < 0.4:
                await asyncio.sleep(rng.random() * 0.004)
                sent.abort()
            elif not isinstance(told, Fickle):
                await told.over()

    async with pool_before(echo_with_jitter) as (pool, engine):
        await asyncio.gather(*(client(number) for number in range(40)))
        await until(lambda: pool.n_open == pool.n_idle)
        assert all(nonce.startswith(told.body) for nonce, told in answers)
        whole = [(nonce, told) for nonce, told in answers if "end" in told.events]
        assert all(told.body == nonce for nonce, told in whole)
        assert len(whole) > 800
        assert len(engine.peers) < len(answers)
        failures = {told.failure for _, told in answers if told.failure}
        assert failures <= {("stale", True), ("reset", True)}


# What the engine is sent, and where it is.


async def test_the_request_as_the_engine_sees_it() -> None:
    async with pool_before(repeating(OK)) as (pool, engine):
        await answer_of(pool)
        told = Told()
        pool.get(b"/health", told)
        await told.over()
        host = b"host: 127.0.0.1:%d\r\naccept-encoding: identity\r\n" % engine.port
        assert engine.peers[0].requests == [
            b"POST /v1/chat/completions HTTP/1.1\r\n" + host + b"content-type: application/json\r\n"
            b"content-length: 2\r\nx-request-id: 7\r\n\r\n{}",
            b"GET /health HTTP/1.1\r\n" + host + b"\r\n",
        ]


async def test_the_path_of_the_url_comes_first() -> None:
    async with raw_engine(repeating(OK)) as engine:
        pool = EnginePool(f"{engine.url}/team%20a/", connect_s=10.0)
        await answer_of(pool)
        assert engine.peers[0].requests[0].startswith(b"POST /team%20a/v1/chat/completions HTTP/1.1\r\n")
        await pool.close()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
async def test_an_ipv6_address() -> None:
    async with raw_engine(repeating(OK), host="::1") as engine:
        pool = EnginePool(f"http://[::1]:{engine.port}", connect_s=10.0)
        assert (await answer_of(pool)).body == b"ok"
        assert b"\r\nhost: [::1]:%d\r\n" % engine.port in engine.peers[0].requests[0]
        await pool.close()


async def test_a_name_is_looked_up_for_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(asyncio.get_running_loop(), uvloop.Loop):
        pytest.skip("uvloop looks names up where no test can see it")
    looked_up: list[object] = []
    look_up = socket.getaddrinfo

    def watched(host: str, *args: object, **kwargs: object) -> object:
        looked_up.append(host)
        return look_up("127.0.0.1", *args, **kwargs)  # type: ignore[arg-type]

    async with raw_engine(saying(OK)) as engine:
        monkeypatch.setattr(socket, "getaddrinfo", watched)
        pool = EnginePool(f"http://engine.test:{engine.port}", connect_s=10.0)
        for n in (1, 2):
            assert (await answer_of(pool)).body == b"ok"
            await until(lambda: pool.n_open == 0)
            assert looked_up == ["engine.test"] * n
        await pool.close()


async def test_a_dead_engine_is_noticed_and_small_writes_are_not_held_back() -> None:
    async with pool_before(silent) as (pool, _):
        sent = post(pool, Told())
        await until(lambda: sent.connection)
        assert sent.connection is not None
        connected = sent.connection._transport.get_extra_info("socket")
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its own certificate, for localhost, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    what = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(["openssl", *what, *names, "-keyout", both, "-out", both], check=True, capture_output=True)
    return both


async def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    answers = (OK, CHUNKED + b"2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nok")
    async with raw_engine(saying(*answers), tls=tls) as engine:
        stranger = EnginePool(f"https://127.0.0.1:{engine.port}", connect_s=10.0)
        assert (await answer_of(stranger)).failure == ("connect", False)
        await stranger.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        pool = EnginePool(f"https://127.0.0.1:{engine.port}", connect_s=10.0)
        assert [(await answer_of(pool)).body for _ in answers] == [b"ok"] * 3
        await until(lambda: pool.n_open == 0)
        told = Told()
        told.inside["head"] = told.abort
        post(pool, told)
        await until(lambda: told.status and pool.n_open == 0)
        assert told.events == ["head"]
        await pool.close()


@pytest.mark.parametrize(
    "url", ["ftp://h", "h:80", "http://", "http://u:p@h", "http://h/?q", "http://h/#f", "http://h/a b", "http://h:no"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        EnginePool(url, connect_s=1.0)


@pytest.mark.parametrize(
    ("url", "port", "authority"),
    [
        ("http://h", 80, "h"),
        ("https://h", 443, "h"),
        ("http://h:8000/", 8000, "h:8000"),
        ("https://[::1]", 443, "[::1]"),
    ],
)
def test_an_address(url: str, port: int, authority: str) -> None:
    address = parse_address(url)
    assert (address.port, address.authority, address.prefix) == (port, authority, "")


# Closing.


async def test_close_tells_whoever_waits() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        await silent(peer)

    async with pool_before(script) as (pool, _):
        await answer_of(pool)
        running, following = Told(failure=lambda: post(pool, following)), Told()
        post(pool, running)
        await a_moment()
        connecting = Told()
        post(pool, connecting)
        await pool.close()
        assert (running.failure, connecting.failure) == (("reset", True), ("connect", False))
        assert pool.n_open == 0
        assert (await following.over()).failure == ("connect", False)
        assert (await answer_of(pool)).failure == ("connect", False)
