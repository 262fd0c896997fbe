"""How a training run shows its progress: a bar for people, JSON lines for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = ("loss", "rewards/margins", "rewards/accuracies")


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


def _json_line(logged: LoggedStep) -> str:
    return json.dumps({"event": "training_step", "step": logged.step, "n_steps": logged.n_steps, **logged.values})
