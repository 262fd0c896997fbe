"""Who gets in, who waits and who is refused: first with the time given, then on a real event loop."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.metrics import REGISTRY
from pawl.settings import QueueSettings, ReplicaSettings
from serving.admission import Admission, Gate, InFlight, Line, admissions_for
from serving.connections import EnginePool
from serving.errors import Overloaded
from serving.replicas import replica_sets
from tests.serving.waiting import eventually

QUEUE = QueueSettings()
PATIENT = QueueSettings(max_waiting=100, max_wait_s=600.0)
"""Nobody's time is over within a test, however slow the machine."""
PRIORITIES = st.integers(0, 9)


def metric(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    return value or 0.0


# The line and the gate.


@given(st.lists(st.tuples(st.sampled_from(["add", "first", "last", "discard"]), PRIORITIES), max_size=100))
def test_the_line_keeps_priorities_and_the_order_of_arrival(events: list[tuple[str, int]]) -> None:
    line: Line[int] = Line()
    model: list[tuple[int, int]] = []  # (-priority, number), so that the smallest is next.
    for number, (event, priority) in enumerate(events):
        if event == "add":
            line.add(number, priority)
            model.append((-priority, number))
        elif event == "first":
            expected = min(model, default=None)
            assert line.pop_first() == (expected and expected[1])
            model = [waiting for waiting in model if waiting != expected]
        elif event == "last":
            expected = max((waiting for waiting in model if -waiting[0] < priority), default=None)
            assert line.pop_last_below(priority) == (expected and expected[1])
            model = [waiting for waiting in model if waiting != expected]
        else:
            there = [waiting for waiting in model if waiting[0] == -priority]
            assert line.discard(there[0][1] if there else -1, priority) == bool(there)
            model = [waiting for waiting in model if waiting not in there[:1]]
        assert len(line) == len(model)


GATE_EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive", "arrive", "leave", "resize"]), PRIORITIES, st.floats(0.0, 2.0)),
    max_size=150,
)


@given(GATE_EVENTS, st.integers(0, 8))
def test_the_gate_keeps_its_bounds_and_never_leaves_a_place_empty(
    events: list[tuple[str, int, float]], max_waiting: int
) -> None:
    gate: Gate[int] = Gate(3, QueueSettings(max_waiting=max_waiting))
    now_s = 1000.0
    priorities: dict[int, int] = {}
    for number, (event, priority, gap) in enumerate(events):
        now_s += gap
        n_before = gate.n_inside
        if event == "arrive" and not gate.try_enter(now_s):
            priorities[number] = priority
            away = gate.line_up(number, priority, now_s)
            # Only the newcomer itself or somebody of a lower priority has to go.
            assert away is None or away == number or priorities[away] < priority
        elif event == "leave" and gate.n_inside:
            gate.leave(now_s)
        elif event == "resize":
            gate.n_places = priority
        while (admitted := gate.next_in(now_s)) is not None:
            priorities.pop(admitted)
        assert gate.n_inside <= max(gate.n_places, n_before)
        assert len(gate.line) <= max_waiting
        assert not gate.line or gate.n_inside >= gate.n_places
        assert gate.wait_s(now_s) >= 0.0


def test_a_full_line_makes_room_for_a_higher_priority_only() -> None:
    gate: Gate[str] = Gate(1, QueueSettings(max_waiting=3))
    assert gate.try_enter(0.0)
    assert [gate.line_up(name, 5, 0.0) for name in ("a", "b", "c")] == [None, None, None]
    assert gate.line_up("equal", 5, 0.0) == "equal"
    assert gate.line_up("higher", 6, 0.0) == "c"
    assert gate.line_up("lower", 4, 0.0) == "lower"
    gate.n_places = 10
    assert [gate.next_in(0.0) for _ in range(4)] == ["higher", "a", "b", None]


# Overload, simulated: Poisson arrivals, requests that take an exponential time.


@dataclass
class Run:
    """What became of the requests of a simulation. Times are seconds from its start."""

    gate: Gate[int]
    ended: list[float] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    refused_on_arrival: int = 0
    refused_late: int = 0


def simulate(n_places: int, service_s: float, load: Callable[[float], float], until_s: float) -> Run:
    """Args: load: arrivals as a multiple of what the places can serve, by time."""
    rng, run, number = random.Random(3), Run(Gate(n_places, QUEUE)), 0
    events: list[tuple[float, int, str]] = [(0.0, 0, "arrive")]
    arrived: dict[int, float] = {}

    def serve(who: int, now_s: float) -> None:
        run.waits.append((now_s, now_s - arrived[who]))
        heapq.heappush(events, (now_s + rng.expovariate(1.0 / service_s), who, "end"))

    while events[0][0] < until_s:
        now_s, who, event = heapq.heappop(events)
        if event == "arrive":
            number += 1
            heapq.heappush(events, (now_s + rng.expovariate(load(now_s) * n_places / service_s), number + 1, "arrive"))
            arrived[number] = now_s
            if run.gate.try_enter(now_s):
                serve(number, now_s)
            elif run.gate.line_up(number, 0, now_s) == number:
                run.refused_on_arrival += 1
            else:
                heapq.heappush(events, (now_s + QUEUE.max_wait_s, number, "expire"))
        elif event == "end":
            run.ended.append(now_s)
            run.gate.leave(now_s)
            if (admitted := run.gate.next_in(now_s)) is not None:
                serve(admitted, now_s)
        else:
            run.refused_late += run.gate.line.discard(who, 0)
    return run


@pytest.mark.parametrize(("n_places", "service_s"), [(64, 0.1), (64, 1.0), (256, 10.0), (2, 0.5)])
def test_three_times_the_capacity_costs_no_goodput_and_the_rest_is_refused_on_arrival(
    n_places: int, service_s: float
) -> None:
    until_s, warm_s = 20.0 + 12.0 * service_s, 10.0 + 2.0 * service_s
    run = simulate(n_places, service_s, lambda _: 3.0, until_s)
    peak = n_places / service_s * (until_s - warm_s)
    assert sum(at > warm_s for at in run.ended) >= 0.9 * peak
    assert run.refused_late <= 0.01 * run.refused_on_arrival
    waits = sorted(wait for at, wait in run.waits if at > warm_s)
    assert waits[len(waits) // 2] <= QUEUE.max_wait_s / 2
    if n_places * QUEUE.max_wait_s > 100.0 * service_s:  # Enough to serve for the estimate to be a good one.
        assert waits[int(0.99 * len(waits))] <= 0.2 * QUEUE.max_wait_s


def test_a_burst_waits_and_nobody_is_refused() -> None:
    run = simulate(64, 1.0, lambda now_s: 2.0 if 20.0 < now_s < 21.5 else 0.5, 60.0)
    assert (run.refused_on_arrival, run.refused_late) == (0, 0)
    assert max(wait for _, wait in run.waits) > 0.1


def test_normal_load_never_waits_long() -> None:
    run = simulate(64, 1.0, lambda _: 0.9, 60.0)
    assert (run.refused_on_arrival, run.refused_late) == (0, 0)
    assert max(wait for _, wait in run.waits) < 1.0


def test_the_rate_is_learnt_before_the_places_are_full() -> None:
    run = simulate(64, 1.0, lambda _: 0.3, 60.0)
    assert run.gate.rate.of(64) == pytest.approx(64.0, rel=0.2)


# The entrance on an event loop.


def entrance(capacity: int, queue: QueueSettings = PATIENT, limit: int = 1000) -> Admission:
    return Admission(InFlight(limit), queue, capacity=capacity, rng=random.Random(0))


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(6):
        await asyncio.sleep(0)


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(["enter", "enter", "leave", "cancel", "turn"]), st.integers(0, 99)), max_size=80
    ),
)
@settings(deadline=None)
def test_no_place_is_lost_whoever_gives_up_and_when(capacity: int, events: list[tuple[str, int]]) -> None:
    asyncio.run(enter_leave_and_cancel(capacity, events))


async def enter_leave_and_cancel(capacity: int, events: list[tuple[str, int]]) -> None:
    in_flight = InFlight(1000)
    admission = Admission(in_flight, QueueSettings(max_waiting=5, max_wait_s=600.0), capacity=capacity)
    tasks: list[asyncio.Task[None]] = []
    inside: list[int] = []

    async def go(number: int) -> None:
        await admission.enter(number % 10)
        inside.append(number)

    for event, number in events:
        if event == "enter":
            tasks.append(asyncio.create_task(go(number)))
        elif event == "leave" and inside:
            inside.pop(number % len(inside))
            admission.leave()
        elif event == "cancel" and tasks:
            tasks[number % len(tasks)].cancel()
        else:
            await asyncio.sleep(0)
        assert len(inside) <= admission.gate.n_inside <= capacity
    await settle()
    assert admission.gate.n_inside == in_flight.n_entered == len(inside)
    assert not admission.gate.line or len(inside) == capacity
    while inside:
        inside.pop()
        admission.leave()
        await settle()
    assert all(task.done() for task in tasks)
    assert all(task.done() for task in tasks)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(end is None or isinstance(end, asyncio.CancelledError | Overloaded) for end in ends)
    assert (admission.gate.n_inside, in_flight.n_entered, len(admission.gate.line)) == (0, 0, 0)
    assert metric("pawl_queue_waiting") == 0


async def test_the_next_one_enters_when_somebody_leaves() -> None:
    admission = entrance(1)
    n_waits = metric("pawl_queue_wait_seconds_count")
    assert admission.try_enter()
    assert not admission.try_enter()
    low = asyncio.create_task(admission.enter(1))
    high = asyncio.create_task(admission.enter(2))
    await settle()
    assert metric("pawl_queue_waiting") == 2
    admission.leave()
    assert not admission.try_enter()
    await high
    assert not low.done()
    admission.leave()
    await low
    assert (metric("pawl_queue_waiting"), metric("pawl_queue_wait_seconds_count")) == (0, n_waits + 2)


@pytest.mark.parametrize(("n_turns", "is_too_late"), [(0, False), (1, False), (2, True)])
async def test_a_place_won_by_somebody_who_is_leaving_goes_to_the_next(n_turns: int, is_too_late: bool) -> None:
    """The wait is cancelled before its end is told, before the waiter has woken, and after that."""
    admission = entrance(1)
    assert admission.try_enter()
    leaving, following = (asyncio.create_task(admission.enter(0)) for _ in range(2))
    await settle()
    admission.leave()
    for _ in range(n_turns):
        await asyncio.sleep(0)
    assert leaving.cancel() != is_too_late
    await settle()
    assert (leaving.cancelled(), following.done()) == (not is_too_late, not is_too_late)
    assert admission.gate.n_inside == 1
    following.cancel()
    await settle()


async def refusal_of(entering: Awaitable[None]) -> Overloaded:
    with pytest.raises(Overloaded) as refused:
        async with asyncio.timeout(60.0):
            await entering
    return refused.value


async def test_a_full_line_refuses_at_once_and_says_when_to_come_back() -> None:
    admission = entrance(1, QueueSettings(max_waiting=1, max_wait_s=600.0))
    before = metric("pawl_rate_limited_total", reason="queue")
    assert admission.try_enter()
    waiting = asyncio.create_task(admission.enter(5))
    await settle()
    refused = await refusal_of(admission.enter(5))
    assert (refused.status, refused.type, refused.code) == (503, "overloaded_error", "overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    more_important = asyncio.create_task(admission.enter(6))
    displaced = await refusal_of(waiting)
    assert "priority" in displaced.message
    assert metric("pawl_rate_limited_total", reason="queue") == before + 2
    admission.leave()
    await more_important


async def test_nobody_waits_longer_than_is_allowed() -> None:
    admission = entrance(1, QueueSettings(max_wait_s=0.05))
    assert admission.try_enter()
    refused = await refusal_of(admission.enter(0))
    assert "in time" in refused.message
    assert (len(admission.gate.line), admission.gate.n_inside) == (0, 1)


def test_retry_after_grows_with_those_turned_away_and_is_spread() -> None:
    now_s = 1000.0
    admission = Admission(InFlight(1000), QUEUE, capacity=10, clock=lambda: now_s, rng=random.Random(0))
    assert admission.retry_after_s() in (1, 2)
    for _ in range(100):  # Each stays for a second, so that ten are served in one.
        assert admission.try_enter()
        now_s += 1.0
        admission.leave()
    admission.gate.rate.n_turned_away = 100.0
    waits = [admission.retry_after_s() for _ in range(200)]
    assert 8 <= min(waits) < 12
    assert 15 < max(waits) <= 24
    admission.gate.rate.n_turned_away = 1e9
    assert admission.retry_after_s() == 60


async def test_more_capacity_lets_in_those_who_wait() -> None:
    admission = entrance(1)
    assert admission.try_enter()
    waiting = [asyncio.create_task(admission.enter(0)) for _ in range(3)]
    await settle()
    admission.resize(3)
    await settle()
    assert [task.done() for task in waiting] == [True, True, False]
    admission.resize(1)
    admission.leave()
    admission.leave()
    await settle()
    assert not waiting[2].done()
    admission.leave()
    await waiting[2]


async def test_the_process_bound_holds_for_all_entrances_and_none_is_forgotten() -> None:
    in_flight = InFlight(2)
    one, other = (Admission(in_flight, PATIENT, capacity=9) for _ in range(2))
    assert (one.try_enter(), one.try_enter(), one.try_enter(), other.try_enter()) == (True, True, False, False)
    waiting = [asyncio.create_task(admission.enter(0)) for admission in (one, one, other, other)]
    await settle()
    for n_done in range(1, 5):
        one.leave() if one.gate.n_inside else other.leave()
        await settle()
        assert (sum(task.done() for task in waiting), in_flight.n_entered) == (n_done, 2)
        if n_done == 2:  # In turn.
            assert sum(task.done() for task in waiting[2:]) == 1

    def is_shown() -> bool:
        in_flight.publish()
        return metric("pawl_requests_in_flight") == 2

    eventually(is_shown)  # Other gateways of this process show theirs in the same place now and then.


async def test_a_callback_waits_without_a_task() -> None:
    admission = entrance(1)
    assert admission.try_enter()
    told: list[Overloaded | None] = []
    places = [admission.line_up(0, told.append) for _ in range(3)]
    admission.leave()
    assert told == []
    places[0].give_up()  # It has won and not been told: the next one wins.
    await settle()
    assert told == [None]
    places[1].give_up()  # It has been told, so that this means nothing.
    places[2].give_up()
    admission.leave()
    await settle()
    assert (told, admission.gate.n_inside, len(admission.gate.line)) == ([None], 0, 0)


async def test_a_stopping_gateway_lets_nobody_in_and_leaves_who_is_inside() -> None:
    in_flight = InFlight(10)
    admission = Admission(in_flight, PATIENT, capacity=1)
    assert admission.try_enter()
    waiting = asyncio.create_task(admission.enter(0))
    await settle()
    in_flight.drain()
    assert (await refusal_of(waiting)).code == "shutting_down"
    assert (await refusal_of(admission.enter(9))).code == "shutting_down"
    assert not admission.try_enter()
    assert (in_flight.n_entered, admission.gate.n_inside) == (1, 1)
    admission.leave()
    assert not admission.try_enter(), "a place that becomes free stays free"
    assert (in_flight.n_entered, admission.gate.n_inside) == (0, 0)


def test_aliases_with_the_same_engines_share_an_entrance_of_their_size() -> None:
    engines = {"one": ["http://a", "http://b"], "same": ["http://b", "http://a"], "less": ["http://a"]}
    sets = replica_sets(engines, ReplicaSettings(max_concurrency=7), lambda url: EnginePool(url, connect_s=1.0))
    entrances = admissions_for(sets, InFlight(1000), QUEUE)
    assert entrances["one"] is entrances["same"] is not entrances["less"]
    assert (entrances["one"].gate.n_places, entrances["less"].gate.n_places) == (14, 7)
    for _ in range(2):
        sets["one"].replicas[0].probed(False, None)
    assert (entrances["one"].gate.n_places, entrances["less"].gate.n_places) == (7, 7)
