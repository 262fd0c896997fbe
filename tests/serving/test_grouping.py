"""Grouped calls: each gets its own result, and what comes while one is under way goes together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.grouping import Grouped


class Doubling:
    """Doubles numbers, at a sign, and says how they came; odd groups of one can be made to fail."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.go = asyncio.Event()
        self.problem: Exception | None = None

    async def __call__(self, items: Sequence[int]) -> Sequence[int]:
        self.groups.append(list(items))
        await self.go.wait()
        if self.problem is not None:
            raise self.problem
        return [2 * item for item in items]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(st.lists(st.integers(), min_size=1, max_size=30), st.integers(1, 8))
def test_everybody_gets_their_own_result(numbers: list[int], most: int) -> None:
    async def run() -> None:
        work = Doubling()
        grouped = Grouped(work, most=most)
        asked = [asyncio.ensure_future(grouped(number)) for number in numbers]
        await settle()
        work.go.set()
        assert await asyncio.gather(*asked) == [2 * number for number in numbers]
        assert [number for group in work.groups for number in group] == numbers
        assert all(len(group) == most for group in work.groups[:-1])

    asyncio.run(run())


def test_what_comes_meanwhile_goes_together() -> None:
    async def run() -> None:
        work = Doubling()
        grouped = Grouped(work, most=100)
        first = asyncio.ensure_future(grouped(1))
        await settle()
        others = [asyncio.ensure_future(grouped(number)) for number in (2, 3, 4)]
        await settle()
        assert work.groups == [[1]]
        work.go.set()
        assert await asyncio.gather(first, *others) == [2, 4, 6, 8]
        assert work.groups == [[1], [2, 3, 4]]
        assert await grouped(5) == 10

    asyncio.run(run())


def test_a_caller_that_leaves_takes_only_what_still_waits() -> None:
    async def run() -> None:
        work = Doubling()
        grouped = Grouped(work, most=100)
        asked = [asyncio.ensure_future(grouped(1))]
        await settle()
        asked += [asyncio.ensure_future(grouped(number)) for number in (2, 3)]
        await settle()
        asked[0].cancel()
        asked[1].cancel()
        work.go.set()
        assert await asked[2] == 6
        assert work.groups == [[1], [3]]

    asyncio.run(run())


def test_a_failure_is_everybodys_and_the_next_group_is_served() -> None:
    async def run() -> None:
        work = Doubling()
        work.problem = OSError("no disk")
        work.go.set()
        grouped = Grouped(work, most=100)
        for told in await asyncio.gather(grouped(1), grouped(2), return_exceptions=True):
            assert told is work.problem
        work.problem = None
        assert await grouped(3) == 6

    asyncio.run(run())


def test_a_group_is_never_empty() -> None:
    async def run() -> None:
        work = Doubling()
        grouped = Grouped(work, most=100)
        left = asyncio.ensure_future(grouped(1))
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        work.go.set()
        assert await grouped(2) == 4
        assert [] not in work.groups

    asyncio.run(run())
