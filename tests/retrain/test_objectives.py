"""Objectives by one setting: which numbers they get, and that each of them lowers its own loss."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from trl import DPOTrainer

from feedback.pairs import UnpairedExample
from pawl.errors import ConfigurationError
from pawl.settings import PairLoss, TrainingSettings
from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, TrainingResult, train
from retrain.objectives import (
    BALANCE,
    MAX_FLIP_RATE,
    Agreement,
    Family,
    Objective,
    choose_objective,
    estimate_flip_rate,
    kto_weights,
)
from tests.retrain.tiny_model import TRAINING, make_pair


def test_the_default_is_dpo_with_a_little_likelihood() -> None:
    default = choose_objective(TrainingSettings())
    assert default == Objective(Family.PAIRED, ("sigmoid", "sft"), (1.0, 0.1), 0.1)
    assert choose_objective(TrainingSettings(objective="sigmoid")) == default


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"objective": "ipo", "sft_weight": 0.0}, Objective(Family.PAIRED, ("ipo",), (1.0,), 0.1)),
        ({"objective": "robust"}, Objective(Family.PAIRED, ("robust", "sft"), (1.0, 0.1), 0.1, flip_rate=0.2)),
        (
            {"objective": "robust", "flip_rate": 0.0},
            Objective(Family.PAIRED, ("robust", "sft"), (1.0, 0.1), 0.1, flip_rate=0.0),
        ),
        ({"objective": "sigmoid_norm"}, Objective(Family.PAIRED, ("sigmoid_norm", "sft"), (1.0, 0.1), 5.0)),
        (
            {"objective": "simpo", "simpo_gamma": 0.3},
            Objective(Family.REFERENCE_FREE, ("simpo", "sft"), (1.0, 0.1), 2.0, gamma=0.3),
        ),
        ({"objective": "orpo", "beta": 0.25}, Objective(Family.REFERENCE_FREE, ("orpo",), (1.0,), 0.25)),
        ({"objective": "kto"}, Objective(Family.UNPAIRED, ("kto",), (1.0,), 0.1)),
        ({"loss_weights": [1.0, 4.0]}, Objective(Family.PAIRED, ("sigmoid", "sft"), (1.0, 4.0), 0.1)),
        ({"loss_type": ["sigmoid", "bco_pair"]}, Objective(Family.PAIRED, ("sigmoid", "bco_pair"), (1.0, 1.0), 0.1)),
    ],
)
def test_settings_become_numbers(given: dict[str, object], expected: Objective) -> None:
    assert choose_objective(TrainingSettings.model_validate(given), estimated_flip_rate=0.2) == expected


def test_robust_has_a_rate_even_where_nobody_estimated_one() -> None:
    assert choose_objective(TrainingSettings(objective="robust")).flip_rate == 0.1


@pytest.mark.parametrize(
    "given",
    [{"loss_weights": [1.0, 0.1, 0.1]}, {"objective": "orpo", "loss_weights": [1.0, 0.1]}, {"loss_type": []}],
)
def test_weights_that_fit_no_loss_are_a_matter_of_configuration(given: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"retrain\.training\.loss_weights"):
        choose_objective(TrainingSettings.model_validate(given))


def test_settings_refuse_an_unknown_objective() -> None:
    with pytest.raises(ValidationError, match="objective"):
        TrainingSettings.model_validate({"objective": "ppo"})


def test_settings_know_the_losses_that_trl_takes_from_us() -> None:
    """Read from its source: it has no list of them. `exo_pair` needs smoothed labels, which only `robust` has here."""
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer)))
    assert known == {*get_args(PairLoss), "exo_pair"}


@pytest.mark.parametrize("name", ["exo_pair", "sigmod", ""])
def test_a_loss_that_trl_refuses_is_refused_before_anything_is_mined(name: str) -> None:
    with pytest.raises(ValidationError, match="loss_type"):
        TrainingSettings.model_validate({"loss_type": ["sigmoid", name]})


# The flip rate


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_rate_is_usable_and_grows_with_contradictions(n_agreeing: int, n_opposed: int) -> None:
    rate = estimate_flip_rate(Agreement(n_agreeing, n_opposed))
    assert 0.0 < rate <= MAX_FLIP_RATE
    assert estimate_flip_rate(Agreement(n_agreeing, n_opposed + 1)) >= rate
    assert estimate_flip_rate(Agreement(n_agreeing + 1, n_opposed)) <= rate


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_rate_that_flipped_the_labels_is_found(rate: float) -> None:
    dice = random.Random(7)
    opposed = sum((dice.random() < rate) != (dice.random() < rate) for _ in range(20_000))
    assert estimate_flip_rate(Agreement(20_000 - opposed, opposed)) == pytest.approx(rate, abs=0.01)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_weighted_thumbs_are_in_balance(n_up: int, n_down: int) -> None:
    liked, disliked = kto_weights(n_up, n_down)
    assert 1.0 - 1e-9 <= liked * n_up / (disliked * n_down) <= BALANCE + 1e-9
    assert min(liked, disliked) == 1.0


# Training


EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(20)]


def thumb(number: int) -> UnpairedExample:
    pair = make_pair(number)
    return UnpairedExample(
        id=f"{number:032x}",
        alias="assistant",
        prompt=pair.prompt,
        completion=pair.chosen if number % 3 else pair.rejected,
        label=bool(number % 3),
        interaction=f"{number:048x}",
        model="tiny",
        principals=pair.principals,
        created_at=0.0,
    )


def trained(base: Path, output: Path, objective: str, unpaired: list[UnpairedExample]) -> TrainingResult:
    training = TRAINING.model_copy(update={"objective": objective, "epochs": 2.0, "checkpoint_steps": 100})
    return train(DPORun(str(base), "served/tiny", None, output, training, seed=3), EXAMPLES, unpaired=unpaired)


@pytest.mark.training
@pytest.mark.parametrize(
    "objective", ["dpo", "ipo", "robust", "hinge", "apo_zero", "sigmoid_norm", "simpo", "orpo", "kto"]
)
def test_each_lowers_its_own_loss_and_tells_the_answers_apart(tiny_base: Path, tmp_path: Path, objective: str) -> None:
    thumbs = [thumb(number) for number in range(20, 32)]
    result = trained(tiny_base, tmp_path, objective, thumbs)
    first, last = ([row["loss"] for row in part] for part in (result.history[:2], result.history[-2:]))
    assert max(last) < min(first), result.history
    assert result.history[-1]["rewards/margins"] > result.history[0]["rewards/margins"]
    assert result.method.startswith(choose_objective(TRAINING.model_copy(update={"objective": objective})).name)
    assert result.n_examples == (52 if objective == "kto" else 20)
