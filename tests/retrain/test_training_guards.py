"""Every guard trips, says at which step and what to do, and lets a sound training pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOTrainer

from pawl.settings import TrainingGuardSettings
from retrain import checkpoints
from retrain.checkpoints import Spent
from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, train
from retrain.errors import TrainingFailed
from retrain.trainers import CHOSEN_PER_TOKEN
from retrain.training_guards import WINDOW, budget, chosen_fall, displacement, fault, noted
from tests.retrain.tiny_model import TRAINING, make_pair

GUARDS = TrainingGuardSettings()
SOUND = Spent(seconds=60.0, tokens=10, first=(0.0,), last=(-0.4,) * WINDOW)


def test_a_sound_step_passes() -> None:
    assert fault(7, 0.69, 12.5, GUARDS) is None
    assert displacement(7, SOUND, GUARDS) is None
    assert budget(7, 8, SOUND, GUARDS) is None


@pytest.mark.parametrize(
    ("loss", "grad_norm", "said"),
    [
        (math.nan, 1.0, "the loss is not a number at step 7"),
        (math.inf, 1.0, "the loss is infinite at step 7"),
        (0.7, math.nan, "the gradient is not a number at step 7"),
        (0.7, 1000.5, "the gradient norm is 1000 at step 7, over the bound of 1000"),
    ],
)
def test_faults(loss: float, grad_norm: float, said: str) -> None:
    why = fault(7, loss, grad_norm, GUARDS)
    assert why is not None
    assert why.startswith(said)
    assert "retrain.training.learning_rate" in why


def test_preferred_answers_must_not_become_unlikely() -> None:
    fallen = replace(SOUND, last=(-0.75,) * WINDOW)
    why = displacement(30, fallen, GUARDS)
    assert why is not None
    assert why.startswith(
        "the preferred answers became 0.75 nats per token less likely by step 30, over the bound of 0.5"
    )
    assert "sft_weight" in why


def test_budgets_count_only_while_there_is_something_left_to_do() -> None:
    late = replace(SOUND, seconds=24.5 * 3600)
    why = budget(7, 8, late, GUARDS)
    assert why is not None
    assert why.startswith("24.50 hours of 24 are used up at step 7 of 8: raise retrain.training.guards.max_hours")
    assert budget(8, 8, late, GUARDS) is None
    few = GUARDS.model_copy(update={"max_tokens": 10})
    assert "10 tokens of 10 are used up" in (budget(7, 8, SOUND, few) or "")


@given(st.lists(st.floats(-5.0, 5.0), min_size=WINDOW, max_size=60), st.integers(1, WINDOW))
def test_the_fall_is_from_the_first_steps_to_the_latest(measures: list[float], n_first: int) -> None:
    spent = Spent()
    for one in measures:
        spent = noted(spent, [one, one], n_first=n_first)
    fallen = chosen_fall(spent)
    assert fallen == pytest.approx(sum(measures[:n_first]) / n_first - sum(measures[-WINDOW:]) / WINDOW)
    assert chosen_fall(noted(Spent(), [], n_first=1)) is None


# In a training


EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(48)]


def run_with(base: Path, output: Path, guards: dict[str, Any], **training: Any) -> DPORun:
    bounds = TRAINING.guards.model_copy(update=guards)
    return DPORun(str(base), "served/tiny", None, output, TRAINING.model_copy(update={"guards": bounds, **training}), 3)


@contextmanager
def stopped(run: DPORun, said: str) -> Iterator[None]:
    with pytest.raises(TrainingFailed, match=said):
        yield
    assert not (run.output_dir / "adapter").exists()


@pytest.mark.training
def test_a_gradient_over_the_bound_stops_the_training(tiny_base: Path, tmp_path: Path) -> None:
    run = run_with(tiny_base, tmp_path, {"max_grad_norm": 1e-6})
    with stopped(run, "over the bound of 1e-06"):
        train(run, EXAMPLES[:8])


@pytest.mark.training
def test_a_loss_that_is_no_number_stops_the_training_before_it_changes_a_weight(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of a step's parts: the first alone would have passed."""
    run = run_with(tiny_base, tmp_path, {}, batch_size=2, gradient_accumulation_steps=2, checkpoint_steps=1)
    given_losses: list[torch.Tensor] = []
    whole = DPOTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given_losses.append(whole(self, *args, **kwargs))
        return given_losses[-1] * (math.nan if len(given_losses) == 6 else 1.0)

    monkeypatch.setattr(DPOTrainer, "compute_loss", broken)
    with stopped(run, "the loss is not a number at step 3, and no weight was changed by it"):
        train(run, EXAMPLES[:16])
    assert (run.checkpoints / "checkpoint-2" / "checkpoint.json").exists()
    assert not (run.checkpoints / "checkpoint-3").exists()


@pytest.mark.training
def test_a_fall_of_the_preferred_answers_stops_the_training(tiny_base: Path, tmp_path: Path) -> None:
    """By a loss that means to make them unlikely, as a preference may without meaning to."""
    unlearn: dict[str, Any] = {"loss_type": ["sft"], "loss_weights": [-1.0], "learning_rate": 2e-2}
    run = run_with(tiny_base, tmp_path, {}, batch_size=2, **unlearn)
    with stopped(run, r"nats per token less likely by step \d+, over the bound of 0\.5"):
        train(run, EXAMPLES)


@pytest.mark.training
def test_without_a_reference_the_start_is_that_of_the_first_steps(tiny_base: Path, tmp_path: Path) -> None:
    run = run_with(tiny_base, tmp_path, {}, objective="simpo")
    result = train(run, EXAMPLES)
    last = checkpoints.read(run.checkpoints / "checkpoint-12")
    assert last is not None
    measured = [row[CHOSEN_PER_TOKEN] for row in result.history]
    assert last.spent.first == pytest.approx(measured[:WINDOW])
    assert last.spent.last == pytest.approx(measured[-WINDOW:])


@pytest.mark.training
def test_the_hours_of_earlier_attempts_count(tiny_base: Path, tmp_path: Path) -> None:
    run = run_with(tiny_base, tmp_path, {"max_hours": 1e-9})
    with stopped(run, "are used up at step 1 of 12: raise retrain.training.guards.max_hours, and the run goes on"):
        train(run, EXAMPLES)
    with stopped(run, "are used up at step 2 of 12"):
        train(run, EXAMPLES)
    usual = replace(run, training=TRAINING)
    result = train(usual, EXAMPLES)
    assert (result.resumed_at, result.n_steps) == (2, 12)
