"""Asking a candidate what the champion has answered already: through its alias's engines, while they are idle."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from zlib import crc32

import httpx2

from ab_testing.shadow_sampling import request_of
from ab_testing.shadow_store import ShadowAnswer
from feedback.interactions import Interaction
from feedback.recording import parse_answer
from pawl.clock import Clock

PROBE_TIMEOUT_S: Final = 2.0
TIMEOUTS: Final = httpx2.Timeout(None, connect=5.0)
"""For all the rest there is one deadline."""
MAX_METRICS_BYTES: Final = 4 * 1024**2
WAITING: Final = b"vllm:num_requests_waiting{"
ILL: Final = 500
"""From this answer on a health check has failed; an engine that has none answers 404."""
BUSY: Final = frozenset({404, 429, 502, 503, 504})
"""Answers that say nothing about the candidate: no time just now, or its adapter is still to be loaded."""


class Limits(NamedTuple):
    """How an engine may be asked."""

    timeout_s: float
    max_waiting: int
    max_answer_bytes: int


class Busy(NamedTuple):
    """Nothing was asked, or nothing came of it that could be held against the candidate."""

    reason: str


class Asked(NamedTuple):
    """How a few questions went."""

    n_sent: int
    problem: str | None
    """Why nothing was asked, or why some of it has to be asked again."""


Outcome = ShadowAnswer | Busy


async def ask_all(
    engines: Sequence[str],
    questions: Sequence[Interaction],
    candidate: str,
    limits: Limits,
    clock: Clock,
    keep: Callable[[ShadowAnswer], None],
) -> Asked:
    """Ask about several interactions at once, each of another engine in turn.

    Args:
        keep: is given each answer as it comes.
    """
    async with httpx2.AsyncClient(trust_env=False) as client:
        if reason := await why_not_now(client, engines, limits.max_waiting):
            return Asked(0, reason)
        first = crc32(questions[0].id.encode()) if questions else 0  # Not the same few engines every time.
        asked = [
            ask(client, engines[(first + number) % len(engines)], question, candidate, limits, clock)
            for number, question in enumerate(questions)
        ]
        problem: str | None = None
        for done in asyncio.as_completed(asked):
            outcome = await done
            if isinstance(outcome, Busy):
                problem = outcome.reason
            else:
                keep(outcome)
    return Asked(len(asked), problem)


async def why_not_now(client: httpx2.AsyncClient, engines: Sequence[str], max_waiting: int) -> str | None:
    """Why users need the engines for themselves: one is away, so that the others do its work, or requests queue up."""
    found = await asyncio.gather(*(_look_at(client, url) for url in engines))
    if any(waiting is None for waiting in found):
        return "an engine is away"
    return "requests wait" if any(waiting > max_waiting for waiting in found if waiting is not None) else None


async def _look_at(client: httpx2.AsyncClient, url: str) -> float | None:
    """How many requests wait inside an engine, 0 if it does not tell; None if it is not well."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            health, _ = await _body(client, "GET", f"{url}/health", None, MAX_METRICS_BYTES)
            status, metrics = await _body(client, "GET", f"{url}/metrics", None, MAX_METRICS_BYTES)
    except (httpx2.HTTPError, TimeoutError):
        return None
    if health >= ILL:
        return None
    return waiting_in(metrics or b"") if status == 200 else 0.0


def waiting_in(metrics: bytes) -> float:
    """The requests that wait, from an engine's metrics.

    >>> waiting_in(b'# a comment\\nvllm:num_requests_waiting{engine="0"} 3\\nvllm:num_requests_waiting{engine="1"} 1')
    4.0
    """
    lines = (line for line in metrics.splitlines() if line.startswith(WAITING))
    try:
        return sum(float(line.rpartition(b" ")[2]) for line in lines)
    except ValueError:
        return 0.0


async def ask(
    client: httpx2.AsyncClient, url: str, question: Interaction, candidate: str, limits: Limits, clock: Clock
) -> Outcome:
    """One answer. What is the candidate's own fault is an answer too: one with an error."""
    started = time.perf_counter()
    body = request_of(question, candidate)
    found: _Said
    try:
        async with asyncio.timeout(limits.timeout_s):
            status, content = await _body(
                client, "POST", f"{url}/v1/chat/completions", body, limits.max_answer_bytes, f"shadow-{question.id}"
            )
    except TimeoutError:
        found = _Said(error="timeout")
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as exc:
        return Busy(type(exc).__name__)
    except httpx2.HTTPError:
        found = _Said(error="disconnected")
    else:
        if status in BUSY:
            return Busy(f"answered {status}")
        found = _read(status, content)
    return ShadowAnswer(question.id, *found, (time.perf_counter() - started) * 1000, clock())


class _Said(NamedTuple):
    answer: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def _read(status: int, content: bytes | None) -> _Said:
    if status != 200:
        return _Said(error=f"http_{status}")
    if content is None:
        return _Said(error="too_large")
    said = parse_answer(content, is_stream=False)
    if said.message is None or said.finish_reason is None:
        return _Said(error="unreadable")
    return _Said(said.message, said.finish_reason, None, said.prompt_tokens, said.completion_tokens)


async def _body(
    client: httpx2.AsyncClient, method: str, url: str, body: Mapping[str, Any] | None, most: int, request_id: str = ""
) -> tuple[int, bytes | None]:
    """Status and body; no body if it is too large. ASCII goes out, since prompts need not be text for UTF-8."""
    headers = {"content-type": "application/json"} | ({"x-request-id": request_id} if request_id else {})
    content = None if body is None else json.dumps(body).encode()
    received = b""
    async with client.stream(method, url, content=content, headers=headers, timeout=TIMEOUTS) as response:
        async for chunk in response.aiter_bytes():
            received += chunk
            if len(received) > most:
                return response.status_code, None
        return response.status_code, received
