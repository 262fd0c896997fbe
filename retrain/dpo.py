"""Preference training of one LoRA adapter with TRL, from the settings to the exported files.

A first round trains a fresh adapter, with the base model as the reference. Later rounds continue the parent's adapter;
TRL then keeps a frozen copy of it under the name "ref" and takes that as the reference, unless the run wants the base.

Killed and continued. `train` leaves a checkpoint in `run.checkpoints` (`<output_dir>/trainer`) every
`training.checkpoint_steps` optimiser steps and after the last one. Called again for the same run it goes on from the
newest whole one: adapter, optimiser, schedule, random numbers and place in the data, so that on a CPU the finished
weights are those of an undisturbed run, bit for bit. Same run means the same `fingerprint`: base and parent with what
is in their files, objective and its numbers, examples, seed and library versions; checkpoints of anything else are
deleted. A caller that repeats steps keeps that directory until the result is recorded, and deletes it then.

SIGTERM ends the training after the optimiser step it is in, with a checkpoint, by `TrainingInterrupted`, whose exit
code is 143: not a failure, the run is to be continued. A used-up budget does the same by `TrainingFailed`, and so do
faults (`retrain/training_guards.py`), without a checkpoint of their own.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog
import torch
from datasets import Dataset, Features, Json, List, Value, disable_progress_bars
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, KTOConfig

from feedback.chat_messages import for_templates
from feedback.pairs import UnpairedExample
from feedback.tools import tools_column
from pawl.settings import TrainingSettings
from retrain import checkpoints
from retrain.adapters import ADAPTER_WEIGHTS, base_fingerprint, sha256_of
from retrain.base_model import load_base, quiet_renames
from retrain.checkpoints import Checkpoint, Spent
from retrain.dataset import TrainingExample, canonical_json
from retrain.errors import TrainingFailed, TrainingInterrupted
from retrain.lora import adapter_shape
from retrain.objectives import Family, Objective, choose_objective, kto_weights
from retrain.preflight import tokenizer_fingerprint
from retrain.process_group import check_ranks_agree, from_first, is_first, n_processes, trained_weights
from retrain.progress import LoggedStep, Report, ignore, written_to
from retrain.termination import Termination, sigterm_noted
from retrain.trainers import PairTrainer, ReferenceFreeTrainer, ThumbsTrainer, Watch
from retrain.training_guards import WINDOW
from retrain.training_speed import Speed, keep_activations_if_they_fit, speed_up
from retrain.trl_training import (
    LIBRARIES,
    WARMUP_SHARE,
    check_finite,
    export_adapter,
    history_of,
    numbers,
    shared_arguments,
    steps_of,
)

log = structlog.get_logger()

WITHOUT_EFFECT = {"checkpoint_steps", "metrics_file", "guards", "threads", "gradient_checkpointing"}
"""Settings that may change between a killed training and its continuation."""
OVER_A_BATCH = {"aot", "aot_unpaired"}
"""Losses of TRL's that compare a batch's answers with one another."""
Trainer = PairTrainer | ReferenceFreeTrainer | ThumbsTrainer
Row = dict[str, Any]


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
    flip_rate: float | None = None
    """The estimated share of preferences that are the wrong way round; for `robust` alone."""
    reference: Literal["parent", "base"] = "parent"
    """What a continued adapter is kept close to. A fresh one is kept close to the base in either case."""

    @property
    def checkpoints(self) -> Path:
        """Where a killed training continues from."""
        return self.output_dir / "trainer"

    @property
    def learning_rate(self) -> float:
        """The peak."""
        continued = None if self.parent_adapter is None else self.training.continued_learning_rate
        return continued or self.training.learning_rate

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return choose_objective(self.training, self.flip_rate)


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter and how it went."""

    adapter_dir: Path
    method: str
    n_examples: int
    n_steps: int
    n_trainable: int
    seconds: float
    """Over all attempts."""
    loss_first: float
    loss_last: float
    history: tuple[Mapping[str, float], ...]
    """One row per logged step: step, loss, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected, ..."""
    libraries: Mapping[str, str]
    resumed_at: int | None = None
    """The optimiser step that this process went on from; None if it trained from the start."""


def train(
    run: DPORun,
    examples: Sequence[TrainingExample],
    report: Report = ignore,
    *,
    unpaired: Sequence[UnpairedExample] = (),
    resume: bool = True,
) -> TrainingResult:
    """Train, and export the adapter's two files to `run.output_dir/adapter`.

    Args:
        unpaired: single thumbs, which only `kto` learns from; it takes every pair as two of them.
        resume: go on from the newest whole checkpoint of this run; else from the start.

    Raises:
        TrainingFailed: the loss or a weight is not a finite number, nothing was trained, or a guard stopped it.
        TrainingInterrupted: SIGTERM came; a checkpoint is there.
    """
    if run.training.threads:
        torch.set_num_threads(run.training.threads)
    disable_progress_bars()
    started = time.monotonic()
    with sigterm_noted() as termination, quiet_renames(), written_to(run.training.metrics_file, report) as shown:
        rows = _rows(run, examples, unpaired)
        contents = from_first(read_contents(run) if is_first() else None)
        mark = fingerprint(run, rows, contents)
        found = from_first(_continued_from(run, mark) if resume and is_first() else None)
        if is_first():
            checkpoints.discard(run.checkpoints, but=found)
        trainer = _trainer(run, rows, contents, shown)
        trainer.observe(_watch(run, termination, found), mark)
        _check_not_leaving(termination, found)
        trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    _check_finished(trainer)
    history = history_of(trainer.state.log_history)
    check_finite(trainer.model, history)
    weights = trained_weights(trainer.model)
    check_ranks_agree(weights)
    return TrainingResult(
        adapter_dir=_export(trainer.model, run, weights),
        method=run.objective.name + (" fresh" if run.parent_adapter is None else " continued"),
        n_examples=len(rows),
        n_steps=trainer.state.global_step,
        n_trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seconds=time.monotonic() - started + (found.spent.seconds if found else 0.0),
        loss_first=history[0]["loss"],
        loss_last=history[-1]["loss"],
        history=history,
        libraries={name: version(name) for name in LIBRARIES},
        resumed_at=found.step if found else None,
    )


class Contents(NamedTuple):
    """What the files are that a training begins with: others may be put in their place while it is down."""

    base: str
    tokenizer: str
    parent: str | None


def read_contents(run: DPORun) -> Contents:
    """The weights are read through, which takes seconds where a training takes hours."""
    parent = sha256_of(run.parent_adapter / ADAPTER_WEIGHTS) if run.parent_adapter else None
    tokenizer = tokenizer_fingerprint(AutoTokenizer.from_pretrained(run.base_model))
    return Contents(base_fingerprint(run.base_model), tokenizer, parent)


def fingerprint(run: DPORun, rows: Sequence[Row], contents: Contents) -> str:
    """The same for two trainings that give the same weights."""
    training = run.training.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    models = [run.base_model, str(run.parent_adapter), run.reference, run.seed, run.objective.flip_rate]
    libraries = {name: version(name) for name in LIBRARIES}
    said = canonical_json([models, list(contents), training, libraries, rows])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _continued_from(run: DPORun, mark: str) -> Checkpoint | None:
    found = checkpoints.newest_whole(run.checkpoints, mark)
    if found is not None:
        log.info("training_resumed", step=found.step, checkpoint=str(found.path))
    return found


def _watch(run: DPORun, termination: Termination, found: Checkpoint | None) -> Watch:
    starts_at_reference = run.parent_adapter is None or run.reference == "parent"
    is_relative = run.objective.family is not Family.REFERENCE_FREE and starts_at_reference
    return Watch(
        run.training.guards,
        termination,
        found.spent if found else Spent(),
        n_first=1 if is_relative else WINDOW,
    )


def _check_not_leaving(termination: Termination, found: Checkpoint | None) -> None:
    if termination.is_requested:
        step = found.step if found else 0
        raise TrainingInterrupted(f"asked to leave before training went on; run it again to go on from step {step}")


def _check_finished(trainer: Trainer) -> None:
    step = trainer.state.global_step
    if trainer.watch.over_budget is not None:
        raise TrainingFailed(trainer.watch.over_budget)
    if trainer.watch.is_leaving:
        raise TrainingInterrupted(f"asked to leave at step {step} of {trainer.state.max_steps}; run it again to go on")
    if step < trainer.state.max_steps:
        raise TrainingInterrupted(f"another process of this training was told to stop at step {step}")


class _ReportCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Passes on what the trainer logs, with how fast this process trains."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.since: tuple[float, float] | None = None

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            values = numbers(logs) | self._speed(float(logs.get("num_tokens", 0.0)))
            self.report(LoggedStep(state.global_step, state.max_steps, values))

    def _speed(self, n_tokens: float) -> dict[str, float]:
        """None at first: the first step of a process warms up."""
        now = time.monotonic()
        if self.since is None:
            self.since = (now, n_tokens)
            return {}
        started, before = self.since
        return {"tokens_per_second": (n_tokens - before) / (now - started)} if now > started else {}


def _trainer(run: DPORun, rows: Sequence[Row], contents: Contents, report: Report) -> Trainer:
    objective = run.objective
    base = load_base(run.base_model, run.training.dtype)
    if run.parent_adapter is None:
        model, fresh = base, adapter_shape(base, rank=run.training.lora_rank, alpha=run.training.lora_alpha)
    else:
        # TRL looks for the adapter under the name "default", which is what from_pretrained gives it.
        model, fresh = PeftModel.from_pretrained(base, str(run.parent_adapter), is_trainable=True), None
        # The adapter names its base as the engine does; saving a checkpoint would look that up on the model hub.
        model.peft_config["default"].base_model_name_or_path = run.base_model
    given: dict[str, Any] = {
        "train_dataset": _dataset(rows),
        "processing_class": AutoTokenizer.from_pretrained(run.base_model),
        "peft_config": fresh,
        "callbacks": [_ReportCallback(report)],
    }
    trainer: Trainer
    if objective.family is Family.UNPAIRED:
        trainer = ThumbsTrainer(model, args=_kto_arguments(run, rows), **given)
    elif objective.family is Family.REFERENCE_FREE:
        trainer = ReferenceFreeTrainer(model, args=_dpo_arguments(run, len(rows)), **given)
        trainer.objective = objective
    else:
        trainer = PairTrainer(model, args=_dpo_arguments(run, len(rows)), **given)
    if run.reference == "base" or objective.family is Family.REFERENCE_FREE:
        _drop_reference(trainer)
    trainer.remove_callback(PrinterCallback)  # Standard output belongs to the command, not to the trainer.
    if objective.family is not Family.UNPAIRED:
        if run.training.gradient_checkpointing == "auto":
            keep_activations_if_they_fit(trainer)
        speed_up(trainer, _speed(run, contents))
    return trainer


def _speed(run: DPORun, contents: Contents) -> Speed:
    training, is_paired = run.training, run.objective.family is Family.PAIRED
    keeps = training.cache_reference and is_paired
    # The likelihood terms of those without a reference are means over a batch's tokens, which sorting would shift.
    is_sortable = is_paired and OVER_A_BATCH.isdisjoint(run.objective.losses)
    return Speed(
        bucket_steps=training.bucket_steps if is_sortable else 0,
        share_prompts=training.share_prompts,
        reference_file=run.output_dir / "reference.safetensors" if keeps else None,
        base_sha=contents.base if keeps else "",
    )


def _drop_reference(trainer: Trainer) -> None:
    """TRL copies a continued adapter, to be looked at in its old state; without it the base is the reference."""
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")


def _arguments(run: DPORun, n_rows: int) -> dict[str, Any]:
    """What every trainer is told."""
    training = run.training
    n_steps = steps_of(n_rows, training.epochs, training, n_processes())
    return {
        **shared_arguments(training, run.output_dir, n_steps=n_steps, seed=run.seed),
        "learning_rate": run.learning_rate,
        "beta": run.objective.beta,
        "num_train_epochs": training.epochs,
        "max_length": training.max_length,
        # A share is rounded up, and the first step of a warm-up has no rate: a single step would learn nothing.
        "warmup_steps": WARMUP_SHARE if n_steps > 1 else 0,
        "logging_nan_inf_filter": False,  # It would hide from the guards what they look for.
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
    }


def _dpo_arguments(run: DPORun, n_rows: int) -> DPOConfig:
    objective = run.objective
    has_reference = objective.family is Family.PAIRED
    return DPOConfig(
        **_arguments(run, n_rows),
        loss_type=list(objective.losses) if has_reference else ["sigmoid"],
        loss_weights=list(objective.weights) if has_reference else None,
        label_smoothing=objective.flip_rate,
    )


def _kto_arguments(run: DPORun, rows: Sequence[Row]) -> KTOConfig:
    n_up = sum(row["label"] for row in rows)
    liked, disliked = kto_weights(n_up, len(rows) - n_up)
    return KTOConfig(
        **_arguments(run, len(rows)),
        desirable_weight=liked * run.objective.weights[0],
        undesirable_weight=disliked * run.objective.weights[0],
    )


def _rows(run: DPORun, examples: Sequence[TrainingExample], unpaired: Sequence[UnpairedExample]) -> list[Row]:
    if run.objective.family is not Family.UNPAIRED:
        return [
            {
                "prompt": [for_templates(message) for message in example.prompt],
                "chosen": [for_templates(example.chosen)],
                "rejected": [for_templates(example.rejected)],
                **tools_column(example.tools),
            }
            for example in examples
        ]
    answers = [
        (one.prompt, side, side is one.chosen, one.tools) for one in examples for side in (one.chosen, one.rejected)
    ]
    answers += [(one.prompt, one.completion, one.label, one.tools) for one in unpaired]
    # KTO takes its rows in order and compares each with its neighbours, which must not answer the same prompt.
    random.Random(run.seed).shuffle(answers)
    return [
        {
            "prompt": [for_templates(message) for message in prompt],
            "completion": [for_templates(answer)],
            "label": label,
            **tools_column(tools),
        }
        for prompt, answer, label, tools in answers
    ]


_KINDS = {"label": Value("bool"), "tools": Value("string")}


def _dataset(rows: Sequence[Row]) -> Dataset:
    """Messages as JSON: a table would fill in fields that a message does not have, and templates ask for those."""
    columns = dict.fromkeys(name for row in rows for name in row) or {"prompt": [], "chosen": [], "rejected": []}
    kinds = {name: _KINDS.get(name) or List(Json()) for name in columns}
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows], features=Features(kinds))


def _export(model: PeftModel, run: DPORun, weights: Mapping[str, Tensor]) -> Path:
    """Save the adapter alone: no copy of the reference, no model card, the base under its serving name."""
    directory = run.output_dir / "adapter"
    if not is_first():
        return directory
    return export_adapter(model, directory, run.serving_base, weights)


def describe(run: DPORun) -> dict[str, Any]:
    """The run as JSON, to be kept with its result."""
    parent = str(run.parent_adapter) if run.parent_adapter else None
    objective = {**asdict(run.objective), "family": run.objective.family.value}
    return {
        **asdict(run),
        "parent_adapter": parent,
        "output_dir": str(run.output_dir),
        "training": run.training.model_dump(mode="json"),
        "objective": objective,
    }
