"""The losses that are trained with are those of the papers: on fixed numbers, and through the trainers themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pawl.settings import TrainingSettings
from retrain import dpo
from retrain.base_model import quiet_renames
from retrain.checkpoints import Spent
from retrain.dataset import Origin, example_of
from retrain.losses import odds_ratio_loss, simpo_loss
from retrain.progress import ignore
from retrain.termination import Termination
from retrain.trainers import Watch
from tests.retrain import published
from tests.retrain.published import PAIRED, Pair, Thumb
from tests.retrain.tiny_model import TRAINING, make_pair

FIXED = Pair(pi_w=-10.0, pi_l=-12.0, ref_w=-11.0, ref_l=-11.5, n_w=4, n_l=5)
GOLDEN = {
    "sigmoid": (0.5, -math.log(1 / (1 + math.exp(-0.75)))),  # 0.5 * (1 - -0.5)
    "ipo": (0.5, (0.25 + 0.1 - 1.0) ** 2),
    "hinge": (0.5, 1 - 0.75),
    "apo_zero": (0.5, -1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.25))),
    "sigmoid_norm": (5.0, -math.log(1 / (1 + math.exp(-1.75)))),  # 5 * (1 / 4 + 0.5 / 5)
}
log_probabilities = st.floats(-60.0, -0.5)
lengths = st.integers(1, 30)


@pytest.mark.parametrize("loss", GOLDEN)
def test_the_equations_on_numbers_worked_out_by_hand(loss: str) -> None:
    parameter, expected = GOLDEN[loss]
    assert PAIRED[loss](FIXED, parameter) == pytest.approx(expected, abs=1e-12)
    assert published.simpo(FIXED, 2.0, 0.5) == pytest.approx(-math.log(1 / (1 + math.exp(0.7))))  # 2 (-2.5 + 2.4) - 0.5
    assert published.sft(FIXED) == 2.5


@given(log_probabilities, log_probabilities, lengths, lengths, st.floats(0.1, 10.0), st.floats(0.0, 5.0))
def test_losses_without_a_reference_are_those_of_their_papers(
    pi_w: float, pi_l: float, n_w: int, n_l: int, beta: float, gamma: float
) -> None:
    pair = Pair(pi_w, pi_l, 0.0, 0.0, n_w, n_l)
    chosen, rejected = (torch.tensor([each], dtype=torch.float64) for each in (pi_w, pi_l))
    tokens = (torch.tensor([n_w]), torch.tensor([n_l]))
    simpo = simpo_loss(chosen, rejected, tokens, beta=beta, gamma=gamma).item()
    assert simpo == pytest.approx(_no_overflow(beta * pi_w / n_w - beta * pi_l / n_l - gamma), rel=1e-6)
    odds = published.sft(pair) + beta * odds_ratio_loss(chosen, rejected, tokens).item()
    assert odds == pytest.approx(published.orpo(pair, beta), rel=1e-4)


def _no_overflow(margin: float) -> float:
    """The same equation where the exponential of the printed one is too large for a float's digits."""
    return math.log1p(math.exp(-margin)) if margin > -30 else -margin


@given(st.floats(0.0, 0.45), log_probabilities, log_probabilities)
def test_the_robust_loss_is_what_right_labels_would_have_given(eps: float, pi_w: float, pi_l: float) -> None:
    """Lemma 3.1 of its paper: over labels that are exchanged with probability eps its mean is that of DPO's."""
    pair, exchanged = Pair(pi_w, pi_l, -20.0, -20.0, 3, 3), Pair(pi_l, pi_w, -20.0, -20.0, 3, 3)
    mean = (1 - eps) * published.robust(pair, 0.1, eps) + eps * published.robust(exchanged, 0.1, eps)
    assert mean == pytest.approx(published.dpo(pair, 0.1), rel=1e-6)


def test_certain_answers_have_no_infinite_odds() -> None:
    certain, tokens = torch.tensor([0.0], requires_grad=True), (torch.tensor([3]), torch.tensor([3]))
    loss = odds_ratio_loss(certain, torch.tensor([-3.0]), tokens)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert certain.grad is not None
    assert bool(loss.isfinite())
    assert bool(certain.grad.isfinite())


# Through the trainers


EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in (0, 7, 17, 23, 31, 44)]
"""Of different lengths, so that a mean over tokens is not one over answers."""


def trainer_of(base: Path, output: Path, **settings: Any) -> dpo.Trainer:
    """A trainer whose policy has moved away from its reference."""
    training = TRAINING.model_copy(update={"batch_size": 6, **settings})
    run = dpo.DPORun(str(base), "served/tiny", None, output, training, seed=3)
    with quiet_renames():
        trainer = dpo._trainer(run, dpo._rows(run, EXAMPLES, ()), dpo.read_contents(run), ignore)
    trainer.observe(Watch(TrainingSettings().guards, Termination(), Spent(), n_first=1), "")
    with torch.no_grad():
        for index, (name, weights) in enumerate(trainer.model.named_parameters()):
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(index)
                weights.copy_(0.1 * torch.randn(weights.shape, generator=generator))
    trainer.model.train()
    return trainer


def answers_of(trainer: dpo.Trainer, batch: dict[str, Tensor], prefix: str = "") -> list[tuple[float, float, int]]:
    """Of each answer its log-probability by the policy and by the reference, and its tokens, the plain way."""
    ids, attention, mask = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))

    def summed() -> Tensor:
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        total: Tensor = (found * mask[:, 1:]).sum(dim=1)
        return total

    with torch.no_grad():
        policy = summed()
        with trainer.model.disable_adapter():
            reference = summed()
    assert not torch.allclose(policy, reference, atol=0.1)
    return list(zip(policy.tolist(), reference.tolist(), mask.sum(dim=1).tolist(), strict=True))


def pairs_of(answers: Sequence[tuple[float, float, int]]) -> Iterator[Pair]:
    half = len(answers) // 2
    for (pi_w, ref_w, n_w), (pi_l, ref_l, n_l) in zip(answers[:half], answers[half:], strict=True):
        yield Pair(pi_w, pi_l, ref_w, ref_l, n_w, n_l)


def first_loss(trainer: dpo.Trainer) -> tuple[float, dict[str, Tensor]]:
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad(), quiet_renames():
        return float(trainer.compute_loss(trainer.model, batch)), batch


def mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


@pytest.mark.training
@pytest.mark.parametrize(
    ("objective", "parameter"),
    [("dpo", 0.7), ("ipo", 0.7), ("hinge", 0.2), ("apo_zero", 0.7), ("sigmoid_norm", 5.0), ("orpo", 0.3)],
)
def test_trainers_minimise_what_the_papers_print(
    tiny_base: Path, tmp_path: Path, objective: str, parameter: float
) -> None:
    trainer = trainer_of(tiny_base, tmp_path, objective=objective, beta=parameter, sft_weight=0.0)
    loss, batch = first_loss(trainer)
    pairs = list(pairs_of(answers_of(trainer, batch)))
    equation = PAIRED["sigmoid" if objective == "dpo" else objective]
    expected = mean(equation(pair, parameter) for pair in pairs)
    # TRL adds 1, which no gradient sees; and it takes the likelihood term per token of the batch, as all of its kind.
    constant = 1.0 if objective == "apo_zero" else 0.0
    if objective == "orpo":
        n_tokens = sum(pair.n_w for pair in pairs)
        constant = -sum(pair.pi_w for pair in pairs) / n_tokens - mean(published.sft(pair) for pair in pairs)
    assert loss == pytest.approx(expected + constant, rel=1e-4)


@pytest.mark.training
def test_the_other_numbers_go_where_they_belong(tiny_base: Path, tmp_path: Path) -> None:
    robust = trainer_of(tiny_base, tmp_path, objective="robust", beta=0.7, flip_rate=0.2, sft_weight=0.5)
    loss, batch = first_loss(robust)
    pairs = list(pairs_of(answers_of(robust, batch)))
    likelihood = -sum(pair.pi_w for pair in pairs) / sum(pair.n_w for pair in pairs)
    expected = mean(published.robust(pair, 0.7, 0.2) for pair in pairs) + 0.5 * likelihood
    assert loss == pytest.approx(expected, rel=1e-4)

    simpo = trainer_of(tiny_base, tmp_path, objective="simpo", beta=2.0, simpo_gamma=0.8, sft_weight=0.5)
    loss, batch = first_loss(simpo)
    pairs = list(pairs_of(answers_of(simpo, batch)))
    expected = mean(published.simpo(pair, 2.0, 0.8) for pair in pairs) + 0.5 * likelihood
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.training
def test_kto_minimises_what_its_paper_prints(tiny_base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_base, tmp_path, objective="kto", beta=0.7)
    loss, batch = first_loss(trainer)
    others = answers_of(trainer, batch, "KL_")
    z0 = max(0.0, mean(policy - reference for policy, reference, _ in others))
    thumbs = zip(answers_of(trainer, batch), batch["label"].tolist(), strict=True)
    expected = mean(published.kto(Thumb(pi, ref, liked), z0, 0.7, 1.0, 1.0) for (pi, ref, _), liked in thumbs)
    assert loss == pytest.approx(expected, rel=1e-4)
