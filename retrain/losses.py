"""Preference losses without a reference, which TRL's stable trainers do not have. Each on the line of its equation.

Log-probabilities are of whole answers, summed over their tokens; one number per pair, shape (batch,).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BELOW_ONE = -1e-7
"""A probability of one has no odds: the logarithm of a probability is kept at most this."""


def simpo_loss(
    chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], *, beta: float, gamma: float
) -> Tensor:
    """Meng et al. 2024 (arXiv 2405.14734), equation 6: the means per token as rewards, and a margin between them.

    Args:
        lengths: tokens of the chosen and of the rejected answers.
    """
    margin = beta * chosen / lengths[0] - beta * rejected / lengths[1]
    return -functional.logsigmoid(margin - gamma)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
    """Hong et al. 2024 (arXiv 2403.07691), equation 7, with the odds of equation 4.

    A probability is that of equation 3: the geometric mean per token.
    """
    return -functional.logsigmoid(_log_odds(chosen / lengths[0]) - _log_odds(rejected / lengths[1]))


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)); `log(-expm1(x))` is log(1 - exp(x)) without losing digits."""
    kept = log_probability.float().clamp(max=BELOW_ONE)
    return kept - torch.log(-torch.expm1(kept))
