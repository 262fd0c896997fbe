"""Clients that stop reading: the engine is held back meanwhile, little is buffered, and in time they are dropped."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from pawl.settings import Settings
from serving.asgi_lane import AsgiClient
from serving.call import Call
from serving.fast_lane import FastLane
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import serving
from tests.serving.faulty_engine import (
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
from tests.serving.raw_server import PATIENCE_S, request
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.test_completions import n_requests
from tests.serving.test_faults_leaving import LANES
from tests.serving.test_full_disk import dropped
from tests.serving.waiting import eventually

N_SLOW = 50
RECEIVE_BYTES = 4096
STALLED_S = 1.0
DROPPED_WITHIN_S = 60.0
ONE_READ_BYTES = 256 * 1024
"""What a loop may read from an engine before it hears that the client does not keep up."""
HIGH_WATER_BYTES = 256 * 1024
FEW = 5
"""Connections that health checks may have open, or not."""


async def pouring(asked: Asked) -> None:
    """As fast as the gateway takes it, without an end."""
    await asked.say(STREAM_HEAD)
    piece = chunk(event("x" * 60_000))
    while True:
        await asked.say(piece)


def slow_reader(address: tuple[str, int], body: Mapping[str, Any] = STREAM, *lines: str) -> socket.socket:
    """Asks for a stream, or something else, and reads none of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    connection.settimeout(PATIENCE_S)
    connection.connect(address)
    connection.sendall(request(CHAT, orjson.dumps(body), *lines))
    return connection


def buffered(call: Call) -> int:
    """Bytes of the answer that wait in this process for the client."""
    client = call.client
    if isinstance(client, FastLane):
        return client.transport.get_write_buffer_size()
    return client._n_waiting if isinstance(client, AsgiClient) else 0


def n_sockets() -> int:
    """Sockets that this process has open."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(path).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


@LANES
def test_they_are_bounded_and_then_dropped(make_settings: Callable[..., Settings], fast_lane: bool) -> None:
    have_all_asked = threading.Event()  # Else the first might be dropped, and fill the journal, before the last asks.

    async def pouring_for_all(asked: Asked) -> None:
        await asyncio.to_thread(have_all_asked.wait, PATIENCE_S)
        await pouring(asked)

    with faulty_engine(pouring_for_all) as engine, ExitStack() as stack:
        settings = make_settings(
            model={"engines": [engine.url]}, fast_lane=fast_lane, timeouts={"stalled_reader_s": STALLED_S}
        )
        served = stack.enter_context(serving(settings, FakeVLLM()))
        calls = served.gateway.relay.calls
        served.client.get("/health/live")
        n_dropped, n_cancelled = dropped(), n_requests("cancelled")
        n_tasks, n_before = tasks_of(served.gateway) + 1, n_sockets()
        slow = [stack.enter_context(slow_reader(served.address)) for _ in range(N_SLOW)]

        eventually(lambda: len(engine.asked) == N_SLOW, within_s=30)
        have_all_asked.set()
        most = 0
        until = time.monotonic() + DROPPED_WITHIN_S
        while not all(asked.is_cut.is_set() for asked in engine.asked) and time.monotonic() < until:
            before = [(call, call.paused_at, call.size) for call in list(calls.values()) if call.paused_at]
            most = max(most, *(buffered(call) for call, _, _ in before), 0)
            time.sleep(0.01)
            for call, paused_at, size in before:
                is_held_back = call.size - size <= ONE_READ_BYTES or call.paused_at != paused_at
                assert is_held_back, "the engine goes on while the client stands still"
        assert 0 < most <= HIGH_WATER_BYTES + 2 * ONE_READ_BYTES

        assert all(asked.is_cut.is_set() for asked in engine.asked)
        await_base(served.gateway, n_tasks)
        eventually(lambda: n_sockets() <= n_before + len(slow) + FEW)
        n_kept = served.gateway.records.journal.kept_seq
        assert n_kept + dropped() - n_dropped == N_SLOW, "more than the journal may hold at once is counted"
        served.client.get("/metrics")
        assert n_requests("cancelled") - n_cancelled == N_SLOW


@LANES
def test_a_reader_that_is_slow_but_reads_gets_everything(
    make_settings: Callable[..., Settings], fast_lane: bool
) -> None:
    text = "Y" * 100_000
    n_texts = 40

    async def long_answer(asked: Asked) -> None:
        await asked.say(STREAM_HEAD)
        for _ in range(n_texts):
            await asked.say(chunk(event(text)))
        await asked.say(chunk(event("", "stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    with faulty_engine(long_answer) as engine:
        settings = make_settings(
            model={"engines": [engine.url]}, fast_lane=fast_lane, timeouts={"stalled_reader_s": 30.0}
        )
        with serving(settings, FakeVLLM()) as served:
            with slow_reader(served.address) as connection:
                eventually(lambda: any(call.paused_at for call in list(served.gateway.relay.calls.values())))
                received = bytearray()
                while not received.endswith(b"\r\n0\r\n\r\n"):
                    part = connection.recv(65536)
                    assert part
                    received += part
            assert received.count(b"Y") == n_texts * len(text)
            assert b"data: [DONE]" in received


@LANES
def test_an_answer_that_nobody_reads_does_not_keep_its_connection(
    make_settings: Callable[..., Settings], fast_lane: bool
) -> None:
    """The engine has done its part, and closing alone would wait for the client for ever."""

    async def large(asked: Asked) -> None:
        await asked.say(whole(completion("x" * 6_000_000)))

    with faulty_engine(large) as engine:
        settings = make_settings(
            model={"engines": [engine.url]}, fast_lane=fast_lane, timeouts={"stalled_reader_s": STALLED_S}
        )
        with serving(settings, FakeVLLM()) as served:
            served.client.get("/health/live")
            served.client.get("/metrics")
            n_before, n_ok = n_sockets(), n_requests("ok")
            with ExitStack() as stack:
                slow: list[socket.socket] = []
                for _ in range(2 * FEW):  # One by one: of so large answers few may wait for the disk at once.
                    slow.append(stack.enter_context(slow_reader(served.address, QUESTION, "connection: close")))
                    eventually(lambda: len(engine.asked) == len(slow), within_s=30)
                    eventually(lambda: not served.gateway.relay.calls, within_s=30)
                eventually(lambda: n_sockets() <= n_before + len(slow) + FEW, within_s=30)
                served.client.get("/metrics")
                assert n_requests("ok") - n_ok == len(slow)
