"""Engines that break, at every byte: the client is told, the record says so, and nothing incomplete looks whole."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import orjson
import pytest
import sqlalchemy as sa

from feedback.interactions import Status
from pawl.schema import interactions
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.servers import free_port
from tests.serving.conftest import Served, serving
from tests.serving.faulty_engine import (
    DONE,
    LAST_CHUNK,
    MODELS,
    STREAM_HEAD,
    Answer,
    Asked,
    FaultyEngine,
    answer_well,
    await_base,
    chunk,
    completion,
    event,
    faulty_engine,
    streamed,
    tasks_of,
    whole,
)
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of, events_of
from tests.serving.test_faults_leaving import LANES
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
TEXT = "Gieß sie früh ☀."
PATIENT = {"eject_after": 10_000, "eject_share": 1.0, "eject_min_requests": 10_000}
"""So that faults one after the other do not put the only replica out."""


@contextmanager
def before(make_settings: MakeSettings, answer: Answer, **settings: Any) -> Iterator[tuple[Served, FaultyEngine]]:
    """A gateway before one engine of this behaviour."""
    with (
        faulty_engine(answer) as engine,
        serving(make_settings(model={"engines": [engine.url]}, **settings), FakeVLLM()) as served,
    ):
        yield served, engine


def stored(served: Served) -> list[Any]:
    """All records in the order of their requests, once they are in the database."""
    eventually(lambda: not served.gateway.relay.calls)
    eventually(lambda: served.gateway.records.journal.size().rows == 0, within_s=60)
    with served.gateway.database.read() as connection:
        return list(connection.execute(sa.select(interactions).order_by(interactions.c.created_at)).mappings())


async def ask_often(url: str, bodies: list[Any]) -> list[httpx2.Response]:
    """Several questions, a few at a time; the answers in their order."""
    turns = asyncio.Semaphore(8)

    async def ask(client: httpx2.AsyncClient, body: Any) -> httpx2.Response:
        async with turns:
            return await client.post(CHAT, json=body)

    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        return await asyncio.gather(*(ask(client, body) for body in bodies))


def cut_at(answer: bytes) -> Answer:
    """Sends as many bytes of the answer as the question says, and closes."""

    async def cut(asked: Asked) -> None:
        await asked.say(answer[: int(asked.question)])
        asked.peer.hang_up()
        await asked.until_cut()

    return cut


def numbered(n: int, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": str(n)}], **more}


@LANES
def test_a_whole_answer_cut_at_any_byte_is_an_error(make_settings: MakeSettings, fast_lane: bool) -> None:
    answer = whole(completion(TEXT))
    with before(make_settings, cut_at(answer), fast_lane=fast_lane, replicas=PATIENT) as (served, _):
        n_tasks = tasks_of(served.gateway) + 8
        bodies = [numbered(n) for n in range(len(answer) + 1)]
        responses = asyncio.run(ask_often(served.url, bodies))
        assert responses[-1].status_code == 200
        assert responses[-1].content == completion(TEXT)
        for response in responses[:-1]:
            assert (response.status_code, error_of(response)["code"]) == (502, "engine_error")
        rows = stored(served)
        kept = {int(orjson.loads(row["prompt"])[0]["content"]): row for row in rows}
        await_base(served.gateway, n_tasks)
    assert len(kept) == len(rows) == len(bodies)
    for n, row in kept.items():
        is_whole = n == len(answer)
        assert (row["is_complete"], row["status"] == Status.OK) == (is_whole, is_whole), n


@LANES
def test_a_stream_cut_at_any_byte_is_never_done(make_settings: MakeSettings, fast_lane: bool) -> None:
    events = [event(TEXT[:8]), event(TEXT[8:]), event("", "stop"), DONE]
    assert TEXT.encode() in event(TEXT), "no escapes: a cut shall also come in the middle of a character"
    answer = STREAM_HEAD + b"".join(chunk(each) for each in events) + LAST_CHUNK
    n_done = answer.index(DONE) + len(DONE)
    with before(make_settings, cut_at(answer), fast_lane=fast_lane, replicas=PATIENT) as (served, _):
        n_tasks = tasks_of(served.gateway) + 8
        bodies = [numbered(n, stream=True) for n in range(len(answer) + 1)]
        responses = asyncio.run(ask_often(served.url, bodies))
        for n, response in enumerate(responses):
            check_cut_stream(response, is_done=n >= n_done)
        rows = stored(served)
        kept = {int(orjson.loads(row["prompt"])[0]["content"]): row for row in rows}
        await_base(served.gateway, n_tasks)
    assert len(kept) == len(rows) == len(bodies)
    for n, row in kept.items():
        assert (row["is_complete"], row["status"] == Status.OK) == (n >= n_done, n >= n_done), n


def check_cut_stream(response: httpx2.Response, *, is_done: bool) -> None:
    """What the client got is whole events, and at the end either `[DONE]` or an error."""
    if response.status_code != 200:
        assert not is_done
        assert (response.status_code, error_of(response)["code"]) == (502, "engine_error")
        return
    events = events_of(response.content)
    assert (events[-1] == b"[DONE]") == is_done
    assert b"[DONE]" not in events[:-1]
    objects = [orjson.loads(each) for each in events if each != b"[DONE]"]
    assert ("error" in objects[-1]) == (not is_done)


ODD_ANSWERS: dict[str, bytes] = {
    "nothing in it": whole(b""),
    "no such status": b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
    "no status line": b"OK 200\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00" * 20,
    "a moved model": b"HTTP/1.1 301 Moved\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 5\r\n\r\n{}",
    "a chunk that is none": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"v" * 1000) for n in range(100)),
    "an empty stream": STREAM_HEAD + LAST_CHUNK,
}


@LANES
@pytest.mark.parametrize("is_stream", [False, True])
def test_odd_answers_are_engine_errors(make_settings: MakeSettings, fast_lane: bool, is_stream: bool) -> None:
    async def odd(asked: Asked) -> None:
        await asked.say(ODD_ANSWERS[asked.question])
        if "endless" not in asked.question:
            await asyncio.sleep(0.05)
            asked.peer.hang_up()
        await asked.until_cut()

    with before(make_settings, odd, fast_lane=fast_lane, replicas=PATIENT) as (served, _):
        for name in ODD_ANSWERS:
            body = {"model": "assistant", "messages": [{"role": "user", "content": name}], "stream": is_stream}
            response = served.client.post(CHAT, json=body)
            assert (response.status_code, error_of(response)["code"]) == (502, "engine_error"), name
        rows = stored(served)
        assert [row["status"] for row in rows] == [Status.UPSTREAM_ERROR] * len(ODD_ANSWERS)
        assert not any(row["is_complete"] for row in rows)


@LANES
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("odd_id", [b'""', b"null", b"17", b'"chatcmpl-of-another"', b'"' + b"x" * 5000 + b'"'])
def test_wrong_ids_of_the_engine_are_passed_on_and_confuse_no_record(
    make_settings: MakeSettings, fast_lane: bool, is_stream: bool, odd_id: bytes
) -> None:
    async def misnamed(asked: Asked) -> None:
        data = streamed(TEXT) if is_stream else completion(TEXT)
        data = data.replace(b'"chatcmpl-x"', odd_id)
        if is_stream:
            pieces = (event(TEXT), event("", "stop"))
            data = b"".join(chunk(each.replace(b'"chatcmpl-x"', odd_id)) for each in pieces) + chunk(DONE) + LAST_CHUNK
        await asked.say(STREAM_HEAD + data if is_stream else whole(data))

    with before(make_settings, misnamed, fast_lane=fast_lane) as (served, engine):
        for _ in range(2):
            response = served.client.post(CHAT, json={**QUESTION, "stream": is_stream})
            assert response.status_code == 200
            assert b'"id":' + odd_id in response.content
        rows = stored(served)
        asked = [each.head.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode() for each in engine.asked]
        assert [row["completion_id"] for row in rows] == [f"chatcmpl-{suffix}" for suffix in asked]
        assert all(row["is_complete"] for row in rows)


@LANES
def test_a_stream_without_an_end_is_ended(make_settings: MakeSettings, fast_lane: bool) -> None:
    async def forever(asked: Asked) -> None:
        await asked.say(STREAM_HEAD)
        while True:
            await asked.say(chunk(event("and ")))
            await asyncio.sleep(0.02)

    timeouts = {"total_s": 2.0}
    with before(make_settings, forever, fast_lane=fast_lane, timeouts=timeouts) as (served, engine):
        events = events_of(served.client.post(CHAT, json=STREAM).content)
        assert orjson.loads(events[-1])["error"]["code"] == "timeout"
        assert b"[DONE]" not in events
        assert engine.asked[0].is_cut.wait(20)
        (row,) = stored(served)
        assert (row["status"], row["is_complete"]) == (Status.UPSTREAM_ERROR, False)


@LANES
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_body_without_an_end_is_ended(make_settings: MakeSettings, fast_lane: bool, is_stream: bool) -> None:
    async def endless(asked: Asked) -> None:
        await asked.say(STREAM_HEAD)
        while True:
            await asked.say(chunk(event("x" * 10_000)))

    with before(make_settings, endless, fast_lane=fast_lane, max_answer_bytes=200_000) as (served, engine):
        response = served.client.post(CHAT, json={**QUESTION, "stream": is_stream})
        if is_stream:
            assert orjson.loads(events_of(response.content)[-1])["error"]["code"] == "engine_error"
        else:
            assert (response.status_code, error_of(response)["code"]) == (502, "engine_error")
        assert len(response.content) <= 200_000 + 100_000
        assert engine.asked[0].is_cut.wait(20)
        (row,) = stored(served)
        assert (row["status"], row["is_complete"]) == (Status.UPSTREAM_ERROR, False)


@LANES
@pytest.mark.parametrize(
    ("said", "is_begun"),
    [(b"", False), (STREAM_HEAD, False), (STREAM_HEAD + chunk(event("Water")), True)],
    ids=["before the head", "after the head", "in mid-stream"],
)
def test_an_engine_that_falls_silent(make_settings: MakeSettings, fast_lane: bool, said: bytes, is_begun: bool) -> None:
    async def silent(asked: Asked) -> None:
        await asked.say(said)
        await asked.until_cut()

    timeouts = {"first_byte_s": 2.0, "between_chunks_s": 2.0}
    with before(make_settings, silent, fast_lane=fast_lane, timeouts=timeouts) as (served, engine):
        response = served.client.post(CHAT, json=STREAM)
        if is_begun:
            events = events_of(response.content)
            assert (len(events), orjson.loads(events[-1])["error"]["code"]) == (2, "timeout")
        else:
            assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        assert engine.asked[0].is_cut.wait(20)
        (row,) = stored(served)
        assert (row["status"], row["is_complete"]) == (Status.UPSTREAM_ERROR, False)


@LANES
def test_a_long_silence_is_bridged_by_comments_that_clients_skip(make_settings: MakeSettings, fast_lane: bool) -> None:
    may_go_on = threading.Event()

    async def slow_prefill(asked: Asked) -> None:
        await asked.say(STREAM_HEAD)
        await asyncio.to_thread(may_go_on.wait, 30)
        await asked.say(streamed(TEXT).removeprefix(STREAM_HEAD))

    with before(make_settings, slow_prefill, fast_lane=fast_lane, stream_keep_alive_s=0.2) as (served, engine):
        with served.client.stream("POST", CHAT, json=STREAM) as response:
            parts = response.iter_raw()
            received = b""
            while received.count(b": keep-alive\n\n") < 2:
                received += next(parts)
            assert b"data:" not in received
            may_go_on.set()
            received += b"".join(parts)
        assert received.endswith(DONE)
        may_go_on.clear()
        threading.Timer(0.7, may_go_on.set).start()
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model="assistant", messages=[{"role": "user", "content": "?"}], stream=True
            )
            assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == TEXT
        rows = stored(served)
        assert [(row["status"], row["is_complete"]) for row in rows] == [(Status.OK, True)] * 2
        assert b"keep-alive" not in orjson.dumps([row["completion"] for row in rows])
        assert len(engine.asked) == 2


@LANES
def test_connections_that_the_engine_closes_while_idle_lose_no_request(
    make_settings: MakeSettings, fast_lane: bool
) -> None:
    """It closes each after one answer without saying so, at the worst moment: when the next request is on its way."""
    seen: dict[int, int] = {}

    async def once_per_connection(asked: Asked) -> None:
        seen[id(asked.peer)] = seen.get(id(asked.peer), 0) + 1
        if seen[id(asked.peer)] > 1:
            asked.peer.hang_up()
            await asked.until_cut()
        else:
            await answer_well(asked)

    with before(make_settings, once_per_connection, fast_lane=fast_lane) as (served, engine):
        for n in range(60):
            response = served.client.post(CHAT, json={**QUESTION, "stream": n % 2 == 0})
            assert response.status_code == 200, n
            assert b"roses" in response.content
        assert len(engine.asked) > 60, "connections were used again"
        assert len(stored(served)) == 60


@LANES
def test_a_hanging_replica_leaves_other_models_alone(make_settings: MakeSettings, fast_lane: bool) -> None:
    async def hang(asked: Asked) -> None:
        await asked.until_cut()

    with faulty_engine(hang) as hanging, faulty_engine(answer_well) as healthy:
        settings = make_settings(
            fast_lane=fast_lane,
            models={
                "assistant": {"engines": [healthy.url], "champion": "base-model"},
                "stuck": {"engines": [hanging.url], "champion": "base-model"},
            },
            replicas={"max_concurrency": 8},
            queue={"max_waiting": 100, "max_wait_s": 30.0},
        )
        with serving(settings, FakeVLLM()) as served, httpx2.Client(base_url=served.url, timeout=60) as client:
            stuck = [threading.Thread(target=post_in_vain, args=(served.url,), daemon=True) for _ in range(16)]
            for thread in stuck:
                thread.start()
            eventually(lambda: len(hanging.asked) == 8)
            seconds = []
            for _ in range(50):
                started = time.monotonic()
                assert client.post(CHAT, json=QUESTION).status_code == 200
                seconds.append(time.monotonic() - started)
            assert sorted(seconds)[25] < 1.0, "the total timeout of those that hang is ten minutes"


def post_in_vain(url: str) -> None:
    try:
        httpx2.post(url + CHAT, json={**QUESTION, "model": "stuck"}, timeout=60)
    except httpx2.HTTPError:
        return


class EngineProcess:
    """An engine that can be killed: an HTTP server in a process of its own, always on the same port."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._script = directory / "engine.py"
        self._script.write_text(ENGINE_SCRIPT)
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(self._script), str(self.port)])
        eventually(self._listens, within_s=30)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(60)


ENGINE_SCRIPT = f"""
import asyncio, sys

ANSWER = {whole(completion(TEXT))!r}
MODELS = {whole(MODELS)!r}

async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\\r\\n")[0] or 0)
            await reader.readexactly(length)
            if length:
                await asyncio.sleep(0.005)
            writer.write(ANSWER if length else MODELS)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""


def test_a_killed_engine_costs_few_requests_and_is_taken_back(make_settings: MakeSettings, tmp_path: Path) -> None:
    killed, healthy = EngineProcess(tmp_path), EngineProcess(tmp_path)
    for process in (killed, healthy):
        process.start()
    urls = [f"http://127.0.0.1:{process.port}" for process in (killed, healthy)]
    quick = {"eject_s": 0.3, "probe_every_s": 0.2, "slow_start_s": 0.0}
    try:
        with serving(make_settings(model={"engines": urls}, replicas=quick), FakeVLLM()) as served:
            load = Load(served.url)
            load.until(100)
            killed.kill()
            load.until(400)
            healths = [replica.health for replica in served.gateway.replicas["assistant"].replicas]
            eventually(lambda: healths[0].share(time.monotonic()) == 0)
            killed.start()
            eventually(lambda: healths[0].share(time.monotonic()) == 1, within_s=30)
            load.until(200)
            statuses = load.stop()
            assert statuses.count(200) >= len(statuses) - 5, [status for status in statuses if status != 200]
    finally:
        for process in (killed, healthy):
            process.kill()


class Load:
    """Clients that ask again and again, each about something else."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._statuses: list[int] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        turn = 0
        with httpx2.Client(base_url=self._url, timeout=30) as client:
            while not self._is_over.is_set():
                turn += 1
                self._statuses.append(client.post(CHAT, json=numbered(number * 10_000 + turn)).status_code)

    def until(self, n_more: int) -> None:
        """Until so many more answers have come."""
        n = len(self._statuses) + n_more
        eventually(lambda: len(self._statuses) >= n, within_s=60)

    def stop(self) -> list[int]:
        """All statuses."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)
        return self._statuses


@LANES
def test_failing_replicas_are_asked_little_more_than_they_were_sent(
    make_settings: MakeSettings, fast_lane: bool
) -> None:
    async def refuse(asked: Asked) -> None:
        await asked.say(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}")

    n_requests = 200
    with faulty_engine(refuse) as one, faulty_engine(refuse) as other:
        settings = make_settings(model={"engines": [one.url, other.url]}, fast_lane=fast_lane)
        with serving(settings, FakeVLLM()) as served:
            responses = asyncio.run(ask_often(served.url, [numbered(n) for n in range(n_requests)]))
            assert {response.status_code for response in responses} <= {502, 503}
        assert n_requests * 0.9 <= len(one.asked) + len(other.asked) <= 1.2 * n_requests + 3


@LANES
def test_what_has_begun_to_reach_the_client_is_not_tried_again(make_settings: MakeSettings, fast_lane: bool) -> None:
    async def break_off(asked: Asked) -> None:
        await asked.say(STREAM_HEAD + chunk(event("Water")))
        await asyncio.sleep(0.01)
        asked.peer.hang_up()
        await asked.until_cut()

    with faulty_engine(break_off) as one, faulty_engine(break_off) as other:
        settings = make_settings(model={"engines": [one.url, other.url]}, fast_lane=fast_lane, replicas=PATIENT)
        with serving(settings, FakeVLLM()) as served:
            for n in range(20):
                events = events_of(served.client.post(CHAT, json=numbered(n, stream=True)).content)
                assert "error" in orjson.loads(events[-1])
                assert len(events) == 2
        assert len(one.asked) + len(other.asked) == 20
