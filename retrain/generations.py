"""Answers of two models to the same prompts, taken from the engine that would serve them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from feedback.interactions import Message
from retrain.errors import EvaluationFailed

CONCURRENCY = 16
ATTEMPTS = 3
RETRY_WAIT_S = 0.5
ANSWER_TIMEOUT_S = 300.0


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


def generate(engine_url: str, models: Sequence[str], probes: Sequence[Probe], sampling: Sampling) -> list[Generation]:
    """Ask every model every probe; results are ordered by model, probe and sample.

    Raises:
        EvaluationFailed: an answer could not be had; a rate over the others would be a guess.
    """
    try:
        return asyncio.run(_generate_all(engine_url, models, probes, sampling))
    except* EvaluationFailed as failures:
        first = failures.exceptions[0]
        raise EvaluationFailed(f"{len(failures.exceptions)} answers could not be had: {first}") from first


def sample_seed(seed: int, probe_id: str, sample: int) -> int:
    """The engine's seed for one sample of one probe, the same for every model."""
    key = "\x1f".join((str(seed), probe_id, str(sample))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest()) >> 1


async def _generate_all(
    engine_url: str, models: Sequence[str], probes: Sequence[Probe], sampling: Sampling
) -> list[Generation]:
    gate = asyncio.Semaphore(CONCURRENCY)
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        asked = [
            group.create_task(_ask(session, gate, engine_url, model, probe, sample, sampling))
            for model in models
            for probe in probes
            for sample in range(sampling.n_samples)
        ]
    return [task.result() for task in asked]


async def _ask(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    engine_url: str,
    model: str,
    probe: Probe,
    sample: int,
    sampling: Sampling,
) -> Generation:
    body = {
        "model": model,
        "messages": [dict(message) for message in probe.prompt],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sample_seed(sampling.seed, probe.id, sample),
    }
    async with gate:
        answer = await _post(session, f"{engine_url.rstrip('/')}/v1/chat/completions", body)
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
