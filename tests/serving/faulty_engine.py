"""An engine on a thread of its own whose every byte a test writes, and what a gateway must look like after a fault."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from feedback.journal_drain import JournalDrain
from pawl.clock import now as wall_clock
from pawl.database import Database, open_database
from pawl.schema import interactions
from pawl.settings import DatabaseSettings
from serving.gateway import Gateway
from serving.replicas import all_replicas
from tests.serving.raw_engine import Peer, raw_engine
from tests.serving.waiting import eventually

MODELS = orjson.dumps({"object": "list", "data": [{"id": "base-model", "object": "model"}]})
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"


class Asked:
    """One completion that the engine has been asked for."""

    def __init__(self, peer: Peer, request: bytes) -> None:
        self.peer = peer
        self.head, _, raw = request.partition(b"\r\n\r\n")
        self.body: dict[str, Any] = orjson.loads(raw)
        self.is_cut = threading.Event()
        """The gateway has closed the connection."""

    @property
    def question(self) -> str:
        """What the first message says."""
        return str(self.body["messages"][0]["content"])

    async def say(self, data: bytes) -> None:
        """Write."""
        await self.peer.say(data)

    async def until_cut(self) -> None:
        """Stay silent until the gateway closes the connection."""
        await self.peer.until_gone()
        self.is_cut.set()


Answer = Callable[[Asked], Awaitable[None]]


class FaultyEngine:
    """Answers health checks, and every completion by `answer`, which a test may replace at any time."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.url = ""

    async def serve(self, peer: Peer) -> None:
        """One connection."""
        while True:
            request = await peer.request()
            if request.startswith(b"GET"):
                await peer.say(whole(MODELS))
                continue
            asked = Asked(peer, request)
            self.asked.append(asked)
            try:
                await self.answer(asked)
            except ConnectionError:
                asked.is_cut.set()
                return


@contextmanager
def faulty_engine(answer: Answer) -> Iterator[FaultyEngine]:
    """Serve it on a free port, on a thread of its own."""
    engine = FaultyEngine(answer)
    is_over, is_up = threading.Event(), threading.Event()

    async def run() -> None:
        async with raw_engine(engine.serve) as server:
            engine.url = server.url
            is_up.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert is_up.wait(20)
    try:
        yield engine
    finally:
        is_over.set()
        thread.join(20)


def whole(body: bytes, *lines: str) -> bytes:
    """A complete answer."""
    head = ["HTTP/1.1 200 OK", "content-type: application/json", f"content-length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def completion(text: str) -> bytes:
    """The body of a whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    return orjson.dumps({"id": "chatcmpl-x", "model": "base-model", "choices": [choice], "usage": usage})


def event(text: str, finish_reason: str | None = None) -> bytes:
    """One chunk of a stream's text."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return b"data: " + orjson.dumps({"id": "chatcmpl-x", "model": "base-model", "choices": [choice]}) + b"\n\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def streamed(*texts: str) -> bytes:
    """A complete stream that says these texts."""
    events = [event(text) for text in texts] + [event("", "stop"), DONE]
    return STREAM_HEAD + b"".join(chunk(each) for each in events) + LAST_CHUNK


async def answer_well(asked: Asked) -> None:
    """What an engine without faults does: it says the question again."""
    text = asked.question
    await asked.say(streamed(text) if asked.body.get("stream") else whole(completion(text)))


def tasks_of(gateway: Gateway) -> int:
    """How many tasks the gateway's loop has at the moment."""
    loop = gateway.records.journal._loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(_n_tasks(), loop).result(20)


async def _n_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


def held_by(gateway: Gateway) -> dict[str, int]:
    """Everything that a request takes and must give back."""
    replicas = all_replicas(gateway.replicas.values())
    admissions = gateway.relay._in_flight.admissions
    return {
        "calls": len(gateway.relay.calls),
        "in flight": gateway.relay._in_flight.n_entered,
        "places": sum(admission.gate.n_inside for admission in admissions),
        "waiting": sum(len(admission.gate.line) for admission in admissions),
        "running": sum(abs(replica.n_running) for replica in replicas),
        "busy connections": sum(pool.n_open - pool.n_idle for pool in gateway.pools),
        "opening connections": sum(len(pool._opening) for pool in gateway.pools),
    }


def drain_the_rest(spool: Path, database: Database) -> None:
    """Bring over what a gateway's own drain had no time for before it was stopped; no record may be missing then."""
    drain = JournalDrain(spool, database, clock=wall_clock)
    while drain.drain_once():
        pass
    drain.stop(0)


def stored_ids(url: str, spool: Path | None = None) -> list[str]:
    """The completions that the database has; with those that a stopped gateway left in its spool, if that is named."""
    database = open_database(DatabaseSettings(url=url))
    try:
        if spool is not None:
            drain_the_rest(spool, database)
        with database.read() as connection:
            return list(connection.execute(sa.select(interactions.c.completion_id)).scalars())
    finally:
        database.close()


def await_base(gateway: Gateway, n_tasks: int) -> None:
    """Wait until nothing of any request is left; a health check may be under way at any moment, but not always."""

    def is_at_base() -> bool:
        return not any(held_by(gateway).values()) and tasks_of(gateway) <= n_tasks

    try:
        eventually(is_at_base)
    except AssertionError as exc:
        raise AssertionError(f"left over: {held_by(gateway)}, {tasks_of(gateway)} tasks for {n_tasks}") from exc
