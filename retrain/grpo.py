"""Training on the model's own answers with TRL: better ones than the others to the same prompt become likelier.

GRPO (Shao et al. 2024, "DeepSeekMath", section 4.1): several answers to each prompt are drawn and scored, and each is
worth its score less the group's mean, in standard deviations of the group. The loss adds up tokens over the batch
instead of within each answer, so that long bad answers are not let off lightly (Yu et al. 2025, "DAPO", eq. 12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer

from feedback.chat_messages import for_templates
from pawl.errors import ConfigurationError
from pawl.settings import GRPOSettings
from retrain.answer_scores import ScoreAnswers
from retrain.base_model import load_base, quiet_renames
from retrain.errors import PreflightFailed
from retrain.preflight import encoder_of
from retrain.progress import Report, ignore
from retrain.prompts import Prompt
from retrain.reward_functions import for_trl
from retrain.trl_training import (
    Course,
    adapter_to_train,
    can_pad,
    export_adapter,
    fit,
    prepare_torch,
    rendering,
    shared_arguments,
)

# After trl_training, which keeps TRL from reporting home when it is imported.
from datasets import Dataset, Features, Json, List  # isort: skip
from trl import GRPOConfig, GRPOTrainer  # isort: skip

SHARE_COMPARED = 0.2
"""The first and the last so many steps are what `reward_first` and `reward_last` are the means of."""


@dataclass(frozen=True)
class GRPORun:
    """Everything one training depends on besides its prompts and its reward."""

    base_model: str
    """Directory or hub name to train on."""
    serving_base: str
    """What the engine calls the same model; written into the adapter."""
    parent_adapter: Path | None
    """The adapter to continue, and the reference that the divergence is measured from; None for the base."""
    output_dir: Path
    settings: GRPOSettings
    seed: int


@dataclass(frozen=True)
class GRPOResult:
    """A trained adapter and how its reward went."""

    adapter_dir: Path
    course: Course
    reward_first: float
    """Mean reward of the answers in the first fifth of the steps."""
    reward_last: float
    """The same in the last fifth."""
    kl_last: float | None
    """Divergence from the parent per token in the last fifth; None where it is not measured, for beta is 0."""
    generation: str
    n_left_out: int
    """Prompts that are too long."""


def train(run: GRPORun, prompts: Sequence[Prompt], score: ScoreAnswers, report: Report = ignore) -> GRPOResult:
    """Train an adapter to score higher.

    Raises:
        BadData: the reward does not give one finite number per answer.
        PreflightFailed: there is no prompt that is short enough.
        TrainingFailed: no usable weights came out.
    """
    prepare_torch(run.settings)
    tokenizer = can_pad(AutoTokenizer.from_pretrained(run.base_model, padding_side="left"))
    encoder = encoder_of(tokenizer)
    with rendering():
        short = [one for one in prompts if len(encoder.prompt(one)) <= run.settings.max_prompt_tokens]
    if not short:
        raise PreflightFailed(f"of {len(prompts)} prompts, none has at most {run.settings.max_prompt_tokens} tokens")
    generation = generator(run.settings, on_gpu=torch.cuda.is_available(), has_vllm=find_spec("vllm") is not None)
    with quiet_renames():
        trainer = _trainer(run, short, tokenizer, score, generation)
        course = fit(trainer, method=f"grpo {generation}", n_examples=len(short), report=report)
    first, last = ends(course.history)
    return GRPOResult(
        adapter_dir=export_adapter(trainer.model, run.output_dir / "adapter", run.serving_base),
        course=course,
        reward_first=_mean(first, "reward") or 0.0,
        reward_last=_mean(last, "reward") or 0.0,
        kl_last=_mean(last, "kl"),
        generation=generation,
        n_left_out=len(prompts) - len(short),
    )


def generator(settings: GRPOSettings, *, on_gpu: bool, has_vllm: bool) -> str:
    """What writes the answers: "vllm" or "transformers".

    Raises:
        ConfigurationError: vLLM is asked for where it cannot be had.
    """
    if settings.generation == "vllm" and not (on_gpu and has_vllm):
        raise ConfigurationError("retrain.grpo.generation is vllm: that takes a GPU and vLLM beside the trainer")
    if settings.generation == "auto":
        return "vllm" if on_gpu and has_vllm else "transformers"
    return settings.generation


def ends(history: Sequence[Mapping[str, float]]) -> tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]]]:
    """The first and the last fifth of the logged steps, at least one each."""
    n = max(1, round(SHARE_COMPARED * len(history)))
    return history[:n], history[-n:]


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    found = [row[name] for row in rows if name in row]
    return fmean(found) if found else None


def _trainer(
    run: GRPORun, prompts: Sequence[Prompt], tokenizer: AutoTokenizer, score: ScoreAnswers, generation: str
) -> GRPOTrainer:
    settings = run.settings
    reward = for_trl(
        score, limit=settings.max_answer_tokens, buffer=settings.length_buffer, weight=settings.length_weight
    )
    model, fresh = adapter_to_train(load_base(run.base_model, settings.dtype), run.parent_adapter, settings)
    return GRPOTrainer(
        model,
        reward_funcs=[reward],
        args=GRPOConfig(**_arguments(run, generation)),
        train_dataset=_dataset(prompts),
        processing_class=tokenizer,
        peft_config=fresh,
    )


def _arguments(run: GRPORun, generation: str) -> dict[str, Any]:
    settings = run.settings
    drawn = {
        "num_generations": settings.answers_per_prompt,
        "temperature": settings.temperature,
        "max_completion_length": settings.max_answer_tokens,
        "use_vllm": generation == "vllm",
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.vllm_memory,
        "vllm_max_model_length": settings.max_prompt_tokens + settings.max_answer_tokens,
    }
    shared = shared_arguments(settings, run.output_dir, n_steps=settings.steps, seed=run.seed)
    return {**shared, **drawn, "max_steps": settings.steps, "beta": settings.beta, "loss_type": "dapo"}


def _dataset(prompts: Sequence[Prompt]) -> Dataset:
    """Messages as JSON: a table would fill in fields that a message does not have, and templates ask for those."""
    rows = [{"prompt": [for_templates(message) for message in prompt]} for prompt in prompts]
    return Dataset.from_list(rows, features=Features({"prompt": List(Json())}))
