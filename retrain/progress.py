"""How a training run shows its progress: a bar for people, JSON lines and Prometheus text for everything else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = ("loss", "reward", "rewards/margins", "rewards/accuracies")
GAUGES: Mapping[str, tuple[str, str]] = {
    "loss": ("pawl_training_loss", "Loss of the objective."),
    "grad_norm": ("pawl_training_gradient_norm", "Norm of the gradient before it is clipped."),
    "learning_rate": ("pawl_training_learning_rate", "Learning rate of the step."),
    "num_tokens": ("pawl_training_tokens", "Tokens of prompts and answers trained on so far, over all attempts."),
    "tokens_per_second": ("pawl_training_tokens_per_second", "Tokens a second, since this process started."),
    "rewards/margins": ("pawl_training_reward_margin", "Mean reward of the preferred answers over the others."),
    "rewards/accuracies": ("pawl_training_reward_accuracy", "Share of pairs whose preferred answer has more reward."),
    "logps/chosen_per_token": (
        "pawl_training_chosen_logp_per_token",
        "Mean log-probability of a token of the preferred answers.",
    ),
}
"""By the trainer's name of a value: what it is called in Prometheus, and what it is."""


@dataclass(frozen=True)
class LoggedStep:
    """What the trainer reported after an optimiser step."""

    step: int
    n_steps: int
    values: Mapping[str, float]


Report = Callable[[LoggedStep], None]


def ignore(_logged: LoggedStep) -> None:
    """Show nothing."""


@contextmanager
def reporting(stream: TextIO) -> Iterator[Report]:
    """Report on `stream`: a progress bar on a terminal, else one JSON object per logged step."""
    if not stream.isatty():
        yield lambda logged: print(_json_line(logged), file=stream, flush=True)
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("training", total=None, shown="")

        def report(logged: LoggedStep) -> None:
            shown = "  ".join(
                f"{name.split('/')[-1]} {logged.values[name]:.3f}" for name in SHOWN if name in logged.values
            )
            bar.update(task, completed=logged.step, total=logged.n_steps, shown=shown)

        yield report


@contextmanager
def written_to(path: Path | None, report: Report) -> Iterator[Report]:
    """The same report, which also keeps `path` up to date as Prometheus text; as it is where there is no path.

    The file is whole whenever it is read. It says whether the training still runs: a process that is killed leaves that
    at 1, and a time stamp that grows old.
    """
    if path is None:
        yield report
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = LoggedStep(0, 0, {})

    def both(logged: LoggedStep) -> None:
        nonlocal newest
        newest = logged
        write_metrics(path, logged, is_running=True, now=time.time())
        report(logged)

    write_metrics(path, newest, is_running=True, now=time.time())
    try:
        yield both
    finally:
        write_metrics(path, newest, is_running=False, now=time.time())


def write_metrics(path: Path, logged: LoggedStep, *, is_running: bool, now: float) -> None:
    """Replace a file by a step's values as Prometheus text."""
    registry = CollectorRegistry()

    def say(name: str, text: str, value: float) -> None:
        Gauge(name, text, registry=registry).set(value)

    say("pawl_training_running", "1 while a training runs.", float(is_running))
    say("pawl_training_updated_timestamp_seconds", "When this was written.", now)
    say("pawl_training_step", "Optimiser steps taken.", logged.step)
    say("pawl_training_steps", "Optimiser steps of the whole training; 0 until the first.", logged.n_steps)
    for key, (name, text) in GAUGES.items():
        if key in logged.values:
            say(name, text, logged.values[key])
    write_to_textfile(str(path), registry)


def _json_line(logged: LoggedStep) -> str:
    return json.dumps({"event": "training_step", "step": logged.step, "n_steps": logged.n_steps, **logged.values})
