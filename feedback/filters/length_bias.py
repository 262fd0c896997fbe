"""Whether longer answers are preferred, and how to keep a set from teaching just that.

Preference training learns length before it learns quality, and drifts far beyond the lengths in its data (Park et al.
2024, arXiv:2403.19159).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate, islice
from typing import Final, NamedTuple

from feedback.filters.message_texts import said
from feedback.pairs import PreferencePair

MIN_PAIRS: Final = 30
"""With fewer nothing is re-balanced: their mean says little."""
CONFIDENCE: Final = 0.95


class LengthBias(NamedTuple):
    """The mean of log(characters of chosen / characters of rejected), with Student's interval; 0 is no bias."""

    n_pairs: int
    mean: float | None
    ci_lower: float | None
    ci_upper: float | None
    share_longer: float | None
    """Of the pairs, those whose chosen side is the longer one; ties count half."""


class Rebalanced(NamedTuple):
    """Which pairs to leave out."""

    dropped: frozenset[str]
    shortfall: float
    """By how much the bias of the rest still exceeds the limit; 0 when it does not."""


def log_ratio(pair: PreferencePair) -> float:
    """How much longer the chosen side is, as a logarithm; one is added, since a call of a tool may say nothing.

    A side's arguments of tools do not count: nobody prefers an answer for their length.
    """
    return math.log((1 + len(said(pair.chosen))) / (1 + len(said(pair.rejected))))


def measure(log_ratios: Iterable[float]) -> LengthBias:
    """The bias of a set; None for what a set is too small to tell."""
    ratios = sorted(log_ratios)
    n = len(ratios)
    if n == 0:
        return LengthBias(0, None, None, None, None)
    mean = math.fsum(ratios) / n
    share = sum(0.5 if ratio == 0 else float(ratio > 0) for ratio in ratios) / n
    if n == 1:
        return LengthBias(n, mean, None, None, share)
    from scipy.special import stdtrit  # Slow to load, and most processes that filter measure nothing.

    variance = math.fsum((ratio - mean) ** 2 for ratio in ratios) / (n - 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / n)
    return LengthBias(n, mean, mean - half, mean + half, share)


def rebalance(ratios: Mapping[str, float], limit: float, max_dropped: float) -> Rebalanced:
    """The fewest pairs without which the mean is at most `limit`, either way; else those that bring it nearest.

    Those that are most lopsided in the direction of the bias go first; equal ones in the order of their ids.

    Args:
        ratios: each pair's `log_ratio`, by id.
        max_dropped: share of the pairs that may go.
    """
    if len(ratios) < MIN_PAIRS:
        return Rebalanced(frozenset(), 0.0)
    total = math.fsum(sorted(ratios.values()))
    direction = math.copysign(1.0, total)
    ordered = sorted(ratios, key=lambda pair_id: (-direction * ratios[pair_id], pair_id))
    gone = accumulate((direction * ratios[pair_id] for pair_id in ordered), initial=0.0)
    most = min(math.floor(max_dropped * len(ratios)), len(ratios) - 1)
    left = [abs(abs(total) - lost) / (len(ratios) - k) for k, lost in enumerate(islice(gone, most + 1))]
    n_dropped = next((k for k, bias in enumerate(left) if bias <= limit), left.index(min(left)))
    return Rebalanced(frozenset(ordered[:n_dropped]), max(left[n_dropped] - limit, 0.0))
