"""What a training minimises: one name in the settings, and everything that follows from it.

The equations are in `docs/objectives.md`; `tests/retrain/published.py` writes each down as its paper does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pawl.errors import ConfigurationError
from pawl.settings import TrainingSettings

MAX_FLIP_RATE = 0.4
"""At 0.5 a preference says nothing, and the correction divides by zero."""
USUAL_FLIP_RATE = 0.1
"""What Chowdhury et al. 2024 (arXiv 2403.00409) assume where nothing is known."""
PRIOR_COMPARISONS = 20.0
"""How many repeated comparisons the usual rate counts for, so that three of them do not decide."""
BALANCE = 4 / 3
"""Upper end of the range that Ethayarajh et al. 2024 (arXiv 2402.01306, equation 8) found good."""


class Family(StrEnum):
    """Which kind of data and trainer an objective needs."""

    PAIRED = "paired"
    """Pairs, and a reference."""
    REFERENCE_FREE = "reference_free"
    """Pairs alone."""
    UNPAIRED = "unpaired"
    """Single answers with a thumb, and a reference."""


@dataclass(frozen=True)
class Objective:
    """An objective with all its numbers."""

    family: Family
    losses: tuple[str, ...]
    """The preference loss, then the terms beside it."""
    weights: tuple[float, ...]
    beta: float
    flip_rate: float = 0.0
    gamma: float = 0.0

    @property
    def name(self) -> str:
        """As runs record it.

        >>> Objective(Family.PAIRED, ("sigmoid", "sft"), (1.0, 0.1), 0.1).name
        'sigmoid+sft'
        """
        return "+".join(self.losses)


@dataclass(frozen=True)
class _Kind:
    loss: str
    beta: float
    family: Family = Family.PAIRED
    has_sft: bool = True


_KINDS: Mapping[str, _Kind] = {
    "dpo": _Kind("sigmoid", 0.1),
    "sigmoid": _Kind("sigmoid", 0.1),
    "ipo": _Kind("ipo", 0.1),
    "robust": _Kind("robust", 0.1),
    "hinge": _Kind("hinge", 0.1),
    "apo_zero": _Kind("apo_zero", 0.1),
    "sigmoid_norm": _Kind("sigmoid_norm", 5.0),  # Of a mean, not of a sum: Tulu 3, arXiv 2411.15124.
    "simpo": _Kind("simpo", 2.0, Family.REFERENCE_FREE),
    "orpo": _Kind("orpo", 0.1, Family.REFERENCE_FREE, has_sft=False),
    "kto": _Kind("kto", 0.1, Family.UNPAIRED, has_sft=False),
}


def choose_objective(training: TrainingSettings, estimated_flip_rate: float | None = None) -> Objective:
    """The objective that the settings ask for.

    Args:
        estimated_flip_rate: what `robust` assumes where `flip_rate` is not set.

    Raises:
        ConfigurationError: there are not as many weights as losses.
    """
    kind = _KINDS[training.objective]
    family, losses, usual = kind.family, *_with_sft(kind, training)
    if training.loss_type is not None:
        family, losses, usual = Family.PAIRED, tuple(training.loss_type), (1.0,) * len(training.loss_type)
    weights = usual if training.loss_weights is None else tuple(training.loss_weights)
    if len(weights) != len(losses) or not losses:
        raise ConfigurationError(
            f"retrain.training.loss_weights has {len(weights)} numbers for {len(losses)} losses: {', '.join(losses)}"
        )
    beta = kind.beta if training.beta is None else training.beta
    flip_rate = _flip_rate(training, estimated_flip_rate) if "robust" in losses else 0.0
    gamma = training.simpo_gamma if "simpo" in losses else 0.0
    return Objective(family, losses, weights, beta, flip_rate, gamma)


def _with_sft(kind: _Kind, training: TrainingSettings) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Given weights stand for both terms: the second may be there although `sft_weight` is zero."""
    has_second = training.sft_weight > 0 if training.loss_weights is None else len(training.loss_weights) > 1
    if kind.has_sft and has_second:
        return (kind.loss, "sft"), (1.0, training.sft_weight)
    return (kind.loss,), (1.0,)


def _flip_rate(training: TrainingSettings, estimated: float | None) -> float:
    if training.flip_rate is not None:
        return training.flip_rate
    return USUAL_FLIP_RATE if estimated is None else estimated


@dataclass(frozen=True)
class Agreement:
    """How often independent judgements of the same two answers were compared with each other."""

    n_agreeing: int
    n_opposed: int


def agreement_in(n_voters: Iterable[int], skipped: Mapping[str, int]) -> Agreement:
    """What mining and the filters keep of it.

    Every voter of a pair after the first has repeated its comparison and agreed. Of claims and pairs about the same two
    answers that mining and the filters leave out, the reason says which way they went: `duplicate` the same,
    `contradiction` the other. A contradiction often counts on both sides, and agreement with oneself not at all: what
    comes of it is an upper estimate.

    Args:
        n_voters: of each pair on which every voter judged both answers: choices, edits, regenerations.
        skipped: how many candidates and pairs were left out, by reason.

    >>> agreement_in([1, 3], {"duplicate": 5, "contradiction": 1, "foreign": 9})
    Agreement(n_agreeing=7, n_opposed=1)
    """
    repeated = sum(voters - 1 for voters in n_voters if voters > 1)
    return Agreement(repeated + skipped.get("duplicate", 0), skipped.get("contradiction", 0))


def estimate_flip_rate(agreement: Agreement) -> float:
    """Which share of preferences is the wrong way round, from how often two of the same answers disagree.

    If each judgement is flipped independently with probability e, two of them disagree with probability
    d = 2 e (1 - e), so that e = (1 - sqrt(1 - 2 d)) / 2. `d` is the share observed, drawn towards that of the usual
    rate as if `PRIOR_COMPARISONS` comparisons had shown it. People who differ in taste disagree as well, without being
    wrong: one more reason why this is an upper estimate.

    >>> round(estimate_flip_rate(Agreement(0, 0)), 3)
    0.1
    >>> round(estimate_flip_rate(Agreement(n_agreeing=9_520, n_opposed=480)), 3)
    0.025
    """
    usual = 2 * USUAL_FLIP_RATE * (1 - USUAL_FLIP_RATE)
    n_compared = agreement.n_agreeing + agreement.n_opposed
    disagreement = (agreement.n_opposed + usual * PRIOR_COMPARISONS) / (n_compared + PRIOR_COMPARISONS)
    return min(MAX_FLIP_RATE, (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2)


def kto_weights(n_up: int, n_down: int) -> tuple[float, float]:
    """Weights of liked and of disliked answers, so that neither drowns the other.

    Ethayarajh et al. 2024, equation 8: the weighted counts should be between 1 : 1 and 4 : 3. The rarer kind is
    weighed up as far as needed and the other keeps 1.

    >>> kto_weights(30, 10)
    (1.0, 2.25)
    >>> kto_weights(10, 10)
    (1.0, 1.0)
    """
    if not n_up or not n_down:
        return 1.0, 1.0
    ratio = n_up / n_down
    if ratio > BALANCE:
        return 1.0, ratio / BALANCE
    return (1.0, 1.0) if ratio >= 1.0 else (1.0 / ratio, 1.0)
