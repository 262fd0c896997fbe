"""Simulated users at the gateway's door: they ask, rate, ask again and correct, over real HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from practice.users import SimulatedUser, ask, react

MAX_TOKENS = 48
REQUEST_TIMEOUT_S = 60.0


@dataclass
class TrafficCount:
    """What the users did."""

    users: int = 0
    interactions: int = 0
    feedback: int = 0
    failures: int = 0


@dataclass(frozen=True)
class Visit:
    """How a group of users behaves."""

    url: str
    alias: str
    questions_each: int
    seed: int


class Visitor:
    """One user's session."""

    def __init__(self, session: aiohttp.ClientSession, visit: Visit, user: SimulatedUser, count: TrafficCount) -> None:
        self._session = session
        self._visit = visit
        self._user = user
        self._count = count
        self._rng = random.Random(f"{visit.seed}/{user.id}")

    async def stay(self) -> None:
        """Ask this user's questions one after the other."""
        self._count.users += 1
        for _ in range(self._visit.questions_each):
            await self._ask_and_rate(ask(self._user, self._rng))

    async def _ask_and_rate(self, messages: list[Any]) -> None:
        question = messages[-1]["content"]
        first = await self._complete(messages, None)
        if first is None:
            return
        reaction = react(self._user, question, first[1], self._rng)
        await self._rate(first[0], reaction.thumb)
        if reaction.edit is not None:
            await self._give({"completion_id": first[0], "type": "edit", "value": reaction.edit})
        if reaction.regenerate:
            second = await self._complete(messages, first[0])
            if second is not None:
                await self._rate(second[0], react(self._user, question, second[1], self._rng).thumb)

    async def _complete(self, messages: list[Any], regenerate_of: str | None) -> tuple[str, str] | None:
        """`(completion id, text)`, or None when the request failed."""
        body: dict[str, Any] = {
            "model": self._visit.alias,
            "messages": messages,
            "user": self._user.id,
            "temperature": 1.0,
            "max_tokens": MAX_TOKENS,
            "seed": self._rng.randrange(2**31),
        }
        if regenerate_of:
            body["metadata"] = {"regenerate_of": regenerate_of}
        answer = await self._post("/v1/chat/completions", body)
        if answer is None:
            return None
        self._count.interactions += 1
        return answer["id"], answer["choices"][0]["message"]["content"] or ""

    async def _rate(self, completion_id: str, thumb: str | None) -> None:
        if thumb is not None:
            await self._give({"completion_id": completion_id, "type": "thumbs", "value": thumb})

    async def _give(self, feedback: dict[str, Any]) -> None:
        if await self._post("/v1/feedback", feedback | {"user": self._user.id}) is not None:
            self._count.feedback += 1

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            async with self._session.post(self._visit.url + path, json=body) as response:
                answer: dict[str, Any] = await response.json()
                if response.status < 300:
                    return answer
        except (aiohttp.ClientError, TimeoutError):
            pass
        self._count.failures += 1
        return None


async def send_users(
    visit: Visit,
    users: Iterable[SimulatedUser],
    *,
    concurrency: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_user: Callable[[TrafficCount], None] = lambda _: None,
) -> TrafficCount:
    """Let `users` in, `concurrency` at a time, until they have all been or `should_stop` says so."""
    count = TrafficCount()
    waiting = iter(users)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency), timeout=timeout) as session:

        async def door() -> None:
            for user in waiting:
                if should_stop():
                    return
                await Visitor(session, visit, user, count).stay()
                on_user(count)

        await asyncio.gather(*(door() for _ in range(concurrency)))
    return count
