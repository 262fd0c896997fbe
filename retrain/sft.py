"""Supervised training on demonstrations with TRL: an adapter, or all weights of a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from pawl.settings import SFTSettings
from retrain.base_model import load_base, quiet_renames
from retrain.demonstrations import Demonstration, Labelled, Prepared, prepare
from retrain.errors import PreflightFailed
from retrain.preflight import encoder_of
from retrain.progress import Report, ignore
from retrain.trl_training import (
    Course,
    adapter_to_train,
    can_pad,
    export_adapter,
    fit,
    prepare_torch,
    rendering,
    shared_arguments,
    steps_of,
)

# After trl_training, which keeps TRL from reporting home when it is imported.
from datasets import Dataset  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip


@dataclass(frozen=True)
class SFTRun:
    """Everything one supervised training depends on besides its demonstrations."""

    base_model: str
    """Directory or hub name to train on."""
    serving_base: str
    """What the engine calls the same model; written into the adapter."""
    parent_adapter: Path | None
    """The adapter to continue; None starts a fresh one."""
    output_dir: Path
    settings: SFTSettings
    seed: int


@dataclass(frozen=True)
class SFTResult:
    """What was trained: one of the two directories."""

    adapter_dir: Path | None
    model_dir: Path | None
    """All weights with the tokenizer, as an engine loads them."""
    prepared: Prepared
    course: Course


def train(run: SFTRun, demonstrations: list[Demonstration], report: Report = ignore) -> SFTResult:
    """Train on the answers of the demonstrations.

    Raises:
        PreflightFailed: they would not teach what they should; says how many and why.
        TrainingFailed: no usable weights came out.
    """
    prepare_torch(run.settings)
    tokenizer = can_pad(AutoTokenizer.from_pretrained(run.base_model))
    with rendering():
        prepared = prepare(demonstrations, encoder_of(tokenizer), max_length=run.settings.max_length)
    if prepared.problems:
        raise PreflightFailed("; ".join(prepared.problems))
    with quiet_renames():
        trainer = _trainer(run, prepared, tokenizer)
        course = fit(trainer, method=_method(run), n_examples=len(prepared.rows), report=report)
    if not run.settings.full:
        adapter = export_adapter(trainer.model, run.output_dir / "adapter", run.serving_base)
        return SFTResult(adapter, None, prepared, course)
    directory = run.output_dir / "model"
    trainer.model.save_pretrained(str(directory))
    AutoTokenizer.from_pretrained(run.base_model).save_pretrained(str(directory))
    return SFTResult(None, directory, prepared, course)


def _method(run: SFTRun) -> str:
    if run.settings.full:
        return "sft of all weights"
    return "sft fresh" if run.parent_adapter is None else "sft continued"


def _trainer(run: SFTRun, prepared: Prepared, tokenizer: AutoTokenizer) -> SFTTrainer:
    base = load_base(run.base_model, run.settings.dtype)
    model, fresh = (base, None) if run.settings.full else adapter_to_train(base, run.parent_adapter, run.settings)
    return SFTTrainer(
        model,
        args=_arguments(run, len(prepared.rows)),
        train_dataset=_dataset(prepared.rows),
        processing_class=tokenizer,
        peft_config=fresh,
    )


def _arguments(run: SFTRun, n_rows: int) -> SFTConfig:
    n_steps = steps_of(n_rows, run.settings.epochs, run.settings)
    return SFTConfig(
        **shared_arguments(run.settings, run.output_dir, n_steps=n_steps, seed=run.seed),
        num_train_epochs=run.settings.epochs,
        max_length=None,  # The rows are cut already.
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _dataset(rows: tuple[Labelled, ...]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.tokens for row in rows], "labels": [row.labels for row in rows]})
