"""Preference training of one LoRA adapter with TRL; the only file that knows TRL.

A first round trains a fresh adapter, with the base model as the reference. Later rounds continue the parent's adapter;
TRL then keeps a frozen copy of it under the name "ref" and takes that as the reference.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer it builds unless told not to.

import torch
from datasets import Dataset, Features, Json, List, disable_progress_bars
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from feedback.chat_messages import for_templates
from pawl.settings import TrainingSettings
from retrain.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, rewrite_base
from retrain.base_model import load_base, quiet_renames
from retrain.dataset import TrainingExample
from retrain.errors import TrainingFailed
from retrain.progress import LoggedStep, Report, ignore

MAX_LOGGED_STEPS = 200
WARMUP_SHARE = 0.1
LIBRARIES = ("trl", "transformers", "peft", "torch", "accelerate", "datasets")


@dataclass(frozen=True)
class DPORun:
    """Everything one training run depends on besides its examples; saved beside what it makes."""

    base_model: str
    """Directory or hub name to train on."""
    serving_base: str
    """What the engine calls the same model (`--model`); written into the adapter."""
    parent_adapter: Path | None
    """The adapter to continue; None starts a fresh one."""
    output_dir: Path
    training: TrainingSettings
    seed: int


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter and how it went."""

    adapter_dir: Path
    method: str
    n_examples: int
    n_steps: int
    n_trainable: int
    seconds: float
    loss_first: float
    loss_last: float
    history: tuple[Mapping[str, float], ...]
    """One row per logged step: step, loss, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected, ..."""
    libraries: Mapping[str, str]


def train(run: DPORun, examples: Sequence[TrainingExample], report: Report = ignore) -> TrainingResult:
    """Train, and export the adapter's two files to `run.output_dir/adapter`.

    Raises:
        TrainingFailed: the loss or a weight is not a finite number, or nothing was trained.
    """
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    disable_progress_bars()
    started = time.monotonic()
    with quiet_renames():
        trainer = _trainer(run, examples, report)
        trainer.train()
    history = _history(trainer.state.log_history)
    _check_finite(trainer.model, history)
    return TrainingResult(
        adapter_dir=_export(trainer.model, run),
        method="+".join(run.training.loss_type) + (" fresh" if run.parent_adapter is None else " continued"),
        n_examples=len(examples),
        n_steps=trainer.state.global_step,
        n_trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seconds=time.monotonic() - started,
        loss_first=history[0]["loss"],
        loss_last=history[-1]["loss"],
        history=history,
        libraries={name: version(name) for name in LIBRARIES},
    )


class _ReportCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.report(LoggedStep(state.global_step, state.max_steps, _numbers(logs)))


def _trainer(run: DPORun, examples: Sequence[TrainingExample], report: Report) -> DPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(run.base_model)
    base = load_base(run.base_model, run.training.dtype)
    if run.parent_adapter is None:
        model, fresh = base, _lora(run.training, base)
    else:
        # TRL looks for the adapter under the name "default", which is what from_pretrained gives it.
        model, fresh = PeftModel.from_pretrained(base, str(run.parent_adapter), is_trainable=True), None
    trainer = DPOTrainer(
        model,
        args=_arguments(run, len(examples)),
        train_dataset=_dataset(examples),
        processing_class=tokenizer,
        peft_config=fresh,
        callbacks=[_ReportCallback(report)],
    )
    trainer.remove_callback(PrinterCallback)  # Standard output belongs to the command, not to the trainer.
    return trainer


def _lora(training: TrainingSettings, base: PreTrainedModel) -> LoraConfig:
    """All linear layers but the output layer, and nothing that vLLM refuses to serve.

    PEFT's own "all-linear" writes full module paths into the configuration of a small model; servers expect plain
    names.
    """
    output = base.get_output_embeddings()
    layers = ((name, module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear))
    return LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name, module in layers if module is not output}),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _arguments(run: DPORun, n_examples: int) -> DPOConfig:
    training = run.training
    on_gpu = torch.cuda.is_available()
    batch = training.batch_size * training.gradient_accumulation_steps
    n_steps = math.ceil(n_examples / batch * training.epochs)
    return DPOConfig(
        output_dir=str(run.output_dir / "trainer"),
        loss_type=list(training.loss_type),
        loss_weights=list(training.loss_weights),
        beta=training.beta,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        activation_checkpointing=training.gradient_checkpointing,
        max_length=training.max_length,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_SHARE,
        logging_steps=max(1, n_steps // MAX_LOGGED_STEPS),
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        bf16=on_gpu and training.dtype == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )


def _dataset(examples: Sequence[TrainingExample]) -> Dataset:
    """Messages as JSON: a table would fill in fields that a message does not have, and templates ask for those."""
    rows = [
        {
            "prompt": [for_templates(message) for message in example.prompt],
            "chosen": [for_templates(example.chosen)],
            "rejected": [for_templates(example.rejected)],
        }
        for example in examples
    ]
    return Dataset.from_list(rows, features=Features({side: List(Json()) for side in ("prompt", "chosen", "rejected")}))


def _history(logged: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, float], ...]:
    return tuple(_numbers(row) for row in logged if "loss" in row)


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}


def _check_finite(model: PeftModel, history: Sequence[Mapping[str, float]]) -> None:
    if not history:
        raise TrainingFailed("the training took no step")
    if not all(math.isfinite(row["loss"]) for row in history):
        raise TrainingFailed("the loss became infinite or not a number; lower the learning rate")
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise TrainingFailed("a weight of the adapter is infinite or not a number")


def _export(model: PeftModel, run: DPORun) -> Path:
    """Save the adapter alone: no copy of the reference, no model card, the base under its serving name."""
    directory = run.output_dir / "adapter"
    model.save_pretrained(str(directory), selected_adapters=["default"], save_embedding_layers=False)
    for path in directory.iterdir():
        if path.name not in {ADAPTER_CONFIG, ADAPTER_WEIGHTS}:
            path.unlink()
    rewrite_base(directory, run.serving_base)
    return directory


def describe(run: DPORun) -> dict[str, Any]:
    """The run as JSON, to be kept with its result."""
    parent = str(run.parent_adapter) if run.parent_adapter else None
    return {
        **asdict(run),
        "parent_adapter": parent,
        "output_dir": str(run.output_dir),
        "training": run.training.model_dump(mode="json"),
    }
