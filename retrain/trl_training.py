"""What all of TRL's trainers are given alike, and what is kept of how a training went."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer it builds unless told not to.

import torch
from datasets import disable_progress_bars
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retrain.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, rewrite_base
from retrain.errors import PreflightFailed, TrainingFailed
from retrain.lora import adapter_shape
from retrain.progress import LoggedStep, Report

MAX_LOGGED_STEPS = 200
WARMUP_SHARE = 0.1
LIBRARIES = ("trl", "transformers", "peft", "torch", "accelerate", "datasets")


class OptimiserSettings(Protocol):
    """What the settings of every training have."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def lora_rank(self) -> int: ...
    @property
    def lora_alpha(self) -> int: ...
    @property
    def dtype(self) -> Literal["bfloat16", "float32"]: ...
    @property
    def gradient_checkpointing(self) -> bool | Literal["auto"]: ...
    @property
    def threads(self) -> int | None: ...


@dataclass(frozen=True)
class Course:
    """How a training went."""

    method: str
    n_examples: int
    n_steps: int
    n_trainable: int
    seconds: float
    loss_first: float
    loss_last: float
    history: tuple[Mapping[str, float], ...]
    """One row per logged step: step, loss, and what the trainer logs beside it."""
    libraries: Mapping[str, str]


def prepare_torch(settings: OptimiserSettings) -> None:
    """Settings of the process; and one bar is enough."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    disable_progress_bars()


def steps_of(n_examples: int, epochs: float, settings: OptimiserSettings, n_processes: int = 1) -> int:
    """How many optimiser steps so many passes take."""
    a_step = settings.batch_size * settings.gradient_accumulation_steps * n_processes
    return math.ceil(n_examples / a_step * epochs)


def shared_arguments(settings: OptimiserSettings, output_dir: Path, *, n_steps: int, seed: int) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` that are the same for every trainer."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(output_dir / "trainer"),
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        # With "auto" whoever builds the trainer may find room to do without.
        "activation_checkpointing": bool(settings.gradient_checkpointing),
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(WARMUP_SHARE * n_steps),  # A share is rounded up: a single step would have no rate at all.
        "logging_steps": max(1, n_steps // MAX_LOGGED_STEPS),
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "bf16": on_gpu and settings.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
    }


def adapter_to_train(
    base: PreTrainedModel, parent: Path | None, settings: OptimiserSettings
) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """The model for a trainer: the base with a fresh adapter's shape, or the parent's adapter on it to go on with."""
    if parent is None:
        return base, adapter_shape(base, rank=settings.lora_rank, alpha=settings.lora_alpha)
    # TRL looks for the adapter under the name "default", which is what from_pretrained gives it.
    return PeftModel.from_pretrained(base, str(parent), is_trainable=True), None


def can_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a token to pad with: TRL takes the end of sequence where there is none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def rendering() -> Iterator[None]:
    """Templates may refuse a conversation, such as one whose turns do not alternate.

    Raises:
        PreflightFailed: the base model's chat template did so.
    """
    try:
        yield
    except TemplateError as exc:
        raise PreflightFailed(f"the chat template refuses a conversation: {exc}") from exc


def fit(trainer: Trainer, *, method: str, n_examples: int, report: Report) -> Course:
    """Train, and look whether it gave usable weights.

    Raises:
        TrainingFailed: the loss or a weight is not a finite number, or nothing was trained.
    """
    started = time.monotonic()
    trainer.remove_callback(PrinterCallback)  # Standard output belongs to the command, not to the trainer.
    trainer.add_callback(_ReportCallback(report))
    trainer.train()
    history = history_of(trainer.state.log_history)
    check_finite(trainer.model, history)
    return Course(
        method=method,
        n_examples=n_examples,
        n_steps=trainer.state.global_step,
        n_trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seconds=time.monotonic() - started,
        loss_first=history[0]["loss"],
        loss_last=history[-1]["loss"],
        history=history,
        libraries={name: version(name) for name in LIBRARIES},
    )


def export_adapter(
    model: PeftModel, directory: Path, base_name: str, weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Save the adapter alone: no copy of the reference, no model card, the base under the name that it is known by.

    Args:
        weights: the adapter's, where the model's own are not whole: each of several processes may hold a part.
    """
    whole = {} if weights is None else {"state_dict": dict(weights)}
    model.save_pretrained(str(directory), selected_adapters=["default"], save_embedding_layers=False, **whole)
    for path in directory.iterdir():
        if path.name not in {ADAPTER_CONFIG, ADAPTER_WEIGHTS}:
            path.unlink()
    rewrite_base(directory, base_name)
    return directory


class _ReportCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.report(LoggedStep(state.global_step, state.max_steps, numbers(logs)))


def history_of(logged: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, float], ...]:
    """The rows of a trainer's log that tell of steps."""
    return tuple(numbers(row) for row in logged if "loss" in row)


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """What a trainer logged, without what is not a number."""
    return {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}


def check_finite(model: torch.nn.Module, history: Sequence[Mapping[str, float]]) -> None:
    """
    Raises:
        TrainingFailed: nothing was trained, or a loss or a trained weight is not a finite number.
    """
    if not history:
        raise TrainingFailed("the training took no step")
    if not all(math.isfinite(row["loss"]) for row in history):
        raise TrainingFailed("the loss became infinite or not a number; lower the learning rate")
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise TrainingFailed("a trained weight is infinite or not a number")
