"""How far a candidate has moved from its parent and from the base, in nats per token, by the engine's own numbers.

The candidate answers; then every model says how likely it would have been to say the same tokens. The mean of
log p_candidate - log p_other over the candidate's own tokens estimates KL(candidate || other) without bias. All models
score the same tokens through the same request (`prompt_logprobs`), so neither the sampler's cuts nor a change of
tokenisation gets between them; what the sampler leaves out, such as all but the most likely tokens, is left out of the
mean.
"""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from retrain.errors import EvaluationFailed
from retrain.generations import Asking, Probe, Sampling, ask_all
from retrain.measurements import Divergence

_ADVICE = "where it cannot, set retrain.gate.kl_parent_limit and kl_base_limit to null"


class AnswerTokens(NamedTuple):
    """A prompt with an answer to it, as the engine's own tokens; the answer starts at `start`."""

    probe_id: str
    tokens: tuple[int, ...]
    start: int


def measure_divergences(
    engine_url: str, candidate: str, others: Sequence[str], probes: Sequence[Probe], sampling: Sampling
) -> dict[str, Divergence]:
    """The candidate's divergence from each of the others.

    Raises:
        EvaluationFailed: an answer or a log-probability could not be had.
    """
    answers = [answer for answer in sample_tokens(engine_url, candidate, probes, sampling) if _n_tokens(answer)]
    if not answers:
        return {}
    models = list(dict.fromkeys((candidate, *others)))
    logps = score_tokens(engine_url, models, answers)
    units = tuple(answer.probe_id for answer in answers)
    n_tokens = tuple(float(_n_tokens(answer)) for answer in answers)
    return {
        other: Divergence(
            units, tuple(own - its for own, its in zip(logps[candidate], logps[other], strict=True)), n_tokens
        )
        for other in others
    }


def sample_tokens(engine_url: str, model: str, probes: Sequence[Probe], sampling: Sampling) -> list[AnswerTokens]:
    """One answer to each probe, as tokens."""

    def questions(asking: Asking) -> list[Coroutine[Any, Any, AnswerTokens]]:
        return [_sample(asking, model, probe, sampling) for probe in probes]

    return ask_all(engine_url, questions)


def score_tokens(engine_url: str, models: Sequence[str], answers: Sequence[AnswerTokens]) -> dict[str, list[float]]:
    """The log-probability of each answer by each model."""

    def questions(asking: Asking) -> list[Coroutine[Any, Any, float]]:
        return [_score(asking, model, answer) for model in models for answer in answers]

    found = ask_all(engine_url, questions)
    n = len(answers)
    return {model: found[place * n : (place + 1) * n] for place, model in enumerate(models)}


async def _sample(asking: Asking, model: str, probe: Probe, sampling: Sampling) -> AnswerTokens:
    messages = [dict(message) for message in probe.prompt]
    body = {"model": model, "messages": messages, "return_token_ids": True, **sampling.fields(probe.id, 0)}
    answer = await asking.post("/v1/chat/completions", body)
    try:
        prompt = [int(token) for token in answer["prompt_token_ids"]]
        said = [int(token) for token in answer["choices"][0]["token_ids"]]
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise EvaluationFailed(f"the engine gave no tokens of {model}'s answer; {_ADVICE}") from exc
    return AnswerTokens(probe.id, (*prompt, *said), len(prompt))


async def _score(asking: Asking, model: str, answer: AnswerTokens) -> float:
    body = {"model": model, "prompt": list(answer.tokens), "prompt_logprobs": 0, "max_tokens": 1, "temperature": 0.0}
    found = await asking.post("/v1/completions", body)
    try:
        places: Sequence[Mapping[str, Any] | None] = found["choices"][0]["prompt_logprobs"]
        logps = [_logp(places[index], answer.tokens[index]) for index in range(answer.start, len(answer.tokens))]
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise EvaluationFailed(f"the engine gave no log-probabilities of a prompt for {model}; {_ADVICE}") from exc
    return math.fsum(logps)


def _logp(place: Mapping[str, Any] | None, token: int) -> float:
    if place is None:
        raise ValueError("no log-probability")
    logp = float(place[str(token)]["logprob"])
    if not math.isfinite(logp):
        raise ValueError("not a number")
    return logp


def _n_tokens(answer: AnswerTokens) -> int:
    return len(answer.tokens) - answer.start
