"""Candidate against parent on the same prompts: what they prefer, and what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import structlog

from feedback.filters.holdout import prompt_key
from feedback.interactions import Message
from feedback.pairs import PreferencePair
from monitoring.refusal import Response, classify_response
from pawl.settings import GateSettings
from retrain.benchmarks import run_benchmarks
from retrain.capability import is_solved, load_tasks
from retrain.divergence import measure_divergences
from retrain.echo import is_echo
from retrain.errors import BadData, EvaluationFailed
from retrain.gate import cannot_tell_yet, judge
from retrain.generations import Generation, Probe, Sampling, generate
from retrain.judged_sets import duels_of, load_questions
from retrain.logprobs import implicit_rewards
from retrain.looks import plan_looks
from retrain.measurements import Divergence, Measurements, Paired, Wins
from retrain.wins import Duel, Umpire, hold

log = structlog.get_logger()

ScoreToxicity = Callable[[Sequence[str]], list[float]]
"""Texts to toxicity in [0, 1]; `monitoring.toxicity` has the real one."""

DRAWN = ("harmful_refusal", "over_refusal", "toxicity", "length", "stopped", "echo")
"""Fields of `Measurements` that are made from drawn answers, of which there can be more."""

UNANSWERED = frozenset({Response.REFUSE, Response.PARTIAL, Response.EMPTY})
"""What a harmless request should not get."""


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

    @property
    def harmless(self) -> tuple[Probe, ...]:
        """Everything that should be answered; what users ask is not always."""
        harmful = {probe.id for probe in self.harmful}
        return (*self.benign, *(probe for probe in self.holdout if probe.id not in harmful))

    @property
    def all(self) -> tuple[Probe, ...]:
        """Each probe once."""
        return tuple({probe.id: probe for probe in (*self.harmful, *self.benign, *self.holdout)}.values())


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
    base_served: str = ""
    """What the engine calls the base model; the parent's name by default."""

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        gate = self.gate
        return Sampling(gate.temperature, gate.max_tokens, gate.samples_per_prompt, self.seed)

    @property
    def looks(self) -> tuple[int, ...]:
        """How many answers there are to each prompt at every look."""
        return plan_looks(self.gate.samples_per_prompt, self.gate.max_samples_per_prompt)

    @property
    def one_each(self) -> Sampling:
        """The same, one sample of each prompt."""
        return replace(self.sampling, n_samples=1)


def evaluate(
    plan: EvaluationPlan,
    holdout: Sequence[PreferencePair],
    score_toxicity: ScoreToxicity | None,
    *,
    umpire: Umpire | None = None,
    directory: Path | None = None,
) -> Evaluation:
    """Measure all that can be measured; what has no prompts stays None, and the gate says no to that.

    Answers are drawn until the checks on them can tell, or there are as many as the settings allow.

    Args:
        umpire: who compares answers, where the settings ask for a judge.
        directory: where benchmarks leave their files, where the settings ask for some.

    Raises:
        EvaluationFailed: an answer or a score could not be had.
    """
    preference = measure_preference(plan, holdout)
    answers = scored(generate(plan.engine_url, _names(plan), plan.probes.all, plan.sampling), score_toxicity)
    measured = measure_answers(_names(plan), plan.probes, answers, plan.toxicity_threshold)
    measured = replace(measured, looks=plan.looks, preference=preference, by_source=by_source(preference, holdout))
    drift = _divergences(plan)
    measured = replace(measured, kl_parent=drift.get("kl_parent"), kl_base=drift.get("kl_base"))
    measured = replace(measured, capability=measure_capability(plan))
    if umpire is not None:
        wins = hold(duels(plan, answers), umpire)
        measured = replace(measured, wins=wins, judged_sets=_judged_sets(plan, umpire))
    if directory is not None:
        args = (plan.gate.lm_eval, plan.engine_url, _names(plan), plan.base_model, directory)
        measured = replace(measured, benchmarks=run_benchmarks(*args))
    return _until_it_can_tell(plan, Evaluation(measured, tuple(answers)), score_toxicity)


def _until_it_can_tell(plan: EvaluationPlan, found: Evaluation, score_toxicity: ScoreToxicity | None) -> Evaluation:
    """Ask again what the undecided checks are about, where they are all that is between the candidate and a verdict."""
    for n_before, n_answers in pairwise(plan.looks):
        undecided = cannot_tell_yet(judge(found.measurements, plan.gate))
        probes = asked_by(plan.probes, undecided)
        if not probes:
            break
        log.info("asked_again", checks=sorted(undecided), prompts=len(probes), answers=n_answers)
        sampling = replace(plan.sampling, first_sample=n_before, n_samples=n_answers)
        more = scored(generate(plan.engine_url, _names(plan), probes, sampling), score_toxicity)
        answers = (*found.answers, *more)
        measured = measure_answers(_names(plan), plan.probes, answers, plan.toxicity_threshold)
        newer = {name: getattr(measured, name) for name in DRAWN}
        found = Evaluation(replace(found.measurements, **newer), answers)
    return found


def asked_by(probes: ProbeSets, checks: Collection[str]) -> tuple[Probe, ...]:
    """What some of the checks on answers are measured on, each probe once."""
    asked = {"harmful_refusal": probes.harmful, "over_refusal": probes.benign, "toxicity": probes.all}
    needed = [asked.get(check, probes.harmless) for check in checks]
    return tuple({probe.id: probe for some in needed for probe in some}.values())


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


def by_source(preference: Paired | None, holdout: Sequence[PreferencePair]) -> dict[str, Paired]:
    """The same by where the pairs come from."""
    if preference is None:
        return {}
    rows: dict[str, list[int]] = {}
    for index, pair in enumerate(holdout):
        rows.setdefault(pair.source, []).append(index)
    return {source: _part(preference, indices) for source, indices in rows.items()}


def measure_answers(
    names: Sequence[str], probes: ProbeSets, answers: Sequence[ScoredAnswer], toxicity_threshold: float
) -> Measurements:
    """What the answers of parent and candidate (in this order) show."""
    harmful, benign, harmless = (
        {probe.id for probe in some} for some in (probes.harmful, probes.benign, probes.harmless)
    )
    asked = {probe.id: _last_words(probe.prompt) for probe in probes.all}

    def paired(ids: set[str], value: Callable[[ScoredAnswer], float]) -> Paired | None:
        return _paired(names, [answer for answer in answers if answer.generation.probe_id in ids], value)

    def echoes(answer: ScoredAnswer) -> float:
        return float(is_echo(asked[answer.generation.probe_id], answer.generation.text))

    def is_toxic(answer: ScoredAnswer) -> float:
        return float(answer.toxicity is not None and answer.toxicity >= toxicity_threshold)

    is_scored = all(answer.toxicity is not None for answer in answers)
    parent, candidate = names
    return Measurements(
        parent=parent,
        candidate=candidate,
        harmful_refusal=paired(harmful, lambda a: float(a.response == Response.REFUSE)),
        over_refusal=paired(benign, lambda a: float(a.response in UNANSWERED)),
        toxicity=paired(harmful | harmless if is_scored else set(), is_toxic),
        length=paired(harmless, lambda a: float(a.generation.n_tokens)),
        stopped=paired(harmless, lambda a: float(a.generation.finish_reason == "stop")),
        echo=paired(harmless, echoes),
    )


def measure_capability(plan: EvaluationPlan) -> Paired | None:
    """Which tasks of the capability set each model solves; None without a set. Greedy: a slip is not a loss."""
    if plan.gate.capability_set is None:
        return None
    tasks = {task.probe.id: task for task in load_tasks(plan.gate.capability_set)}
    greedy = replace(plan.one_each, temperature=0.0)
    answers = generate(plan.engine_url, _names(plan), [task.probe for task in tasks.values()], greedy)
    return _paired(
        _names(plan), scored(answers, None), lambda a: float(is_solved(tasks[a.generation.probe_id], a.generation.text))
    )


def duels(plan: EvaluationPlan, answers: Sequence[ScoredAnswer]) -> list[Duel]:
    """The first answers of both to prompts that a judge may be shown: users' own only if the settings say so."""
    benign = plan.probes.benign
    of_users = plan.probes.harmless[len(benign) :] if plan.gate.judge_users else ()
    shown = [*_alternating(of_users, benign)]
    first = {(a.generation.model, a.generation.probe_id): a.generation for a in answers if a.generation.sample == 0}
    found = []
    for probe in shown[: plan.gate.judge_prompts]:
        theirs, ours = first[plan.parent.name, probe.id], first[plan.candidate.name, probe.id]
        found.append(Duel(probe.id, probe.prompt, theirs.text, ours.text, float(ours.n_tokens - theirs.n_tokens)))
    return found


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


def scored(generations: Sequence[Generation], score_toxicity: ScoreToxicity | None) -> list[ScoredAnswer]:
    """The answers with what the scorers make of them.

    Raises:
        EvaluationFailed: the toxicity scorer has lost some.
    """
    texts = [generation.text for generation in generations]
    scores: Sequence[float | None] = score_toxicity(texts) if texts and score_toxicity else [None for _ in texts]
    if len(scores) != len(generations):
        raise EvaluationFailed(f"the toxicity scorer gave {len(scores)} scores for {len(generations)} answers")
    return [
        ScoredAnswer(generation, classify_response(generation.text), score)
        for generation, score in zip(generations, scores, strict=True)
    ]


def _names(plan: EvaluationPlan) -> tuple[str, str]:
    return plan.parent.name, plan.candidate.name


def _divergences(plan: EvaluationPlan) -> Mapping[str, Divergence | None]:
    """What the settings have a limit for."""
    others = {"kl_parent": plan.parent.name, "kl_base": plan.base_served or plan.parent.name}
    limits = {"kl_parent": plan.gate.kl_parent_limit, "kl_base": plan.gate.kl_base_limit}
    wanted = {name: other for name, other in others.items() if limits[name] is not None}
    if not wanted:
        return {}
    probes = [*_alternating(plan.probes.holdout, plan.probes.benign)][: plan.gate.kl_prompts]
    found = measure_divergences(plan.engine_url, plan.candidate.name, [*wanted.values()], probes, plan.one_each)
    return {name: found.get(other) for name, other in wanted.items()}


def _alternating(*groups: Sequence[Probe]) -> Iterator[Probe]:
    """One of each group in turn, so that a part of all has some of each."""
    for place in range(max(map(len, groups))):
        yield from (group[place] for group in groups if place < len(group))


def _judged_sets(plan: EvaluationPlan, umpire: Umpire) -> dict[str, Wins]:
    found = {}
    for one in plan.gate.judged_sets:
        asked = load_questions(one.path)
        said = duels_of(plan.engine_url, plan.parent.name, plan.candidate.name, asked, plan.one_each)
        if (wins := hold(said, umpire)) is not None:
            found[one.name] = wins
    return found


def _part(paired: Paired, indices: Sequence[int]) -> Paired:
    return Paired(
        units=tuple(paired.units[index] for index in indices),
        parent=tuple(paired.parent[index] for index in indices),
        candidate=tuple(paired.candidate[index] for index in indices),
    )


def _paired(
    names: Sequence[str], answers: Sequence[ScoredAnswer], value: Callable[[ScoredAnswer], float]
) -> Paired | None:
    values = {(a.generation.model, a.generation.probe_id, a.generation.sample): value(a) for a in answers}
    samples = sorted({(probe, sample) for _, probe, sample in values})
    if not samples:
        return None
    parent, candidate = names
    return Paired(
        units=tuple(probe for probe, _ in samples),
        parent=tuple(values[parent, probe, sample] for probe, sample in samples),
        candidate=tuple(values[candidate, probe, sample] for probe, sample in samples),
    )


def _last_words(prompt: Sequence[Message]) -> str:
    """What the user said last."""
    said = [message.get("content") for message in prompt if message.get("role") == "user"]
    return said[-1] if said and isinstance(said[-1], str) else ""
