"""Users who ask gateways without a pause, and know what they should be answered by."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import aiohttp

PAUSE_S = 0.005
"""Between an answer and the next question: several gateways and the engine share a few cores with us."""
TIMEOUT_S = 30.0
VARIANT_HEADER = "x-pawl-variant"


class Asker:
    """One connection to one gateway. Its fields are read from other threads: they are replaced, never changed."""

    def __init__(self, url: str, alias: str, pause_s: float = PAUSE_S) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._alias = alias
        self._pause_s = pause_s
        self._expected: Mapping[str, str] = {}
        self.seen_at: Mapping[str, float] = {}
        """By variant, when (`time.monotonic`) the last answer by it came."""
        self.n_since_change = 0
        """Answers in a row by the variant that answered last."""
        self.n_as_expected = 0
        """Answers in a row by the variant of the user who asked."""
        self.n_answers = 0
        self.n_unexpected = 0
        """Answers by another variant than the user's."""
        self.failures: tuple[str, ...] = ()
        self._last = ""

    def expect(self, variants: Mapping[str, str]) -> None:
        """Ask for these users from now on, each of whom has a variant; none asks nothing. Counting starts again."""
        self._expected = variants
        self._reset()

    def start_again(self) -> None:
        """Count from nothing, with the same users; answers that are on their way do not count."""
        self.expect(dict(self._expected))

    def _reset(self) -> None:
        self.seen_at, self.failures = {}, ()
        self.n_since_change = self.n_as_expected = self.n_answers = self.n_unexpected = 0
        self._last = ""

    async def ask_for_ever(self, session: aiohttp.ClientSession) -> None:
        """One question after the other, until cancelled."""
        while True:
            expected = self._expected
            for user, variant in expected.items():
                await self._ask(session, user, variant)
                await asyncio.sleep(self._pause_s)
                if self._expected is not expected:
                    break
            if not expected:
                await asyncio.sleep(self._pause_s)

    async def _ask(self, session: aiohttp.ClientSession, user: str, variant: str) -> None:
        expected = self._expected
        body = {"model": self._alias, "user": user, "messages": [{"role": "user", "content": "How do I prune roses?"}]}
        try:
            async with session.post(self._url, json=body) as response:
                await response.read()
                answered_by = response.headers.get(VARIANT_HEADER, "") if response.status == 200 else ""
                problem = f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as exc:
            answered_by, problem = "", type(exc).__name__
        if expected is not self._expected:
            return  # It was asked before counting started again.
        if answered_by:
            self._count(answered_by, variant)
        else:
            self.failures = (*self.failures, problem)

    def _count(self, answered_by: str, variant: str) -> None:
        self.seen_at = {**self.seen_at, answered_by: time.monotonic()}
        self.n_since_change = self.n_since_change + 1 if answered_by == self._last else 1
        self._last = answered_by
        self.n_as_expected = self.n_as_expected + 1 if answered_by == variant else 0
        self.n_answers += 1
        self.n_unexpected += answered_by != variant


@contextmanager
def asking(askers: Sequence[Asker]) -> Iterator[None]:
    """Have them ask on a thread of their own for as long as the block lasts."""
    is_over = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_ask_all(askers, is_over)), name="askers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(TIMEOUT_S)


async def _ask_all(askers: Sequence[Asker], is_over: threading.Event) -> None:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        tasks = [asyncio.ensure_future(asker.ask_for_ever(session)) for asker in askers]
        await asyncio.to_thread(is_over.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
