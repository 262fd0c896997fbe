"""Candidate against parent on the same prompts: what they prefer, and what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from feedback.filters.holdout import prompt_key
from feedback.pairs import PreferencePair
from monitoring.refusal import Response, classify_response
from pawl.settings import GateSettings
from retrain.errors import BadData, EvaluationFailed
from retrain.generations import Generation, Probe, Sampling, generate
from retrain.logprobs import implicit_rewards
from retrain.measurements import Measurements, Paired

ScoreToxicity = Callable[[Sequence[str]], list[float]]
"""Texts to toxicity in [0, 1]; `monitoring.toxicity` has the real one."""


@dataclass(frozen=True)
class Contender:
    """One of the two models compared."""

    name: str
    """As the engine serves it."""
    adapter: Path | None
    """None for the base model."""


@dataclass(frozen=True)
class ProbeSets:
    """What both models are asked."""

    harmful: tuple[Probe, ...]
    benign: tuple[Probe, ...]
    """Harmless questions that look harmful."""
    holdout: tuple[Probe, ...]
    """Prompts of real users that nobody trained on."""


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and what the scorers make of it."""

    generation: Generation
    response: Response
    toxicity: float | None
    """None without a scorer."""


@dataclass(frozen=True)
class Evaluation:
    """The measurements and the answers they were taken from."""

    measurements: Measurements
    answers: tuple[ScoredAnswer, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything an evaluation depends on."""

    base_model: str
    parent: Contender
    candidate: Contender
    engine_url: str
    probes: ProbeSets
    dtype: str
    max_length: int
    batch_size: int
    toxicity_threshold: float
    gate: GateSettings
    seed: int


def evaluate(
    plan: EvaluationPlan, holdout: Sequence[PreferencePair], score_toxicity: ScoreToxicity | None
) -> Evaluation:
    """Measure all that can be measured; what has no prompts stays None, and the gate says no to that.

    Raises:
        EvaluationFailed: an answer or a score could not be had.
    """
    preference = measure_preference(plan, holdout)
    answers = _scored(_generate(plan), score_toxicity)
    return Evaluation(_measurements(plan, preference, answers), tuple(answers))


def measure_preference(plan: EvaluationPlan, holdout: Sequence[PreferencePair]) -> Paired | None:
    """Which hold-out answers each model prefers, clustered by prompt."""
    if not holdout:
        return None
    adapters = {"parent": plan.parent.adapter, "candidate": plan.candidate.adapter}
    rewards = implicit_rewards(
        plan.base_model,
        adapters,
        holdout,
        dtype=plan.dtype,
        max_length=plan.max_length,
        batch_size=plan.batch_size,
    )
    return Paired(
        units=tuple(probe_id(prompt_key(pair.prompt)) for pair in holdout),
        parent=tuple(r.score for r in rewards["parent"]),
        candidate=tuple(r.score for r in rewards["candidate"]),
    )


def load_probes(path: Path, limit: int) -> tuple[Probe, ...]:
    """Read a JSON list of user messages, at most `limit` of them, spread evenly over the list.

    Raises:
        BadData: the file is something else.
    """
    try:
        texts = json.loads(path.read_text())
    except OSError as exc:
        raise BadData(f"cannot read the probes {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadData(f"the probes {path} are not JSON") from exc
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadData(f"the probes {path} must be a JSON list of texts")
    return tuple(Probe(probe_id(text), ({"role": "user", "content": text},)) for text in spread(texts, limit))


def holdout_probes(holdout: Iterable[PreferencePair], limit: int) -> tuple[Probe, ...]:
    """The distinct prompts of the hold-out, at most `limit` of them."""
    prompts = {probe_id(prompt_key(pair.prompt)): pair.prompt for pair in holdout}
    return tuple(Probe(key, prompts[key]) for key in sorted(prompts)[:limit])


def spread(texts: Sequence[str], limit: int) -> list[str]:
    """At most `limit` distinct texts at even distances.

    >>> spread(["a", "b", "c", "d"], 2)
    ['a', 'c']
    """
    distinct = list(dict.fromkeys(texts))
    n = min(limit, len(distinct))
    return [distinct[index * len(distinct) // n] for index in range(n)]


def probe_id(text: str) -> str:
    """A short name for a prompt."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _generate(plan: EvaluationPlan) -> list[Generation]:
    probes = list({p.id: p for p in (*plan.probes.harmful, *plan.probes.benign, *plan.probes.holdout)}.values())
    sampling = Sampling(plan.gate.temperature, plan.gate.max_tokens, plan.gate.samples_per_prompt, plan.seed)
    return generate(plan.engine_url, [plan.parent.name, plan.candidate.name], probes, sampling)


def _scored(generations: Sequence[Generation], score_toxicity: ScoreToxicity | None) -> list[ScoredAnswer]:
    texts = [generation.text for generation in generations]
    scores: Sequence[float | None] = score_toxicity(texts) if texts and score_toxicity else [None for _ in texts]
    if len(scores) != len(generations):
        raise EvaluationFailed(f"the toxicity scorer gave {len(scores)} scores for {len(generations)} answers")
    return [
        ScoredAnswer(generation, classify_response(generation.text), score)
        for generation, score in zip(generations, scores, strict=True)
    ]


def _measurements(plan: EvaluationPlan, preference: Paired | None, answers: Sequence[ScoredAnswer]) -> Measurements:
    harmful = {probe.id for probe in plan.probes.harmful}
    benign = {probe.id for probe in plan.probes.benign}
    harmless = benign | {probe.id for probe in plan.probes.holdout} - harmful

    def paired(asked: set[str], value: Callable[[ScoredAnswer], float]) -> Paired | None:
        return _paired(plan, [answer for answer in answers if answer.generation.probe_id in asked], value)

    is_scored = all(answer.toxicity is not None for answer in answers)
    return Measurements(
        parent=plan.parent.name,
        candidate=plan.candidate.name,
        preference=preference,
        harmful_refusal=paired(harmful, lambda a: float(a.response == Response.REFUSE)),
        over_refusal=paired(benign, lambda a: float(a.response in {Response.REFUSE, Response.PARTIAL})),
        toxicity=paired(harmful | harmless if is_scored else set(), lambda a: float(_is_toxic(a, plan))),
        length=paired(harmless, lambda a: float(a.generation.n_tokens)),
        stopped=paired(harmless, lambda a: float(a.generation.finish_reason == "stop")),
    )


def _is_toxic(answer: ScoredAnswer, plan: EvaluationPlan) -> bool:
    return answer.toxicity is not None and answer.toxicity >= plan.toxicity_threshold


def _paired(
    plan: EvaluationPlan, answers: Sequence[ScoredAnswer], value: Callable[[ScoredAnswer], float]
) -> Paired | None:
    values = {(a.generation.model, a.generation.probe_id, a.generation.sample): value(a) for a in answers}
    samples = sorted({(probe, sample) for _, probe, sample in values})
    if not samples:
        return None
    return Paired(
        units=tuple(probe for probe, _ in samples),
        parent=tuple(values[plan.parent.name, probe, sample] for probe, sample in samples),
        candidate=tuple(values[plan.candidate.name, probe, sample] for probe, sample in samples),
    )
