"""Does every objective lower its own loss on the practice model, and how far from the guards' bounds does it stay?

Each trains a fresh adapter on the practice model's original preferences, with the learning rate of the demo and the
objective's own numbers, twice over the same pairs. Exit code 1 if a loss did not fall from one pass to the next.

    python -m bench.objectives --pairs 160
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from pawl.settings import TrainingSettings
from practice.model import ensure_practice_model
from practice.world import TRAINING
from retrain.dataset import TrainingExample, parse_originals
from retrain.dpo import DPORun, train
from retrain.trainers import CHOSEN_PER_TOKEN

OBJECTIVES = tuple(
    name for name in get_args(TrainingSettings.model_fields["objective"].annotation) if name != "sigmoid"
)
OUT = Path("var/bench/objectives.json")


@dataclass(frozen=True)
class Trained:
    """How an objective's training went."""

    objective: str
    n_steps: int
    loss_first: float
    """Mean of the first pass."""
    loss_last: float
    """Of the second: the same examples, so that they cannot make the difference."""
    margin: float
    """Of the rewards, by the objective's own measure, at the last step."""
    max_grad_norm: float
    chosen_change: float
    """Nats per token by which the preferred answers became more likely, pass to pass."""
    seconds: float


def main() -> None:
    """Train with each, show a table, write the numbers."""
    options = parsed()
    torch.set_num_threads(options.threads)
    model = ensure_practice_model(Path("var/practice"), progress=True)
    examples = parse_originals(model.original_preferences.read_text().splitlines())[: options.pairs]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    found: list[Trained] = []
    for name in options.objectives:
        found.append(train_with(name, model.path, examples))
        # After each: a run that is stopped has shown what it came to.
        OUT.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
        print(f"{name}: {found[-1].loss_first:.4f} to {found[-1].loss_last:.4f}", file=sys.stderr, flush=True)
    Console().print(shown(found))
    raise SystemExit(int(any(one.loss_last >= one.loss_first for one in found)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    return parser.parse_args()


def train_with(objective: str, model: Path, examples: Sequence[TrainingExample]) -> Trained:
    """Two passes with the objective's own numbers."""
    own: dict[str, object] = {"objective": objective, "loss_weights": None, "beta": None, "epochs": 2}
    training = TrainingSettings.model_validate({**TRAINING, **own})
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        result = train(DPORun(str(model), "practice", None, Path(directory), training, seed=0), examples)
    history = result.history
    first, last = passes(history, CHOSEN_PER_TOKEN)
    return Trained(
        objective,
        result.n_steps,
        *passes(history, "loss"),
        margin=history[-1]["rewards/margins"],
        max_grad_norm=max(row["grad_norm"] for row in history),
        chosen_change=last - first,
        seconds=time.monotonic() - started,
    )


def passes(history: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Means of the first half of the logged steps and of the second.

    >>> passes([{"loss": value} for value in (4.0, 2.0, 1.0, 2.0)], "loss")
    (3.0, 1.5)
    """
    values = [row[name] for row in history if name in row]
    half = len(values) // 2
    return sum(values[:half]) / half, sum(values[half:]) / (len(values) - half)


def shown(found: Sequence[Trained]) -> Table:
    """For people."""
    columns = ("objective", "steps", "first loss", "second", "margin", "max grad", "chosen", "s")
    table = Table(*columns, box=None, header_style="bold")
    for one in found:
        losses = (f"{one.loss_first:.3f}", f"{one.loss_last:.3f}", f"{one.margin:.2f}")
        table.add_row(
            one.objective,
            str(one.n_steps),
            *losses,
            f"{one.max_grad_norm:.2f}",
            f"{one.chosen_change:+.3f}",
            f"{one.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
