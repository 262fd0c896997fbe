"""Limits: never passed, whoever counts; what is refused costs nothing, and what is not used comes back."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from monitoring.metrics import RATE_LIMITED
from pawl.api_keys import ALL_SCOPES, KeyLimits
from pawl.database import Database, open_database
from pawl.schema import limit_slots, limit_windows, metadata
from pawl.settings import DatabaseSettings, LimitSettings
from serving.database_limits import IDLE_S, SLOT_TTL_S, DatabaseLimiter
from serving.errors import Overloaded, RateLimited
from serving.keys import ANONYMOUS, ApiKey
from serving.limit_answers import duration
from serving.limit_store import Ask, Grant, Lease, Report, Short, hold_slots, report, take
from serving.limiter import default_limits, open_limiter
from serving.limits import DAY_S, MAX_USERS, MINUTE_S, NO_LIMITS, Ledger, Limiter, Reservation, end_of_window
from serving.memory_limits import MemoryLimiter
from tests.serving.waiting import eventually

ROOT = Path(__file__).parents[2]
STEADY = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The same histories every time, however slow the machine is."""


class Clock:
    """Time that stands still until a test moves it: 100 s into some day."""

    def __init__(self) -> None:
        self.at = 1000 * DAY_S + 100.0

    def __call__(self) -> float:
        return self.at


def key_of(limits: KeyLimits | None, key_id: str = "k1") -> ApiKey:
    return ApiKey(key_id, ALL_SCOPES, limits, "", 5, "", None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> MemoryLimiter:
    return MemoryLimiter(clock=clock)


def headers_of(reservation: Reservation) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in reservation.headers.decode().splitlines())


def refused(limiter: MemoryLimiter, key: ApiKey, tokens: int = 10, user: str = "") -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        limiter.try_reserve(key, user, tokens)
    return caught.value


# What a client hears.


def test_a_key_without_limits_touches_nothing(memory: MemoryLimiter) -> None:
    assert memory.try_reserve(ANONYMOUS, "ann", 10**9) is NO_LIMITS
    assert NO_LIMITS.headers == b""
    NO_LIMITS.settle(5)
    NO_LIMITS.refund()
    assert memory._ledger.accounts == {}


def test_headers_tell_what_is_left_and_when_it_is_whole_again(memory: MemoryLimiter, clock: Clock) -> None:
    key = key_of(KeyLimits(requests_per_minute=60, tokens_per_minute=1000))
    first = memory.try_reserve(key, "", 100)
    assert first.headers.endswith(b"\r\n")
    assert headers_of(first) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    clock.at += 59.75
    assert headers_of(memory.try_reserve(key, "", 100))["x-ratelimit-reset-tokens"] == "250ms"
    clock.at += 0.25
    assert headers_of(memory.try_reserve(key, "", 100))["x-ratelimit-remaining-tokens"] == "900"


def test_of_two_limits_the_headers_show_the_one_with_less_left(memory: MemoryLimiter) -> None:
    key = key_of(KeyLimits(requests_per_minute=60, user_requests_per_minute=3))
    memory.try_reserve(key, "ann", 1)
    assert headers_of(memory.try_reserve(key, "bob", 1))["x-ratelimit-limit-requests"] == "3"


def test_the_budget_is_shown_where_no_other_limit_on_tokens_is(memory: MemoryLimiter) -> None:
    told = headers_of(memory.try_reserve(key_of(KeyLimits(tokens_per_day=500)), "", 100))
    assert told["x-ratelimit-remaining-tokens"] == "400"
    assert told["x-ratelimit-reset-tokens"] == "23h58m20s"


@pytest.mark.parametrize(
    ("limits", "reason", "code", "retry_after", "may_retry"),
    [
        (KeyLimits(requests_per_minute=1), "requests", "rate_limit_exceeded", "60", True),
        (KeyLimits(tokens_per_minute=15), "tokens", "rate_limit_exceeded", "60", True),
        (KeyLimits(concurrency=1), "concurrency", "rate_limit_exceeded", "1", True),
        (KeyLimits(tokens_per_day=15), "budget", "insufficient_quota", "60", False),
        (KeyLimits(user_requests_per_minute=1), "user_requests", "rate_limit_exceeded", "60", True),
        (KeyLimits(user_tokens_per_minute=15), "user_tokens", "rate_limit_exceeded", "60", True),
        (KeyLimits(user_concurrency=1), "user_concurrency", "rate_limit_exceeded", "1", True),
        (KeyLimits(user_tokens_per_day=15), "user_budget", "insufficient_quota", "60", False),
        (KeyLimits(tokens_per_day=25, user_tokens_per_day=15), "user_budget", "insufficient_quota", "60", False),
        (KeyLimits(concurrency=1, requests_per_minute=1), "requests", "rate_limit_exceeded", "60", True),
        (KeyLimits(requests_per_minute=1, tokens_per_day=15), "budget", "insufficient_quota", "60", False),
    ],
)
def test_each_limit_refuses_in_its_own_words(
    memory: MemoryLimiter, limits: KeyLimits, reason: str, code: str, retry_after: str, may_retry: bool
) -> None:
    key = key_of(limits)
    counter = RATE_LIMITED.labels(reason=reason)
    before = counter._value.get()
    memory.try_reserve(key, "ann", 10)
    answer = refused(memory, key, user="ann")
    assert (answer.status, answer.type, answer.code) == (429, "rate_limit_error", code)
    assert answer.headers["retry-after"] == retry_after
    assert (answer.headers.get("x-should-retry") != "false") is may_retry
    assert counter._value.get() == before + 1
    assert ("each user" in answer.message) is reason.startswith("user_")
    if "concurrency" not in reason:
        unit = "requests" if "requests" in reason else "tokens"
        assert int(answer.headers[f"x-ratelimit-remaining-{unit}"]) < 10


def test_a_request_that_can_never_pass_is_told_so(memory: MemoryLimiter) -> None:
    answer = refused(memory, key_of(KeyLimits(tokens_per_minute=100)), tokens=101)
    assert answer.headers["x-should-retry"] == "false"
    assert "101" in answer.message


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0ms"), (0.0004, "1ms"), (59.2, "1m0s"), (3600.0, "1h0m0s")])
def test_time_spans_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Counting in memory, against a model.


def test_a_refused_request_costs_nothing(memory: MemoryLimiter) -> None:
    key = key_of(KeyLimits(requests_per_minute=3, tokens_per_minute=100, concurrency=3))
    for _ in range(20):
        refused(memory, key, tokens=101)
    for _ in range(3):
        memory.try_reserve(key, "", 30)


def test_users_of_a_key_are_counted_apart_and_keys_are_too(memory: MemoryLimiter) -> None:
    key = key_of(KeyLimits(user_requests_per_minute=1))
    for user in ("ann", "bob", "\ud800", ""):
        memory.try_reserve(key, user, 1)
        refused(memory, key, user=user)
    memory.try_reserve(key_of(KeyLimits(user_requests_per_minute=1), "k2"), "ann", 1)


def test_changed_limits_hold_at_once_for_what_has_been_used(memory: MemoryLimiter) -> None:
    held = [memory.try_reserve(key_of(KeyLimits(requests_per_minute=10, concurrency=5)), "", 1) for _ in range(5)]
    refused(memory, key_of(KeyLimits(requests_per_minute=5, concurrency=9)))
    memory.try_reserve(key_of(KeyLimits(requests_per_minute=7, concurrency=6)), "", 1)
    refused(memory, key_of(KeyLimits(requests_per_minute=7, concurrency=6)))
    held[0].settle(1)
    memory.try_reserve(key_of(KeyLimits(requests_per_minute=7, concurrency=6)), "", 1)


def test_a_day_ends_at_midnight_utc(memory: MemoryLimiter, clock: Clock) -> None:
    key = key_of(KeyLimits(tokens_per_day=10))
    memory.try_reserve(key, "", 10)
    clock.at = 1001 * DAY_S - 0.001
    refused(memory, key)
    clock.at = 1001 * DAY_S
    memory.try_reserve(key, "", 10)


def test_made_up_users_do_not_fill_the_memory() -> None:
    ledger = Ledger(starts_full=True, max_users=10)
    limits = KeyLimits(user_requests_per_minute=1)
    claims = []
    for number in range(50):
        claims.append(ledger.claims("k1", limits, str(number), 0.0))
        claims[-1].allowances[0].start_window(1, 0.0)
    assert len(ledger.accounts["k1"].users) == 9
    assert len({id(each) for each in claims}) == 9
    assert ledger.claims("k2", limits, "ann", 0.0) is not ledger.claims("k2", limits, "bob", 0.0)
    ledger.claims("k1", limits, "later", 60.0)
    assert set(ledger.accounts["k1"].users) == {"later"}
    assert MAX_USERS >= 10_000


def test_a_user_in_the_middle_of_something_is_not_forgotten_for_another(clock: Clock) -> None:
    limiter = MemoryLimiter(clock=clock)
    limiter._ledger = Ledger(starts_full=True, max_users=10)
    slots, budget = key_of(KeyLimits(user_concurrency=1)), key_of(KeyLimits(user_tokens_per_day=100), "k2")
    held = [limiter.try_reserve(slots, str(number), 1) for number in range(4)]
    spent = [limiter.try_reserve(budget, str(number), 100) for number in range(4)]
    for each in spent:
        each.settle(100)
    for number in range(50):
        clock.at += 1.0
        limiter.try_reserve(slots, f"guest {number}", 1).settle(1)
    for number in range(4):
        refused(limiter, slots, user=str(number))
        refused(limiter, budget, user=str(number))
    held[0].refund()
    limiter.try_reserve(slots, "0", 1)
    assert sum(len(account.users) for account in limiter._ledger.accounts.values()) <= 12


def test_changed_limits_hold_for_what_users_have_used(memory: MemoryLimiter) -> None:
    held = memory.try_reserve(key_of(KeyLimits(user_concurrency=3, user_tokens_per_day=90)), "ann", 30)
    changed = key_of(KeyLimits(user_concurrency=1, user_tokens_per_day=100, requests_per_minute=9))
    assert refused(memory, changed, user="ann").code == "rate_limit_exceeded"
    memory.try_reserve(changed, "bob", 100)
    held.settle(20)
    assert refused(memory, changed, tokens=81, user="ann").code == "insufficient_quota"
    memory.try_reserve(changed, "ann", 80)
    memory.try_reserve(key_of(KeyLimits(requests_per_minute=9)), "ann", 80)
    assert len(memory._ledger.accounts["k1"].users) == 2


LIMITS = {
    "k1": KeyLimits(requests_per_minute=5, tokens_per_minute=100, concurrency=3, user_tokens_per_minute=60),
    "k2": KeyLimits(tokens_per_day=300, concurrency=2, user_requests_per_minute=3),
    "k3": KeyLimits(concurrency=3, user_concurrency=2, user_tokens_per_day=200),
    "k4": KeyLimits(user_concurrency=1, user_tokens_per_day=150, user_tokens_per_minute=80, user_requests_per_minute=4),
}


class Model:
    """The same promises, told by what happened: every charge stands in the window it was made in."""

    def __init__(self) -> None:
        self.ends: dict[tuple[str, str], float] = defaultdict(float)
        self.charges: list[dict[str, Any]] = []

    def names(self, key: str, user: str) -> list[tuple[tuple[str, str], int]]:
        limits = LIMITS[key]
        own = [
            (name, getattr(limits, name))
            for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency")
        ]
        users = [
            (name, getattr(limits, name))
            for name in (
                "user_requests_per_minute", "user_tokens_per_minute", "user_tokens_per_day", "user_concurrency"
            )
        ]  # fmt: skip
        return [((key, name), limit) for name, limit in own if limit] + [
            ((f"{key}/{user}", name), limit) for name, limit in users if limit
        ]

    def used(self, name: tuple[str, str]) -> int:
        return sum(each["cost"] for each in self.charges if each["name"] == name and each["ends"] == self.ends[name])

    def roll(self, key: str, user: str, now: float) -> None:
        for name, _ in self.names(key, user):
            if "concurrency" in name[1]:
                self.ends[name] = 0.0
            elif now >= self.ends[name]:
                self.ends[name] = end_of_window(DAY_S if "per_day" in name[1] else MINUTE_S, now)

    def admits(self, key: str, user: str, tokens: int) -> bool:
        return all(
            self.used(name) + (tokens if "tokens" in name[1] else 1) <= limit for name, limit in self.names(key, user)
        )

    def charge(self, key: str, user: str, tokens: int) -> list[dict[str, Any]]:
        made = [
            {"name": name, "ends": self.ends[name], "cost": tokens if "tokens" in name[1] else 1}
            for name, _ in self.names(key, user)
        ]
        self.charges += made
        return made

    def end(self, made: list[dict[str, Any]], reserved: int, tokens: int | None) -> None:
        """Settle with so many tokens; None: refund."""
        for each in made:
            name = each["name"][1]
            if "concurrency" in name or (tokens is None and each["ends"] == self.ends[each["name"]]):
                each["cost"] = 0
            elif tokens is not None and "tokens" in name:
                if tokens > reserved:
                    self.charges.append(each | {"ends": self.ends[each["name"]], "cost": tokens - reserved})
                else:
                    each["cost"] = tokens


class MemoryMachine(RuleBasedStateMachine):
    """The limiter does what the model says, whatever happens in whatever order."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.limiter = MemoryLimiter(clock=self.clock)
        self.model = Model()

    @rule(
        target=held, key=st.sampled_from(sorted(LIMITS)), user=st.sampled_from(["", "ann"]), tokens=st.integers(0, 70)
    )
    def reserve(self, key: str, user: str, tokens: int) -> Any:
        self.model.roll(key, user, self.clock.at)
        admits = self.model.admits(key, user, tokens)
        try:
            reservation = self.limiter.try_reserve(key_of(LIMITS[key], key), user, tokens)
        except RateLimited:
            assert not admits
            return multiple()
        assert admits
        return reservation, self.model.charge(key, user, tokens), tokens

    @rule(one=consumes(held), tokens=st.integers(0, 90), again=st.booleans())
    def settle(self, one: Any, tokens: int, again: bool) -> None:
        reservation, made, reserved = one
        reservation.settle(tokens)
        self.model.end(made, reserved, tokens)
        if again:
            reservation.refund()
            reservation.settle(3)

    @rule(one=consumes(held), again=st.booleans())
    def refund(self, one: Any, again: bool) -> None:
        reservation, made, reserved = one
        reservation.refund()
        self.model.end(made, reserved, None)
        if again:
            reservation.settle(3)
            reservation.refund()

    @rule(seconds=st.sampled_from([0.5, 20.0, 59.999, 60.0, DAY_S]))
    def wait(self, seconds: float) -> None:
        self.clock.at += seconds

    @invariant()
    def what_is_left_is_what_the_model_has_left(self) -> None:
        for key_id, account in self.limiter._ledger.accounts.items():
            for user, claims in [("", account.everybody), *account.users.items()]:
                subjects = {key_id: key_id} | {each.subject: f"{key_id}/{user}" for each in claims.of_user}
                for each in claims.allowances:
                    if self.clock.at < each.ends_at:
                        left = each.limit - self.model.used((subjects[each.subject], each.rule.field))
                        assert each.left == left


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(STEADY, max_examples=60, stateful_step_count=40)


# Counting in the shared database.


def limiter_on(database: Database, clock: Clock, holder: str = "one", share: float = 0.5) -> DatabaseLimiter:
    # Patient: on a loaded machine a slow answer must not be taken for an outage.
    return DatabaseLimiter(database, holder=holder, clock=clock, share_without_database=share, patience_s=60.0)


async def take_all(limiter: Limiter, key: ApiKey, n: int, tokens: int = 10) -> list[Reservation]:
    made = await asyncio.gather(*(limiter.reserve(key, "", tokens) for _ in range(n)), return_exceptions=True)
    assert all(isinstance(each, Reservation | RateLimited) for each in made), made
    return [each for each in made if isinstance(each, Reservation)]


@pytest.mark.parametrize(
    "field", ["requests_per_minute", "concurrency", "user_requests_per_minute", "user_concurrency"]
)
async def test_fifty_at_once_against_a_limit_of_ten(database: Database, clock: Clock, field: str) -> None:
    limiter = limiter_on(database, clock)
    held = await take_all(limiter, key_of(KeyLimits(**{field: 10})), 50)
    assert len(held) == 10
    await limiter.stop()


@pytest.mark.parametrize("field", ["tokens_per_day", "user_tokens_per_day"])
async def test_fifty_at_once_against_a_hundred_tokens(database: Database, clock: Clock, field: str) -> None:
    limiters = [limiter_on(database, clock, holder) for holder in "abcd"]
    key = key_of(KeyLimits(tokens_per_minute=100, **{field: 90}))
    held = await asyncio.gather(*(take_all(limiter, key, 12) for limiter in limiters))
    assert sum(len(each) for each in held) == 9
    for limiter in limiters:
        await limiter.stop()


@contextmanager
def processes(url: str, n: int, arguments: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have been started and wait for a line."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.serving.limit_process", url, *arguments]
    started = [
        subprocess.Popen(command, env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(n)
    ]
    try:
        assert [said(each) for each in started] == ["ready"] * n
        yield started
    finally:
        for each in started:
            each.kill()
            each.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def release(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.usefixtures("database")
def test_four_processes_together_keep_a_limit(database_url: str) -> None:
    with processes(database_url, 4, ["13", "10", "requests_per_minute"]) as started:
        for each in started:
            release(each)
        assert sum(int(said(each)) for each in started) == 10


@pytest.mark.parametrize("field", ["concurrency", "user_concurrency"])
def test_the_slots_of_a_killed_process_come_back(database: Database, database_url: str, field: str) -> None:
    ahead = Clock()
    ahead.at = time.time()
    with processes(database_url, 1, ["3", "3", field]) as [holder]:
        release(holder)
        assert said(holder) == "3"
        key = key_of(KeyLimits(**{field: 3}), "shared")
        limiter = limiter_on(database, ahead)
        assert asyncio.run(take_all(limiter, key, 2)) == []
        holder.kill()
        ahead.at = time.time() + SLOT_TTL_S
        assert len(asyncio.run(take_all(limiter_on(database, ahead, "two"), key, 5))) == 3


async def test_what_is_not_used_is_there_for_others_a_moment_later(database: Database, clock: Clock) -> None:
    one, two = limiter_on(database, clock), limiter_on(database, clock, "two")
    key = key_of(KeyLimits(requests_per_minute=2, tokens_per_minute=100, concurrency=1))
    held = await one.reserve(key, "", 100)
    with pytest.raises(RateLimited):
        await two.reserve(key, "", 1)
    held.settle(40)
    await one.flush()
    clock.at += 1.0
    last = await two.reserve(key, "", 60)
    assert headers_of(last)["x-ratelimit-remaining-tokens"] == "0"
    last.refund()
    await two.flush()
    clock.at += 1.0
    again = await one.reserve(key, "", 60)
    again.settle(90)
    await one.flush()
    clock.at += 1.0
    with pytest.raises(RateLimited):
        await two.reserve(key, "", 1)
    assert used(database, "tokens") == 130
    for limiter in (one, two):
        await limiter.stop()


def used(database: Database, name: str) -> int:
    with database.read() as connection:
        query = sa.select(sa.func.sum(limit_windows.c.used)).where(limit_windows.c.name == name)
        return int(connection.execute(query).scalar() or 0)


async def test_a_large_limit_needs_the_database_for_few_of_its_requests(database: Database, clock: Clock) -> None:
    limiter = limiter_on(database, clock)
    key = key_of(KeyLimits(requests_per_minute=6400, tokens_per_minute=6_400_000, concurrency=640))
    (await limiter.reserve(key, "", 1000)).settle(1000)
    asked = 0
    for _ in range(500):
        reservation = limiter.try_reserve(key, "", 1000)
        if reservation is None:
            asked += 1
            reservation = await limiter.reserve(key, "", 1000)
        reservation.settle(1000)
    assert asked <= 10
    clock.at += IDLE_S
    await limiter.flush()
    assert used(database, "requests") == 501
    assert used(database, "tokens") == 501_000
    assert limiter._active == {}
    await limiter.stop()


@pytest.mark.parametrize("field", ["concurrency", "user_concurrency"])
async def test_slots_in_use_are_kept_and_free_ones_given_back(database: Database, clock: Clock, field: str) -> None:
    limiter, other = limiter_on(database, clock), limiter_on(database, clock, "two")
    key = key_of(KeyLimits(**{field: 3}))
    held = await take_all(limiter, key, 3)
    for _ in range(6):
        clock.at += SLOT_TTL_S / 2
        await limiter.flush()
    assert await take_all(other, key, 1) == []
    held[0].settle(1)
    await limiter.flush()
    clock.at += 1.0
    assert len(await take_all(other, key, 2)) == 1
    await limiter.stop()
    await other.stop()


def slots_held(database: Database) -> list[int]:
    with database.read() as connection:
        return sorted(connection.execute(sa.select(limit_slots.c.n_slots)).scalars())


async def test_the_slots_of_many_users_are_kept_and_given_back_in_few_questions(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(database: Database, leases: list[Lease], *, holder: str, expires_at: float) -> bool:
        sizes.append(len(leases))
        return hold_slots(database, leases, holder=holder, expires_at=expires_at)

    monkeypatch.setattr("serving.database_limits.hold_slots", noted)
    limiter, other = limiter_on(database, clock), limiter_on(database, clock, "two")
    key = key_of(KeyLimits(user_concurrency=2, concurrency=600))
    held = [await limiter.reserve(key, str(number), 1) for number in range(165)]
    for _ in range(3):
        clock.at += SLOT_TTL_S / 2
        await limiter.flush()
    assert sum(sizes) == 3 * 166
    assert len(sizes) == 6
    assert len(slots_held(database)) == 166
    for each in held[1:]:
        each.refund()
    await limiter.flush()
    assert slots_held(database)[0] == 1
    assert len(slots_held(database)) == 2
    clock.at += 1.0
    for number, may in ((0, 1), (1, 2)):
        made = [await other.reserve(key, str(number), 1) for _ in range(may)]
        with pytest.raises(RateLimited):
            await other.reserve(key, str(number), 1)
        for each in made:
            each.settle(1)
    held[0].settle(1)
    await limiter.stop()
    await other.stop()
    assert slots_held(database) == []
    assert limiter._ledger.accounts["k1"].leased == set()


async def test_slots_that_users_were_lent_are_counted_when_the_database_is_back(
    database: Database, clock: Clock
) -> None:
    away = Interrupted(database.engine)
    away.is_away = True
    limiter, other = limiter_on(away, clock), limiter_on(database, clock, "two")
    key = key_of(KeyLimits(user_concurrency=4, user_tokens_per_day=100))
    held = await take_all(limiter, key, 9)
    assert len(held) == 2
    held[0].settle(5)
    away.is_away = False
    await limiter.flush()
    assert slots_held(database) == [1]
    assert used(database, "user_budget") == 15
    clock.at += 1.0
    assert len(await take_all(other, key, 9)) == 3
    held[1].refund()
    await limiter.stop()
    await other.stop()
    assert slots_held(database) == [3]
    assert used(database, "user_budget") == 35


async def test_the_database_remembers_the_budgets_of_users_that_the_process_forgets(
    database: Database, clock: Clock
) -> None:
    limiter = limiter_on(database, clock)
    limiter._ledger = Ledger(starts_full=False, max_users=10)
    key = key_of(KeyLimits(user_tokens_per_day=100))
    for number in range(40):
        (await limiter.reserve(key, str(number), 70)).settle(70)
        await limiter.flush()
        clock.at += 1.0
    assert "" not in limiter._ledger.accounts["k1"].users
    for number in range(40):
        clock.at += 1.0
        with pytest.raises(RateLimited):
            await limiter.reserve(key, str(number), 31)
    await limiter.stop()
    assert used(database, "user_budget") == 40 * 70


def test_what_comes_back_after_its_window_is_void_and_what_is_owed_is_not(database: Database, clock: Clock) -> None:
    ask = Ask("k1", "tokens", 100, MINUTE_S, 40, 0, 0.0)

    def grant() -> Grant | Short:
        granted = take(database, [ask], holder="one", now=clock.at, slots_expire_at=0.0)
        return granted if isinstance(granted, Short) else granted[0]

    first_end = clock.at + MINUTE_S
    assert grant() == Grant(40, 60, first_end)
    clock.at = first_end
    assert grant() == Grant(40, 60, first_end + MINUTE_S)
    report(database, [Report("k1", "tokens", MINUTE_S, 40, first_end)], now=clock.at)
    assert used(database, "tokens") == 40
    report(database, [Report("k1", "tokens", MINUTE_S, -30, first_end)], now=clock.at)
    assert used(database, "tokens") == 70
    assert grant() == Short(0, 30, first_end + MINUTE_S)
    report(database, [Report("k1", "tokens", MINUTE_S, 99, first_end + MINUTE_S)], now=clock.at)
    assert used(database, "tokens") == 0


def test_all_that_is_asked_for_is_granted_or_nothing_is_charged(database: Database, clock: Clock) -> None:
    asks = [Ask("k1", "requests", 100, MINUTE_S, 1, 0, 0.0), Ask("k1", "concurrency", 1, math.inf, 1, 0, math.inf)]

    def grants() -> list[Grant] | Short:
        return take(database, asks, holder="one", now=clock.at, slots_expire_at=clock.at + 10.0)

    assert isinstance(grants(), list)
    assert grants() == Short(1, 0, math.inf)
    assert used(database, "requests") == 1
    clock.at += 10.0
    assert isinstance(grants(), list)


async def test_a_refusal_is_believed_for_a_moment_only(database: Database, clock: Clock) -> None:
    limiter = limiter_on(database, clock)
    key = key_of(KeyLimits(requests_per_minute=1))
    await limiter.reserve(key, "", 1)
    with pytest.raises(RateLimited) as caught:
        await limiter.reserve(key, "", 1)
    assert caught.value.headers["retry-after"] == "60"
    with pytest.raises(RateLimited):
        limiter.try_reserve(key, "", 1)
    clock.at += 1.0
    assert limiter.try_reserve(key, "", 1) is None
    clock.at += 59.0
    await limiter.reserve(key, "", 1)
    await limiter.stop()


class Interrupted(Database):
    """A database that a test can take away."""

    is_away = False

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self.stuck = threading.Event()
        self.stuck.set()
        self.n_asked = 0

    def _check(self) -> None:
        self.n_asked += 1
        self.stuck.wait(30)
        if self.is_away:
            raise sa.exc.OperationalError("SELECT", {}, Exception("the database is away"))

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        self._check()
        with super().read() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        self._check()
        with super().write() as connection:
            yield connection


async def test_without_the_database_each_process_hands_out_its_share(database: Database, clock: Clock) -> None:
    away = Interrupted(database.engine)
    limiter, other = limiter_on(away, clock), limiter_on(database, clock, "two")
    key = key_of(KeyLimits(requests_per_minute=10, tokens_per_day=10_000, concurrency=10))
    away.is_away = True
    held = await take_all(limiter, key, 20)
    assert len(held) == 5
    assert not limiter.is_database_up
    clock.at += MINUTE_S
    for each in held:
        each.settle(10)
    for _ in range(4):
        assert limiter.try_reserve(key, "", 10)
    await limiter.flush()
    assert not limiter.is_database_up
    away.is_away = False
    await limiter.flush()
    assert limiter.is_database_up
    assert used(database, "requests") == 4
    assert used(database, "budget") == 90
    clock.at += 1.0
    assert len(await take_all(other, key, 20)) == 6
    await limiter.stop()
    await other.stop()


async def test_without_a_share_nothing_is_handed_out_without_the_database(database: Database, clock: Clock) -> None:
    away = Interrupted(database.engine)
    away.is_away = True
    limiter = limiter_on(away, clock, share=0.0)
    key = key_of(KeyLimits(requests_per_minute=10))
    for _ in range(2):
        with pytest.raises(Overloaded) as caught:
            await limiter.reserve(key, "", 1)
        assert caught.value.headers["retry-after"]
    assert limiter.try_reserve(key_of(None), "", 1) is NO_LIMITS
    await limiter.stop()


async def test_a_database_that_hangs_holds_nobody_up_for_long(database: Database, clock: Clock) -> None:
    hanging = Interrupted(database.engine)
    hanging.stuck.clear()
    limiter = DatabaseLimiter(hanging, holder="one", clock=clock, share_without_database=0.5, patience_s=0.5)
    key = key_of(KeyLimits(requests_per_minute=10))
    assert len(await take_all(limiter, key, 20)) == 5
    assert not await limiter._is_back()
    hanging.stuck.set()
    await asyncio.to_thread(eventually, lambda: not limiter._running)
    limiter._patience_s = 60.0
    await limiter.flush()
    assert limiter.is_database_up
    await limiter.stop()


@pytest.mark.parametrize("patience_s", [60.0, 1.0])
async def test_what_is_granted_after_the_client_left_is_used_by_the_next(
    database: Database, clock: Clock, patience_s: float
) -> None:
    slow = Interrupted(database.engine)
    slow.stuck.clear()
    limiter = DatabaseLimiter(slow, holder="one", clock=clock, share_without_database=0.0, patience_s=patience_s)
    key = key_of(KeyLimits(tokens_per_day=6_400_000))
    waiting = asyncio.create_task(limiter.reserve(key, "", 10))
    await asyncio.to_thread(eventually, lambda: slow.n_asked)
    if patience_s == 60.0:
        waiting.cancel()
    with pytest.raises((asyncio.CancelledError, Overloaded)):
        await waiting
    slow.stuck.set()
    await asyncio.to_thread(eventually, lambda: limiter._active)
    limiter._patience_s = 60.0
    await limiter.flush()
    assert limiter.is_database_up
    (await limiter.reserve(key, "", 10)).settle(10)
    assert used(database, "budget") == 100_000
    await limiter.stop()
    assert used(database, "budget") == 10


@pytest.mark.parametrize(("patience_s", "stop_s"), [(0.05, 60.0), (60.0, 0.05)])
async def test_stopping_waits_for_a_hanging_database_only_once(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch, patience_s: float, stop_s: float
) -> None:
    hanging = Interrupted(database.engine)
    limiter = limiter_on(hanging, clock)
    for number in range(5):
        (await limiter.reserve(key_of(KeyLimits(tokens_per_minute=100), f"k{number}"), "", 10)).settle(5)
    hanging.stuck.clear()
    before = hanging.n_asked
    limiter._patience_s = patience_s
    monkeypatch.setattr("serving.database_limits.STOP_S", stop_s)
    async with asyncio.timeout(25):
        await limiter.stop()
    assert hanging.n_asked <= before + 1
    hanging.stuck.set()
    await asyncio.to_thread(eventually, lambda: not limiter._running)


async def test_many_users_are_reported_a_bounded_number_at_a_time(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(database: Database, reports: list[Report], *, now: float) -> bool:
        sizes.append(len(reports))
        return report(database, reports, now=now)

    monkeypatch.setattr("serving.database_limits.report", noted)
    away = Interrupted(database.engine)
    away.is_away = True
    limiter = limiter_on(away, clock)
    key = key_of(KeyLimits(user_requests_per_minute=10, user_tokens_per_minute=100))
    await limiter.reserve(key, "0", 10)
    for number in range(1, 600):
        assert limiter.try_reserve(key, str(number), 10)
    away.is_away = False
    await limiter.flush()
    assert sum(sizes) == 1200
    assert max(sizes) <= 500
    assert used(database, "user_requests") == 600
    assert used(database, "user_tokens") == 6000
    assert not limiter._ledger.accounts["k1"].touched
    await limiter.flush()
    assert sum(sizes) == 1200
    clock.at += MINUTE_S
    await limiter.flush()
    assert len(limiter._ledger.accounts["k1"].users) == 100
    await limiter.stop()


async def test_whoever_is_asked_for_the_first_time_is_not_forgotten_meanwhile(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Interrupted(database.engine)
    limiter = limiter_on(slow, clock)
    key = key_of(KeyLimits(user_concurrency=1))
    await limiter.reserve(key, "ann", 10)
    flush_users, asked = limiter._flush_users, asyncio.Event()
    waiting: list[asyncio.Task[Reservation]] = []

    async def flush_users_and_ask(*given: Any) -> None:
        await flush_users(*given)
        slow.stuck.clear()
        n_before = slow.n_asked
        waiting.append(asyncio.create_task(limiter.reserve(key, "bob", 10)))
        await asyncio.to_thread(eventually, lambda: slow.n_asked > n_before)
        asked.set()

    monkeypatch.setattr(limiter, "_flush_users", flush_users_and_ask)
    flushing = asyncio.create_task(limiter.flush())
    await asked.wait()
    await asyncio.wait({flushing}, timeout=0.2)
    slow.stuck.set()
    await flushing
    assert isinstance(await waiting[0], Reservation)


async def test_a_user_s_large_part_goes_back_when_the_key_is_idle(database: Database, clock: Clock) -> None:
    limiter = limiter_on(database, clock)
    key = key_of(KeyLimits(user_tokens_per_minute=6400))
    (await limiter.reserve(key, "ann", 10)).settle(10)
    await limiter.flush()
    assert used(database, "user_tokens") == 100
    clock.at += IDLE_S
    await limiter.flush()
    assert used(database, "user_tokens") == 10
    assert limiter._active == {}
    await limiter.stop()


def test_two_reports_on_one_limit_both_count(database: Database, clock: Clock) -> None:
    owed = Report("k1", "tokens", MINUTE_S, -30, clock.at)
    report(database, [owed, owed], now=clock.at)
    assert used(database, "tokens") == 60


async def test_a_started_limiter_gives_back_by_itself(database: Database) -> None:
    limiter = open_limiter(LimitSettings(store="database"), database, Clock())
    assert isinstance(limiter, DatabaseLimiter)
    limiter._patience_s = 60.0  # As above.
    limiter.start()
    held = await limiter.reserve(key_of(KeyLimits(tokens_per_minute=100)), "", 100)
    held.settle(30)
    await asyncio.to_thread(eventually, lambda: used(database, "tokens") == 30)
    await limiter.stop()


async def test_a_cancelled_question_stays_cancelled_though_its_answer_comes_at_that_moment(database: Database) -> None:
    """Else the one who stops the limiter would wait for ever for its flusher."""
    limiter = open_limiter(LimitSettings(store="database"), database, Clock())
    assert isinstance(limiter, DatabaseLimiter)

    def leave(_: bool | None) -> None:
        asking.cancel()

    asking = asyncio.create_task(limiter._call(lambda: True, leave))
    with pytest.raises(asyncio.CancelledError):
        await asking
    await limiter.stop()


async def test_stopping_gives_back_all_but_what_is_in_use(database: Database, clock: Clock) -> None:
    limiter = limiter_on(database, clock)
    key = key_of(KeyLimits(tokens_per_minute=6400, concurrency=640))
    held = [await limiter.reserve(key, "", 10) for _ in range(2)]
    held[0].settle(10)
    await limiter.stop()
    assert used(database, "tokens") == 20
    assert slots_held(database) == [1]


def test_the_settings_choose_the_limiter(database: Database) -> None:
    assert isinstance(open_limiter(LimitSettings(), database, Clock()), MemoryLimiter)
    assert default_limits(LimitSettings(concurrency=3)) == KeyLimits(concurrency=3)


SHARED = KeyLimits(
    requests_per_minute=6,
    tokens_per_minute=1000,
    concurrency=4,
    tokens_per_day=4000,
    user_tokens_per_minute=400,
    user_concurrency=3,
    user_tokens_per_day=1500,
)
"""So that some limits are handed out in parts of several units, and some one by one."""


class SharedMachine(RuleBasedStateMachine):
    """Two processes and one database: no window ever gives more than its limit, and what is not used comes back."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.database = open_database(DatabaseSettings(url=f"sqlite:///{self.directory.name}/shared.db"))
        sa.event.listen(self.database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
        metadata.create_all(self.database.engine)
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.limiters = [limiter_on(self.database, self.clock, holder) for holder in ("one", "two")]
        self.charges: list[dict[str, Any]] = []

    def teardown(self) -> None:
        for limiter in self.limiters:
            self.runner.run(limiter.stop())
        self.runner.close()
        self.database.close()
        self.directory.cleanup()

    def _reserve(self, process: int, user: str, tokens: int) -> Any:
        limiter = self.limiters[process]
        reservation = self.runner.run(limiter.reserve(key_of(SHARED), user, tokens))
        made = [
            {"name": (each.subject, each.rule.name), "limit": each.limit, "ends": ends, "cost": each.cost(tokens)}
            for each, ends in zip(reservation._allowances, reservation._ends, strict=True)
        ]
        self.charges += made
        return reservation, made, tokens

    @rule(target=held, process=st.integers(0, 1), user=st.sampled_from(["", "ann"]), tokens=st.integers(1, 500))
    def reserve(self, process: int, user: str, tokens: int) -> Any:
        try:
            return self._reserve(process, user, tokens)
        except RateLimited:
            return multiple()

    @rule(one=consumes(held), share=st.floats(0.0, 1.0))
    def settle(self, one: Any, share: float) -> None:
        reservation, made, tokens = one
        reservation.settle(int(tokens * share))
        for each in made:
            fixed = {"concurrency": 0, "user_concurrency": 0, "requests": 1}
            each["cost"] = fixed.get(each["name"][1], int(tokens * share))

    @rule(one=consumes(held))
    def refund(self, one: Any) -> None:
        reservation, made, _ = one
        reservation.refund()
        for each in made:
            each["cost"] = 0

    @rule(process=st.integers(0, 1))
    def flush(self, process: int) -> None:
        self.runner.run(self.limiters[process].flush())

    @rule(seconds=st.sampled_from([0.1, 0.3, 4.0]), times=st.integers(1, 16))
    def wait(self, seconds: float, times: int) -> None:
        for _ in range(times):  # As a running limiter does, it renews its slots on the way.
            self.clock.at += seconds
            for process in (0, 1):
                self.flush(process)

    @rule(target=held, process=st.integers(0, 1), user=st.sampled_from(["", "ann"]), tokens=st.integers(1, 500))
    def reserve_after_a_calm(self, process: int, user: str, tokens: int) -> Any:
        """When everything unused has gone back, exactly what the limits allow is admitted."""
        self.wait(IDLE_S / 2, 3)
        admits = all(
            self._used(name) + (1 if name[1] in ("requests", "concurrency", "user_concurrency") else tokens) <= limit
            for name, limit in self._limits(user)
        )
        try:
            made = self._reserve(process, user, tokens)
        except RateLimited:
            assert not admits
            return multiple()
        assert admits
        return made

    def _limits(self, user: str) -> list[tuple[tuple[str, str], int]]:
        claims = Ledger(starts_full=False).claims("k1", SHARED, user, 0.0)
        return [((each.subject, each.rule.name), each.limit) for each in claims.allowances]

    def _used(self, name: tuple[str, str]) -> int:
        return sum(each["cost"] for each in self.charges if each["name"] == name and each["ends"] > self.clock.at)

    @invariant()
    def no_window_gives_more_than_its_limit(self) -> None:
        windows: dict[Any, int] = defaultdict(int)
        for each in self.charges:
            windows[each["name"], each["ends"], each["limit"]] += each["cost"]
        assert all(total <= limit for (_, _, limit), total in windows.items())


TestSharedMachine = SharedMachine.TestCase
TestSharedMachine.settings = settings(STEADY, max_examples=25, stateful_step_count=25)
