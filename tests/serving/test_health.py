"""When a replica goes out of service and how it comes back, with the time given; then probes against a real server."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pawl.settings import ReplicaSettings
from serving.connections import EnginePool
from serving.health import MAX_EJECT_S, MAX_PROBE_BYTES, MIN_SHARE, Health, HealthProbes, RecentCount, probe
from tests.servers import free_port, running

RULES = ReplicaSettings()
EVENTS = st.lists(st.floats(0.0, 3.0), max_size=200)
"""Seconds from one event to the next."""


@given(EVENTS, st.integers(1, 11))
def test_recent_events_are_counted_by_whole_seconds(gaps: list[float], n_seconds: int) -> None:
    count, seen, now_s = RecentCount(n_seconds), deque[float](), 1000.0
    for gap in gaps:
        now_s += gap
        count.add(now_s)
        seen.append(now_s)
        while int(seen[0]) <= int(now_s) - n_seconds:
            seen.popleft()
        assert count.at(now_s) == len(seen)
    assert count.at(now_s + n_seconds + 1) == 0


def fail(health: Health, now_s: float, times: int = RULES.eject_after) -> bool:
    """Whether the last of some failures ejected it."""
    return [health.note(False, now_s) for _ in range(times)][-1]


def test_failures_in_a_row_eject_for_a_while() -> None:
    health = Health(RULES)
    assert not fail(health, 100.0, RULES.eject_after - 1)
    assert health.share(100.0) == 1.0
    assert health.note(False, 100.0)
    assert health.share(100.0) == 0.0
    assert health.share(100.0 + RULES.eject_s - 0.01) == 0.0
    assert health.share(100.0 + RULES.eject_s) == MIN_SHARE


def test_a_success_between_failures_keeps_it_in_service() -> None:
    health = Health(RULES)
    for second in range(200):
        assert not health.note(second % RULES.eject_after == 0, 100.0 + 2 * second)


def test_a_high_share_of_failures_ejects_once_there_are_enough_requests() -> None:
    rules = RULES.model_copy(update={"eject_after": 1000})
    health = Health(rules)
    outcomes = [health.note(index % 2 == 0, 100.0) for index in range(rules.eject_min_requests)]
    assert outcomes == [False] * (rules.eject_min_requests - 1) + [True]


def test_failures_of_long_ago_are_forgotten() -> None:
    rules = RULES.model_copy(update={"eject_after": 1000})
    health = Health(rules)
    assert not fail(health, 100.0, rules.eject_min_requests - 1)
    assert not any(health.note(True, 120.0) for _ in range(rules.eject_min_requests))
    assert not health.note(False, 120.0)


def test_every_relapse_doubles_the_ejection_up_to_a_minute_and_good_conduct_ends_that() -> None:
    health, now_s = Health(RULES), 100.0
    for expected_s in (5.0, 10.0, 20.0, 40.0, MAX_EJECT_S, MAX_EJECT_S):
        assert fail(health, now_s)
        assert health.share(now_s + expected_s - 0.01) == 0.0
        now_s += expected_s
        assert health.share(now_s) > 0.0
    now_s += 61.0
    assert fail(health, now_s)
    assert health.share(now_s + RULES.eject_s) > 0.0


def test_what_ends_during_an_ejection_neither_prolongs_nor_ends_it() -> None:
    health = Health(RULES)
    assert fail(health, 100.0)
    assert not fail(health, 104.0, 50)
    health.note(True, 104.0)
    assert (health.share(104.9), health.share(105.0)) == (0.0, MIN_SHARE)


def test_it_returns_by_slow_start() -> None:
    health = Health(RULES)
    fail(health, 100.0)
    back = 100.0 + RULES.eject_s
    shares = [health.share(back + step * RULES.slow_start_s / 10) for step in range(11)]
    assert shares == sorted(shares)
    assert (shares[0], shares[10]) == (MIN_SHARE, 1.0)
    assert shares[5] == pytest.approx(0.5)


def test_without_a_slow_start_it_returns_at_once() -> None:
    health = Health(RULES.model_copy(update={"slow_start_s": 0.0}))
    assert health.share(0.0) == 1.0
    fail(health, 100.0)
    assert health.share(100.0 + RULES.eject_s) == 1.0


def test_two_failed_probes_in_a_row_take_it_out_and_a_good_one_brings_it_back() -> None:
    health = Health(RULES)
    assert [health.note_probe(ok, 100.0) for ok in (False, True, False)] == [False, False, False]
    assert health.share(100.0) == 1.0
    assert health.note_probe(False, 102.0)
    assert not health.note_probe(False, 104.0)
    assert health.share(500.0) == 0.0
    assert health.note_probe(True, 500.0)
    assert (health.share(500.0), health.share(510.0)) == (MIN_SHARE, 1.0)


def test_a_replica_that_answers_requests_is_not_dead_because_a_probe_was_slow() -> None:
    health = Health(RULES)
    for now_s in range(100, 120, 2):
        health.note(True, now_s)
        assert not health.note_probe(False, now_s + 1.0)
    assert [health.note_probe(False, 130.0) for _ in range(2)] == [False, True]


def test_a_good_probe_does_not_end_an_ejection() -> None:
    health = Health(RULES)
    fail(health, 100.0)
    assert not health.note_probe(True, 101.0)
    assert health.share(101.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.sampled_from(["ok", "failed", "probe_ok", "probe_failed"]))))
def test_it_always_finds_its_way_back(history: list[tuple[float, str]]) -> None:
    """Whatever happened, one good probe and a minute without failures make it whole."""
    health, now_s = Health(RULES), 100.0
    for gap, event in history:
        now_s += gap
        if event.startswith("probe"):
            health.note_probe(event == "probe_ok", now_s)
        else:
            health.note(event == "ok", now_s)
        assert 0.0 <= health.share(now_s) <= 1.0
    health.note_probe(True, now_s)
    assert health.share(now_s + MAX_EJECT_S + RULES.slow_start_s) == 1.0


class Engine:
    """A server whose answers to probes a test can set."""

    def __init__(self) -> None:
        self.health: Callable[[], Response] = lambda: PlainTextResponse("")
        self.models: Callable[[], Response] = lambda: JSONResponse({"data": [{"id": "base"}, {"id": "base--r1"}]})
        self.is_hanging = False
        self.app = Starlette(routes=[Route("/health", self._health), Route("/v1/models", self._models)])

    async def _health(self, request: Request) -> Response:
        while self.is_hanging and (await request.receive())["type"] != "http.disconnect":
            pass
        return self.health()

    async def _models(self, _: Request) -> Response:
        return self.models()


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, EnginePool]]:
    engine = Engine()
    with running(engine.app) as url:
        pool = EnginePool(url, connect_s=5.0)
        yield engine, pool
        await pool.close()


async def test_a_probe_tells_life_and_models(engine: tuple[Engine, EnginePool]) -> None:
    server, pool = engine
    assert await probe(pool, 10.0) == (True, frozenset({"base", "base--r1"}))
    for nonsense in (b"", b"[]", b'{"data": 1}', b'{"data": [1]}', b"[" * 10, b"x" * (MAX_PROBE_BYTES + 1)):
        server.models = lambda body=nonsense: Response(body)  # type: ignore[misc]
        assert await probe(pool, 10.0) == (True, None), nonsense[:20]
    server.models = lambda: PlainTextResponse("", 404)
    assert await probe(pool, 10.0) == (True, None)
    server.health = lambda: PlainTextResponse("", 404)
    assert await probe(pool, 10.0) == (True, None)
    server.health = lambda: PlainTextResponse("", 503)
    assert await probe(pool, 10.0) == (False, None)


async def test_a_probe_waits_only_so_long_and_leaves_no_connection(engine: tuple[Engine, EnginePool]) -> None:
    server, pool = engine
    server.is_hanging = True
    assert await probe(pool, 0.2) == (False, None)
    for _ in range(1000):
        if pool.n_open:
            await asyncio.sleep(0.01)
    assert pool.n_open == 0


async def test_nobody_there_is_a_failed_probe() -> None:
    pool = EnginePool(f"http://127.0.0.1:{free_port()}", connect_s=5.0)
    assert await probe(pool, 5.0) == (False, None)
    await pool.close()


class Listening:
    """A replica that only notes what probes tell it."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool = pool
        self.told: asyncio.Queue[tuple[bool, frozenset[str] | None]] = asyncio.Queue()

    def probed(self, is_alive: bool, models: frozenset[str] | None) -> None:
        self.told.put_nowait((is_alive, models))


async def test_probes_go_on_until_they_are_stopped(engine: tuple[Engine, EnginePool]) -> None:
    server, pool = engine
    replica, ticks = Listening(pool), asyncio.Queue[None]()
    rules = ReplicaSettings(probe_every_s=0.01, probe_timeout_s=20.0)
    probes = HealthProbes([replica], rules, on_tick=[lambda: ticks.put_nowait(None)], rng=random.Random(0))
    probes.start()
    async with asyncio.timeout(30.0):
        assert await replica.told.get() == (True, frozenset({"base", "base--r1"}))
        server.health = lambda: PlainTextResponse("", 500)
        while (await replica.told.get())[0]:
            pass
        server.health = lambda: PlainTextResponse("")
        while not (await replica.told.get())[0]:
            pass
        await ticks.get()
        server.is_hanging = True
        await asyncio.sleep(0.05)
        await probes.stop()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
