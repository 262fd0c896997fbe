"""The evaluation as a round and `pawl gate` both do it: who is compared, on which prompts, and who judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from feedback.judged.constitution import load_constitution
from feedback.judged.judge import judge_of
from feedback.pairs import PreferencePair
from pawl.settings import GateSettings, RetrainSettings, Settings
from retrain.dataset import Origin
from retrain.evaluation import (
    Contender,
    Evaluation,
    EvaluationPlan,
    ProbeSets,
    ScoreToxicity,
    evaluate,
    holdout_probes,
    load_probes,
)
from retrain.looks import chance_to_pass, looks_of, plan_looks
from retrain.wins import LlmUmpire, Umpire, reward_umpire


def examine(
    settings: Settings,
    plan: EvaluationPlan,
    holdout: Sequence[PreferencePair],
    score_toxicity: ScoreToxicity | None,
    directory: Path,
) -> Evaluation:
    """Measure everything that the settings ask for.

    Args:
        directory: where benchmarks leave their files.

    Raises:
        PawlError: something that is asked for could not be measured.
    """
    with umpire_of(settings, plan) as umpire:
        return evaluate(plan, holdout, score_toxicity, umpire=umpire, directory=directory)


def plan_of(
    settings: Settings,
    alias: str,
    base: tuple[str, str],
    contenders: tuple[Contender, Contender],
    holdout: Sequence[PreferencePair],
) -> EvaluationPlan:
    """How a candidate is compared with its parent.

    Args:
        base: what to load as the base model, and what the engines call it.
        contenders: the parent and the candidate.
    """
    retrain = settings.retrain
    parent, candidate = contenders
    return EvaluationPlan(
        base_model=base[0],
        parent=parent,
        candidate=candidate,
        engine_url=settings.serving.models[alias].engines[0],
        probes=probes_of(retrain, holdout),
        dtype=retrain.training.dtype,
        max_length=retrain.training.max_length,
        batch_size=retrain.training.batch_size,
        toxicity_threshold=settings.worker.scoring.toxicity_threshold,
        gate=retrain.gate,
        seed=retrain.seed,
        base_served=base[1],
    )


def probes_of(settings: RetrainSettings, holdout: Sequence[PreferencePair]) -> ProbeSets:
    """The configured probes, and the prompts of the hold-out."""
    limit = settings.gate.max_prompts
    harmful, benign = settings.harmful_probes, settings.benign_probes
    return ProbeSets(
        harmful=load_probes(harmful, limit) if harmful else (),
        benign=load_probes(benign, limit) if benign else (),
        holdout=holdout_probes((pair for pair in holdout if pair.source != Origin.ORIGINAL), limit),
    )


DISAGREEMENT = 0.1
"""Of answers by two models that are as good: where one in twenty is refused by either, one in ten differs."""


def chances_of(probes: ProbeSets, gate: GateSettings) -> Mapping[str, float]:
    """About how likely each check on answers passes a candidate that is as good as its parent, at the last look."""
    last = looks_of(plan_looks(gate.samples_per_prompt, gate.max_samples_per_prompt), gate.alpha)[-1]
    asked = {
        "harmful_refusal": (probes.harmful, gate.harmful_refusal_margin),
        "over_refusal": (probes.benign, gate.over_refusal_margin),
        "toxicity": (probes.all, gate.toxicity_margin),
        "stop_rate": (probes.harmless, gate.stop_margin),
        "echo": (probes.harmless, gate.echo_margin),
    }
    return {
        name: round(chance_to_pass(len(some), last, margin, disagreement=DISAGREEMENT), 3) if some else 0.0
        for name, (some, margin) in asked.items()
    }


@contextmanager
def umpire_of(settings: Settings, plan: EvaluationPlan) -> Iterator[Umpire | None]:
    """Whoever `retrain.gate.judge` names.

    Raises:
        ConfigurationError: the judge is not configured.
        BadAdapter: the reward model cannot be used.
    """
    gate = settings.retrain.gate
    if gate.judge == "llm":
        wanted = settings.feedback.judge
        judge = judge_of(wanted)
        try:
            yield LlmUmpire(judge, load_constitution(wanted.constitution), wanted.response_format, wanted.concurrency)
        finally:
            judge.close()
    elif gate.judge == "reward_model" and gate.reward_model is not None:
        from retrain.reward_model import RewardModel  # Loads a model; the others do not need one.

        yield reward_umpire(RewardModel.load(gate.reward_model, plan.base_model, dtype=plan.dtype))
    else:
        yield None
