"""Asks the worker how toxic texts are, over HTTP, without a task: the answer comes by a callback."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import orjson

from serving.connections import EnginePool, Reason, Sent

PATH = b"/score"
MAX_CHARS = 100_000
"""Of one request; the worker takes a little more."""
MAX_ASKING = 256
"""Requests at once; more would only wait in the worker until they are too late."""
MAX_ANSWER_BYTES = 64 * 1024

Told = Callable[[Sequence[float] | None], None]
"""Gets each text's toxicity from 0 to 1, or None where there is no telling; never before `ask` has returned."""


class ScorerClient:
    """One worker's scorer."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """
        Raises:
            ValueError: `url` is not the address of an HTTP server.
        """
        self._pool = EnginePool(url, connect_s=timeout_s, max_idle=32)
        self._timeout_s = timeout_s
        self._n_asking = 0

    def ask(self, texts: Sequence[str], told: Told) -> None:
        """Have texts scored; `told` is called once, at the latest when the time is up."""
        loop = asyncio.get_running_loop()
        if self._n_asking >= MAX_ASKING or sum(map(len, texts)) > MAX_CHARS:
            loop.call_soon(told, None)
            return
        self._n_asking += 1
        question = _Question(self._pool, orjson.dumps({"texts": texts}), len(texts), self._told(told))
        question.limit = loop.call_later(self._timeout_s, question.give_up)
        question.send()

    def _told(self, told: Told) -> Told:
        def end(scores: Sequence[float] | None) -> None:
            self._n_asking -= 1
            told(scores)

        return end

    async def close(self) -> None:
        await self._pool.close()


class _Question:
    """One request; see `serving.connections.Answer`."""

    def __init__(self, pool: EnginePool, body: bytes, n_texts: int, told: Told) -> None:
        self._pool = pool
        self._body = body
        self._n_texts = n_texts
        self._told: Told | None = told
        self._sent: Sent | None = None
        self._status = 0
        self._answer = b""
        self._n_sent = 0
        self.limit: asyncio.TimerHandle | None = None

    def send(self) -> None:
        self._n_sent += 1
        self._sent = self._pool.send(PATH, b"", self._body, self)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:  # noqa: ARG002 - the interface's
        self._status = status

    def on_body(self, data: bytes) -> None:
        self._answer += data
        if len(self._answer) > MAX_ANSWER_BYTES:
            self.give_up()

    def on_end(self) -> None:
        self._end(parse_scores(self._answer, self._n_texts) if self._status == 200 else None)

    def on_failure(self, reason: Reason, was_sent: bool) -> None:  # noqa: ARG002 - the interface's
        if reason == "stale" and self._n_sent == 1 and self._told is not None:
            self.send()
        else:
            self._end(None)

    def give_up(self) -> None:
        if self._sent is not None:
            self._sent.abort()
        self._end(None)

    def _end(self, scores: Sequence[float] | None) -> None:
        told, self._told = self._told, None
        if self.limit is not None:
            self.limit.cancel()
        if told is not None:
            told(scores)


def parse_scores(answer: bytes, n_texts: int) -> list[float] | None:
    """The worker's scores; None where the answer is not one to each text.

    >>> parse_scores(b'{"toxicity": [0.25]}', 1)
    [0.25]
    >>> parse_scores(b'{"toxicity": []}', 1)
    """
    try:
        scores = orjson.loads(answer)["toxicity"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if not isinstance(scores, list) or len(scores) != n_texts:
        return None
    is_fine = all(isinstance(score, int | float) and math.isfinite(score) and 0 <= score <= 1 for score in scores)
    return [float(score) for score in scores] if is_fine else None
