"""Clients that leave at random by the hundred: nobody gets, and no record holds, anything of another request.

The short form of `bench/cancellations.py`.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import orjson
import pytest
import sqlalchemy as sa

from feedback.interactions import Status
from pawl.schema import interactions
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import serving
from tests.serving.faulty_engine import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    await_base,
    chunk,
    completion,
    event,
    faulty_engine,
    tasks_of,
    whole,
)
from tests.serving.raw_server import request
from tests.serving.talk import CHAT
from tests.serving.test_faults_leaving import LANES
from tests.serving.waiting import eventually

N_CANCELLED = 1_000
N_CLIENTS = 48
AT_ONCE = 24
"""Of the clients; the others wait in the gateway's queue."""
NONCE = re.compile(rb"nonce-\d+-")
PATIENCE_S = 60.0


async def echo(asked: Asked) -> None:
    """Say the question in every piece of the answer, with pauses in which a client may leave."""
    rng = random.Random(asked.question)
    await asyncio.sleep(rng.uniform(0, 0.01))
    if not asked.body.get("stream"):
        data = whole(completion(asked.question))
        half = rng.randrange(len(data))
        await asked.say(data[:half])
        await asyncio.sleep(rng.uniform(0, 0.005))
        await asked.say(data[half:])
        return
    await asked.say(STREAM_HEAD)
    for _ in range(4):
        await asked.say(chunk(event(asked.question)))
        await asyncio.sleep(rng.uniform(0, 0.005))
    await asked.say(chunk(event("", "stop") + DONE) + LAST_CHUNK)


@dataclass
class Found:
    """What the clients saw."""

    n_cancelled: int = 0
    foreign: list[bytes] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    refused: list[bytes] = field(default_factory=list)


class Client:
    """Asks again and again on one connection; when it leaves it comes back on another."""

    def __init__(self, address: tuple[str, int], number: int, found: Found) -> None:
        self._address = address
        self._number = number
        self._found = found
        self._rng = random.Random(number)
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        turn = 0
        while self._found.n_cancelled < N_CANCELLED:
            turn += 1
            await self._ask(f"nonce-{self._number * 100_000 + turn}-")
        self._leave()

    async def _ask(self, nonce: str) -> None:
        if self._connection is None:
            self._connection = await asyncio.open_connection(*self._address)
        reader, writer = self._connection
        body = {"model": "assistant", "messages": [{"role": "user", "content": nonce}]}
        data = request(CHAT, orjson.dumps(body | {"stream": self._rng.random() < 0.6}))
        answer = bytearray()
        stays = self._rng.random() < 0.1
        try:
            async with asyncio.timeout(PATIENCE_S if stays else self._rng.uniform(0, 0.06)):
                await self._say(writer, data)
                await self._read(reader, answer)
        except TimeoutError:
            assert not stays, "no answer at all"
            self._leave()
            self._found.n_cancelled += 1
        else:
            self._note_whole(nonce, bytes(answer))
        self._found.foreign += [each for each in NONCE.findall(answer) if each != nonce.encode()]

    async def _say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Sometimes in two halves, so that it may leave before the request is complete."""
        half = self._rng.randrange(len(data)) if self._rng.random() < 0.2 else len(data)
        writer.write(data[:half])
        if half < len(data):
            await asyncio.sleep(self._rng.uniform(0, 0.02))
            writer.write(data[half:])

    async def _read(self, reader: asyncio.StreamReader, answer: bytearray) -> None:
        """One answer, its end seen by its framing."""
        head = await reader.readuntil(b"\r\n\r\n")
        answer += head
        length = re.search(rb"content-length: (\d+)", head)
        if length:
            answer += await reader.readexactly(int(length[1]))
            return
        while not answer.endswith(b"\r\n" + LAST_CHUNK):
            part = await reader.read(65536)
            assert part, "cut off"
            answer += part

    def _note_whole(self, nonce: str, answer: bytes) -> None:
        if answer.startswith(b"HTTP/1.1 200") and b'"error"' not in answer:
            assert nonce.encode() in answer
            self._found.answered.add(nonce)
        else:
            self._found.refused.append(answer)

    def _leave(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection[1].transport.abort()
            self._connection = None


async def storm(address: tuple[str, int]) -> Found:
    """All clients, until there have been enough cancellations."""
    found = Found()
    async with asyncio.TaskGroup() as group:
        for number in range(N_CLIENTS):
            group.create_task(Client(address, number, found).run())
    return found


@LANES
def test_nothing_is_mixed_up_and_nothing_is_left(make_settings: Callable[..., Settings], fast_lane: bool) -> None:
    with faulty_engine(echo) as engine:
        settings = make_settings(
            model={"engines": [engine.url]},
            fast_lane=fast_lane,
            max_in_flight=AT_ONCE,
            queue={"max_wait_s": 30.0, "max_waiting": 10_000},
        )
        with serving(settings, FakeVLLM()) as served:
            n_tasks = tasks_of(served.gateway) + 1
            found = asyncio.run(storm(served.address))
            await_base(served.gateway, n_tasks)
            journal = served.gateway.records.journal
            eventually(lambda: journal.size().rows == 0, within_s=60)
            with served.gateway.database.read() as connection:
                rows = connection.execute(sa.select(interactions)).mappings().all()
    assert found.foreign == []
    assert found.refused == []
    asked = [orjson.loads(row["prompt"])[0]["content"] for row in rows]
    assert len(set(asked)) == len(asked)
    assert found.answered <= {nonce for nonce, row in zip(asked, rows, strict=True) if row["is_complete"]}
    for nonce, row in zip(asked, rows, strict=True):
        text = orjson.loads(row["completion"])["content"] if row["completion"] else ""
        assert set(NONCE.findall(text.encode())) <= {nonce.encode()}
        assert row["status"] in (Status.OK, Status.CLIENT_DISCONNECTED)
    n_begun = sum(row["status"] == Status.CLIENT_DISCONNECTED for row in rows)
    assert len(found.answered) > 50
    assert n_begun > 20, "most left while the engine was at work"


def test_the_nonces_are_told_apart() -> None:
    assert NONCE.findall(b"nonce-12-nonce-1-") == [b"nonce-12-", b"nonce-1-"]
    with pytest.raises(AssertionError):
        Client(("", 0), 0, Found())._note_whole("nonce-1-", b"HTTP/1.1 200 OK")
