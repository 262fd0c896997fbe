"""Training a reward model with TRL: the chosen answer shall score higher than the rejected one.

P(chosen over rejected) = sigmoid(r(chosen) - r(rejected)): Bradley and Terry 1952, as in Ouyang et al. 2022, eq. 1. The
term (r(chosen) + r(rejected))^2 keeps scores around 0 (Eisenstein et al. 2023, "Helping or herding?", section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, set_seed

from feedback.pairs import PreferencePair
from pawl.settings import RewardSettings
from retrain.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from retrain.answer_scores import Accuracy, Compared, ScoreAnswers, accuracy_of, checked_scores
from retrain.base_model import quiet_renames
from retrain.dataset import TrainingExample
from retrain.errors import PreflightFailed
from retrain.lora import reward_shape
from retrain.preflight import encoder_of
from retrain.progress import Report, ignore
from retrain.reward_model import RewardModel, headed_base, tokens_of
from retrain.trl_training import Course, can_pad, fit, prepare_torch, rendering, shared_arguments, steps_of

# After trl_training, which keeps TRL from reporting home when it is imported.
from datasets import Dataset  # isort: skip
from trl import RewardConfig, RewardTrainer  # isort: skip

Preference = PreferencePair | TrainingExample


@dataclass(frozen=True)
class RewardRun:
    """Everything the training of a reward model depends on besides its pairs."""

    base_model: str
    output_dir: Path
    settings: RewardSettings
    seed: int


@dataclass(frozen=True)
class RewardResult:
    """A trained reward model, in memory and as files."""

    directory: Path
    course: Course
    accuracy: Accuracy
    """On the hold-out."""
    n_shortened: int
    """Answers of the training set of whose conversation the beginning is not read."""


def train(
    run: RewardRun, pairs: Sequence[Preference], holdout: Sequence[Preference], report: Report = ignore
) -> RewardResult:
    """Train on `pairs` and measure on `holdout`.

    Raises:
        PreflightFailed: the pairs would teach nothing.
        TrainingFailed: no usable weights came out.
    """
    prepare_torch(run.settings)
    tokenizer = can_pad(AutoTokenizer.from_pretrained(run.base_model))
    with rendering():
        rows, n_shortened = _rows(pairs, tokenizer, run.settings.max_length)
    with quiet_renames():
        trainer = _trainer(run, rows, tokenizer)
        course = fit(trainer, method="reward model", n_examples=len(rows), report=report)
    model = RewardModel(
        trainer.model, tokenizer, max_length=run.settings.max_length, batch_size=2 * run.settings.batch_size
    )
    accuracy = accuracy_of(compare(model, holdout))
    return RewardResult(_export(trainer.model, run.output_dir / "model"), course, accuracy, n_shortened)


def compare(score: ScoreAnswers, pairs: Sequence[Preference]) -> list[Compared]:
    """What is made of each pair."""
    sides = [(*pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    scores = checked_scores(score, sides)
    chosen, rejected = scores[::2], scores[1::2]
    return [Compared(pair.source, *two) for pair, *two in zip(pairs, chosen, rejected, strict=True)]


def _rows(
    pairs: Sequence[Preference], tokenizer: AutoTokenizer, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Token ids of both sides, tokenised as they will be for scoring, and how many were too long to be read whole."""
    encoder = encoder_of(tokenizer)
    chosen, rejected = (
        [tokens_of((*pair.prompt, side(pair)), encoder, max_length + 1) for pair in pairs]
        for side in (attrgetter("chosen"), attrgetter("rejected"))
    )
    n_long = sum(len(tokens) > max_length for tokens in (*chosen, *rejected))
    cut = zip(*([tokens[-max_length:] for tokens in side] for side in (chosen, rejected)), strict=True)
    rows = [{"chosen_ids": one, "rejected_ids": other} for one, other in cut if one != other]
    if not rows:
        raise PreflightFailed("there is no pair to learn from")
    return rows, n_long


def _trainer(run: RewardRun, rows: Sequence[dict[str, list[int]]], tokenizer: AutoTokenizer) -> RewardTrainer:
    set_seed(run.seed)  # The head starts random.
    base = headed_base(run.base_model, run.settings.dtype, tokenizer)
    n_steps = steps_of(len(rows), run.settings.epochs, run.settings)
    arguments = RewardConfig(
        **shared_arguments(run.settings, run.output_dir, n_steps=n_steps, seed=run.seed),
        num_train_epochs=run.settings.epochs,
        max_length=run.settings.max_length,
        center_rewards_coefficient=run.settings.centre or None,
    )
    return RewardTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=reward_shape(base, rank=run.settings.lora_rank, alpha=run.settings.lora_alpha),
    )


def _export(model: PeftModel, directory: Path) -> Path:
    model.save_pretrained(str(directory), save_embedding_layers=False)
    for path in directory.iterdir():
        if path.name not in {ADAPTER_CONFIG, ADAPTER_WEIGHTS}:
            path.unlink()
    return directory
