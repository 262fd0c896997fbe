"""What paired values say about a difference: bounds that have a width however few or unanimous the prompts are.

Values are first averaged by prompt, so that several samples of one prompt count as one. Each function then takes one
difference per prompt, and each bound is one-sided at level alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, ndtri, stdtrit

RESAMPLES = 4000
NEWTON_STEPS = 50
RIDGE = 0.1
"""On the effect of length: enough to find one where every win is the longer answer. Where one model is longer by as
much everywhere, length and model cannot be told apart, and the bounds are wide."""
LEAST_SPREAD = 10.0
"""Tokens: smaller differences are not what a judge goes by, even if there are no larger ones."""
EVIDENCE = (1.0, -1.0)
"""One prompt on either side that is added before a spread is taken; see `mean_bounds`."""

Values = NDArray[np.float64]


class Bounds(NamedTuple):
    """One-sided bounds of a mean."""

    lower: float
    upper: float


class WinRate(NamedTuple):
    """How often one of two models wins, for answers of equal length."""

    share: float
    bounds: Bounds
    raw: float
    """The share as counted, whatever the lengths."""


def mean_bounds(differences: Sequence[float], alpha: float) -> Bounds:
    """For the mean of differences that lie in [-1, 1].

    Bonett and Price (2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data") applied to means: one difference of +1 and one of -1 are added before the mean and its standard error are
    taken. Without them, ten prompts that happen to agree would give an interval of no width.
    """
    adjusted = [*differences, *EVIDENCE]
    half = float(stdtrit(len(adjusted) - 1, 1 - alpha)) * stdev(adjusted) / math.sqrt(len(adjusted))
    return Bounds(max(-1.0, fmean(adjusted) - half), min(1.0, fmean(adjusted) + half))


def bootstrap_bounds(differences: Sequence[float], alpha: float, *, seed: int = 0) -> Bounds:
    """For the same mean, by drawing the prompts again (Efron 1979; paired: Koehn 2004, "Statistical significance tests
    for machine translation evaluation").

    The two prompts of `mean_bounds` are among those that are drawn from, for the same reason. A draw of all prompts is
    a multinomial draw of how often each distinct difference occurs, which takes no longer for many prompts than for
    few.
    """
    values, counts = np.unique(np.array([*differences, *EVIDENCE]), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    lower, upper = np.quantile(draws @ values / n, (alpha, 1 - alpha))
    return Bounds(float(lower), float(upper))


def mcnemar(differences: Sequence[float]) -> float:
    """Probability that so many prompts or more got worse if getting worse were no likelier than getting better.

    McNemar (1947), exact and one-sided: the prompts on which the two agree say nothing. With one answer per prompt this
    is his test; with several it is the sign test on prompts.

    >>> mcnemar([-1.0, -1.0, -1.0, -1.0, -1.0, 0.0])
    0.03125
    """
    n_worse = sum(value < 0 for value in differences)
    n_discordant = n_worse + sum(value > 0 for value in differences)
    return float(bdtrc(n_worse - 1, n_discordant, 0.5)) if n_worse else 1.0


def ratio_bounds(denominators: Sequence[float], numerators: Sequence[float], alpha: float) -> Bounds:
    """For the ratio of two paired means, by the delta method."""
    ratio = fmean(numerators) / fmean(denominators)
    residuals = [above - ratio * below for below, above in zip(denominators, numerators, strict=True)]
    n = len(residuals)
    half = float(stdtrit(n - 1, 1 - alpha)) * stdev(residuals) / math.sqrt(n) / fmean(denominators)
    return Bounds(ratio - half, ratio + half)


def win_rate(scores: Sequence[float], length_differences: Sequence[float], alpha: float) -> WinRate:
    """The share of comparisons won if the answers had been equally long.

    Dubois et al. (2024, "Length-Controlled AlpacaEval", eq. 2) without the term for the prompt: the logarithm of the
    odds is theta + phi * tanh(difference / its spread), and theta alone is what is reported. A win and a loss at equal
    length are added, as in `mean_bounds`. The error of theta is the sandwich estimate, which holds for ties as well.

    Args:
        scores: 1 for a win, 0 for a loss, 0.5 for neither.
        length_differences: of the winner's side's answer over the other, in tokens.
    """
    won = np.array([*scores, 1.0, 0.0])
    longer = np.array([*length_differences, 0.0, 0.0])
    spread = max(LEAST_SPREAD, math.sqrt(float(np.mean(longer**2))))
    design = np.column_stack([np.ones_like(won), np.tanh(longer / spread)])
    theta, error = _logistic(design, won)
    reach = float(ndtri(1 - alpha)) * error
    return WinRate(_odds_share(theta), Bounds(_odds_share(theta - reach), _odds_share(theta + reach)), fmean(scores))


def _logistic(design: Values, won: Values) -> tuple[float, float]:
    """The first coefficient and its standard error, with a ridge on the second alone."""
    ridge = np.diag([0.0, RIDGE])
    found = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        expected = 1 / (1 + np.exp(-design @ found))
        slope = design.T @ (won - expected) - ridge @ found
        step = np.linalg.solve(_information(design, expected) + ridge, slope)
        found = found + step
        if float(np.abs(step).max()) < 1e-9:
            break
    expected = 1 / (1 + np.exp(-design @ found))
    bread = np.linalg.inv(_information(design, expected) + ridge)
    scores = design * (won - expected)[:, None]
    return float(found[0]), math.sqrt(float((bread @ scores.T @ scores @ bread)[0, 0]))


def _information(design: Values, expected: Values) -> Values:
    found: Values = (design * (expected * (1 - expected))[:, None]).T @ design
    return found


def _odds_share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
