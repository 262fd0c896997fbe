"""The limits of a key's users at a running gateway: who runs too much is refused, and places come back in any case."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx2
import orjson
import pytest

from pawl.api_keys import KeyLimits
from pawl.settings import Settings
from serving.database_limits import DatabaseLimiter
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.faulty_engine import (
    STREAM_HEAD,
    Asked,
    FaultyEngine,
    answer_well,
    chunk,
    event,
    faulty_engine,
    whole,
)
from tests.serving.keyed import add_key, bearer
from tests.serving.raw_server import connected, request
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.waiting import eventually

Fault = Callable[[Asked], Any]


class Scene(NamedTuple):
    """A gateway whose key lets each user run one request at a time, and the engine behind it."""

    served: Served
    engine: FaultyEngine
    key: str

    def asks(self, user: str, body: Any = QUESTION) -> socket.socket:
        """A connection with one whole request on it."""
        host, _, port = self.served.url.removeprefix("http://").partition(":")
        connection = connected((host, int(port)))
        lines = (f"authorization: Bearer {self.key}", f"x-pawl-user: {user}", "connection: close")
        connection.sendall(request(CHAT, orjson.dumps(body), *lines))
        return connection

    def answer(self, user: str) -> httpx2.Response:
        """What this user is answered now."""
        headers = {**bearer(self.key), "x-pawl-user": user}
        return self.served.client.post(CHAT, json=QUESTION, headers=headers)


@pytest.fixture(
    scope="module",
    params=[(True, "memory"), (False, "memory"), (True, "database")],
    ids=["fast lane", "ASGI", "database"],
)
def shared_scene(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Scene]:
    fast_lane, store = request.param
    directory = tmp_path_factory.mktemp("users")
    with faulty_engine(answer_well) as engine:
        settings = Settings.model_validate(
            {
                "database": {"url": f"sqlite:///{directory}/shared.db"},
                "state_dir": str(directory / "state"),
                "auth": {"required": True},
                "serving": {
                    "models": {"assistant": {"engines": [engine.url], "champion": "base-model"}},
                    "fast_lane": fast_lane,
                    "limits": {"store": store},
                    "timeouts": {"first_byte_s": 30.0},
                    "replicas": {"eject_after": 1000, "eject_share": 1.0},
                },
            }
        )
        key = add_key(settings, "infer", limits=KeyLimits(user_concurrency=1, user_tokens_per_day=100_000))
        with serving(settings, FakeVLLM()) as served:
            if isinstance(limiter := served.gateway.limiter, DatabaseLimiter):
                limiter._patience_s = 60.0  # On a loaded machine a slow answer must not be taken for an outage.
            yield Scene(served, engine, key)


@pytest.fixture
def scene(shared_scene: Scene) -> Scene:
    shared_scene.engine.answer = answer_well
    shared_scene.engine.asked.clear()
    return shared_scene


async def silent(asked: Asked) -> None:
    await asked.until_cut()


async def half_a_stream(asked: Asked) -> None:
    await asked.say(STREAM_HEAD + chunk(event("Water")))
    await asked.until_cut()


def once(fault: Fault) -> Fault:
    """Answer the next request so, and those after it well."""
    left = [fault]

    async def answer(asked: Asked) -> None:
        await (left.pop() if left else answer_well)(asked)

    return answer


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(("body", "fault"), [(QUESTION, silent), (STREAM, half_a_stream)], ids=["whole", "stream"])
def test_the_place_of_a_user_who_left_comes_back(scene: Scene, body: Any, fault: Fault, how: str) -> None:
    user = f"{how}-{fault.__name__}"
    scene.engine.answer = once(fault)
    connection = scene.asks(user, body)
    eventually(lambda: scene.engine.asked)
    refused = scene.answer(user)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "each user of this API key is limited to 1 concurrent requests" in refused.json()["error"]["message"]
    other = scene.answer(f"not-{user}")
    assert other.status_code == 200, other.text
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    eventually(lambda: scene.answer(user).status_code == 200)


async def cut_before_the_head(_: Asked) -> None:
    raise ConnectionError


async def cut_in_the_stream(asked: Asked) -> None:
    await asked.say(STREAM_HEAD + chunk(event("Water")))
    raise ConnectionError


async def fail(asked: Asked) -> None:
    await asked.say(whole(b'{"error": {"message": "no"}}').replace(b"200 OK", b"500 Broken", 1))


async def nonsense(asked: Asked) -> None:
    await asked.say(b"\0\0\0\0")
    raise ConnectionError


@pytest.mark.parametrize("fault", [cut_before_the_head, cut_in_the_stream, fail, nonsense])
def test_the_place_of_a_user_whose_engine_fails_comes_back(scene: Scene, fault: Fault) -> None:
    user = fault.__name__
    for body in (QUESTION, STREAM):
        scene.engine.answer = fault
        connection = scene.asks(user, body)
        while connection.recv(4096):
            pass
        connection.close()
        scene.engine.answer = answer_well
        eventually(lambda: scene.answer(user).status_code == 200)


@pytest.mark.parametrize("body", [{"model": "nobody", "messages": QUESTION["messages"]}, {"model": "assistant"}])
def test_a_request_that_is_wrong_takes_no_place(scene: Scene, body: Any) -> None:
    headers = {**bearer(scene.key), "x-pawl-user": "wrong"}
    for _ in range(3):
        assert scene.served.client.post(CHAT, json=body, headers=headers).status_code in (400, 404)
    eventually(lambda: scene.answer("wrong").status_code == 200)


def test_the_headers_tell_of_the_users_budget(scene: Scene) -> None:
    answer = scene.answer("rich")
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
    assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
