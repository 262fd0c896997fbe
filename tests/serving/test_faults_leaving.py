"""Clients that leave, at every moment of a request: the engine stops, one record or none, and nothing stays behind."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from feedback import segment_writer
from feedback.interactions import Interaction, Status
from feedback.segment_files import write_durably
from feedback.store import get_interaction
from pawl.settings import Settings
from serving.errors import Overloaded
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import settings_of
from tests.serving.conftest import Served, serving
from tests.serving.faulty_engine import (
    STREAM_HEAD,
    Asked,
    FaultyEngine,
    answer_well,
    await_base,
    chunk,
    event,
    faulty_engine,
    tasks_of,
    whole,
)
from tests.serving.raw_server import connected, request
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
STOPS_WITHIN_S = 1.0
SLACK_S = 15.0
"""For a machine that is busy with something else; a client that is not noticed costs a minute."""
LANES = pytest.mark.parametrize("fast_lane", [True, False], ids=["fast lane", "ASGI"])


@dataclass(frozen=True)
class Scene:
    """A gateway, an engine under the test's hand, and what the gateway held before."""

    served: Served
    engine: FaultyEngine
    n_tasks: int

    def asks(self, body: Any = QUESTION) -> socket.socket:
        """A connection with one whole request on it."""
        connection = connected(self.served.address)
        connection.sendall(request(CHAT, orjson.dumps(body)))
        return connection

    def kept(self, asked: Asked) -> Interaction:
        """The record of what the engine was asked."""
        suffix = asked.head.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
        return eventually(lambda: get_interaction(self.served.gateway.database, suffix))

    def n_kept(self) -> int:
        """Records that were ever written."""
        return self.served.gateway.records.journal.kept_seq


@pytest.fixture(scope="module", params=[True, False], ids=["fast lane", "ASGI"])
def shared_scene(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("leaving")
    with faulty_engine(answer_well) as engine:
        settings = settings_of(
            directory, engine.url, fast_lane=request.param, max_in_flight=1, queue={"max_wait_s": 60.0}
        )
        with serving(settings, FakeVLLM()) as served:
            assert served.client.post(CHAT, json=QUESTION).status_code == 200
            served.client.close()
            time.sleep(0.1)
            yield Scene(served, engine, tasks_of(served.gateway) + 1)  # A health check may be among them, or not.


@pytest.fixture
def scene(shared_scene: Scene) -> Iterator[Scene]:
    shared_scene.engine.answer = answer_well
    shared_scene.engine.asked.clear()
    yield shared_scene
    await_base(shared_scene.served.gateway, shared_scene.n_tasks)


async def silent(asked: Asked) -> None:
    await asked.until_cut()


async def head_only(asked: Asked) -> None:
    await asked.say(STREAM_HEAD)
    await asked.until_cut()


async def half_a_body(asked: Asked) -> None:
    await asked.say(whole(b"{}" * 100)[:-50])
    await asked.until_cut()


async def half_a_stream(asked: Asked) -> None:
    await asked.say(STREAM_HEAD + chunk(event("Water")) + chunk(event(" it")))
    await asked.until_cut()


async def endless(asked: Asked) -> None:
    """More than any buffer on the way takes, so that the client stands still."""
    await asked.say(STREAM_HEAD)
    while True:
        await asked.say(chunk(event("x" * 60_000)))


def leave(connection: socket.socket, how: str) -> None:
    """By a FIN or an RST."""
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    ("body", "answer", "said"),
    [
        (QUESTION, silent, b""),
        (STREAM, silent, b""),
        (STREAM, head_only, b""),
        (QUESTION, half_a_body, b""),
        (STREAM, half_a_stream, b"it"),
        (STREAM, endless, b"xxx"),
    ],
    ids=[
        "whole, before the head",
        "stream, before the head",
        "after the head",
        "mid-body",
        "mid-stream",
        "not reading",
    ],
)
def test_the_engine_stops_and_there_is_one_record(
    scene: Scene, body: Any, answer: Callable[[Asked], Any], said: bytes, how: str
) -> None:
    scene.engine.answer = answer
    before = scene.n_kept()
    connection = scene.asks(body)
    asked = eventually(lambda: scene.engine.asked[-1] if scene.engine.asked else None)
    received = b""
    while said not in received:
        received += connection.recv(4096)
    left_at = time.monotonic()
    leave(connection, how)
    assert asked.is_cut.wait(20)
    assert time.monotonic() - left_at < STOPS_WITHIN_S + SLACK_S
    kept = scene.kept(asked)
    assert (kept.status, kept.is_complete) == (Status.CLIENT_DISCONNECTED, False)
    await_base(scene.served.gateway, scene.n_tasks)
    assert (scene.n_kept() - before, len(scene.engine.asked)) == (1, 1)


@pytest.mark.parametrize("n_missing", [1, len(orjson.dumps(QUESTION))])
def test_before_the_body_is_complete_nobody_is_asked(scene: Scene, n_missing: int) -> None:
    before = scene.n_kept()
    with connected(scene.served.address) as connection:
        connection.sendall(request(CHAT, orjson.dumps(QUESTION))[:-n_missing])
        time.sleep(0.05)
    await_base(scene.served.gateway, scene.n_tasks)
    with scene.asks() as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200"), "the gateway goes on"
    assert (scene.n_kept() - before, len(scene.engine.asked)) == (1, 1)


def test_in_the_queue_only_the_place_is_given_up(scene: Scene) -> None:
    scene.engine.answer = silent
    first = scene.asks()
    eventually(lambda: scene.engine.asked)
    waiting = [scene.asks({**QUESTION, "user": str(number)}) for number in range(3)]
    line = scene.served.gateway.relay._in_flight.admissions[0].gate.line
    eventually(lambda: len(line) == 3)
    before = scene.n_kept()
    for connection in waiting:
        connection.close()
    eventually(lambda: len(line) == 0)
    first.close()
    assert scene.engine.asked[0].is_cut.wait(20)
    await_base(scene.served.gateway, scene.n_tasks)
    assert (scene.n_kept() - before, len(scene.engine.asked)) == (1, 1)


def test_between_the_engines_last_byte_and_the_disk_the_record_says_that_it_was_answered(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, is_writing = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        is_writing.set()
        assert may_write.wait(20)
        write_durably(*arguments)

    before = scene.n_kept()
    with monkeypatch.context() as patch:
        patch.setattr(segment_writer, "write_durably", slowly)
        for body in (QUESTION, STREAM):
            connection = scene.asks(body)
            assert is_writing.wait(20)
            connection.close()
            eventually(lambda: all(call.client is None for call in list(scene.served.gateway.relay.calls.values())))
            may_write.set()
            await_base(scene.served.gateway, scene.n_tasks)
            may_write.clear()
            is_writing.clear()
        may_write.set()
    assert {scene.kept(asked).status for asked in scene.engine.asked} == {Status.OK}
    assert (scene.n_kept() - before, len(scene.engine.asked)) == (2, 2)


@LANES
@pytest.mark.parametrize("answer", ["never", "refused"])
def test_while_the_key_is_looked_up_nothing_is_kept(
    make_settings: MakeSettings, fast_lane: bool, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_engine(answer_well) as engine:
        model = {"engines": [engine.url]}
        settings = make_settings(model=model, fast_lane=fast_lane)
        settings = settings.model_copy(update={"auth": settings.auth.model_copy(update={"required": True})})
        with serving(settings, FakeVLLM()) as served:
            n_tasks = tasks_of(served.gateway) + 1
            scene = Scene(served, engine, n_tasks)
            is_asked, may_answer = threading.Event(), threading.Event()

            async def look_up(_: str) -> Any:
                is_asked.set()
                if answer == "never":
                    await asyncio.Event().wait()
                await asyncio.to_thread(may_answer.wait, 20)
                raise Overloaded("nobody can say", code="keys_unavailable")

            monkeypatch.setattr(served.gateway.keys, "look_up", look_up)
            connection = connected(served.address)
            connection.sendall(request(CHAT, orjson.dumps(QUESTION), "authorization: Bearer pawl-x"))
            assert is_asked.wait(20)
            connection.close()
            eventually(lambda: not served.gateway.relay.calls)
            may_answer.set()
            await_base(served.gateway, n_tasks)
            assert (scene.n_kept(), engine.asked) == (0, [])
