"""Answers of two models to the same prompts, taken from the engine that would serve them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from feedback.interactions import Message
from retrain.errors import EvaluationFailed

CONCURRENCY = 64
"""Questions to one engine at a time: it answers them together, in hardly more time than one."""
ATTEMPTS = 3
RETRY_WAIT_S = 0.5
ANSWER_TIMEOUT_S = 300.0

Found = TypeVar("Found")


@dataclass(frozen=True)
class Probe:
    """A prompt that both models answer."""

    id: str
    prompt: tuple[Message, ...]


@dataclass(frozen=True)
class Generation:
    """One answer."""

    probe_id: str
    sample: int
    model: str
    text: str
    finish_reason: str
    n_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float
    max_tokens: int
    n_samples: int
    seed: int
    first_sample: int = 0
    """Where earlier ones are there already."""

    @property
    def samples(self) -> range:
        """Which ones are drawn."""
        return range(self.first_sample, self.n_samples)

    def fields(self, probe_id: str, sample: int) -> dict[str, Any]:
        """Of a request for one sample of one probe: the same for every model."""
        seed = sample_seed(self.seed, probe_id, sample)
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}


class Asking:
    """A connection to one engine that no more than `CONCURRENCY` questions use at once."""

    def __init__(self, session: aiohttp.ClientSession, engine_url: str) -> None:
        self._session = session
        self._url = engine_url.rstrip("/")
        self._gate = asyncio.Semaphore(CONCURRENCY)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the engine answers.

        Raises:
            EvaluationFailed: it refuses, or does not answer however often it is asked.
        """
        async with self._gate:
            return await _post(self._session, f"{self._url}{path}", body)


def generate(engine_url: str, models: Sequence[str], probes: Sequence[Probe], sampling: Sampling) -> list[Generation]:
    """Ask every model every probe; results are ordered by model, probe and sample.

    Raises:
        EvaluationFailed: an answer could not be had; a rate over the others would be a guess.
    """

    def questions(asking: Asking) -> list[Coroutine[Any, Any, Generation]]:
        return [
            _ask(asking, model, probe, sample, sampling)
            for model in models
            for probe in probes
            for sample in sampling.samples
        ]

    return ask_all(engine_url, questions)


def ask_all(engine_url: str, questions: Callable[[Asking], Sequence[Coroutine[Any, Any, Found]]]) -> list[Found]:
    """The results of many questions to one engine, in their order.

    Raises:
        EvaluationFailed: one of them failed.
    """

    async def run() -> list[Found]:
        async with _asking(engine_url) as asking, asyncio.TaskGroup() as group:
            tasks = [group.create_task(question) for question in questions(asking)]
        return [task.result() for task in tasks]

    try:
        return asyncio.run(run())
    except* EvaluationFailed as failures:
        first = failures.exceptions[0]
        raise EvaluationFailed(f"{len(failures.exceptions)} answers could not be had: {first}") from first


def sample_seed(seed: int, probe_id: str, sample: int) -> int:
    """The engine's seed for one sample of one probe, the same for every model."""
    key = "\x1f".join((str(seed), probe_id, str(sample))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) >> 1


@asynccontextmanager
async def _asking(engine_url: str) -> AsyncIterator[Asking]:
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Asking(session, engine_url)


async def _ask(asking: Asking, model: str, probe: Probe, sample: int, sampling: Sampling) -> Generation:
    messages = [dict(message) for message in probe.prompt]
    body = {"model": model, "messages": messages, **sampling.fields(probe.id, sample)}
    answer = await asking.post("/v1/chat/completions", body)
    try:
        choice = answer["choices"][0]
        return Generation(
            probe_id=probe.id,
            sample=sample,
            model=model,
            text=choice["message"]["content"] or "",
            finish_reason=str(choice["finish_reason"]),
            n_tokens=int(answer["usage"]["completion_tokens"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise EvaluationFailed(f"{model} gave an answer that is not a chat completion") from exc


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    problem = "no attempt was made"
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_WAIT_S * 2**attempt)
        try:
            async with session.post(url, json=body) as response:
                if response.status == 200:
                    return dict(await response.json())
                problem = f"{response.status} {(await response.text())[:200]}"
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            problem = f"{type(exc).__name__} {exc}"
            continue
        if response.status < 500:
            break
    raise EvaluationFailed(f"{url}: {problem.strip()}")
