"""Batches of examples of like length, so that little of a batch is padding.

Sorting a whole epoch by length would make every optimiser step see one kind of example. Here lengths are sorted only
within a window of a few optimiser steps' examples, drawn at random, and the batches of a window are shuffled. With a
window of one step, each step sees exactly the examples that plain shuffling would give it, so its gradient is the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter


@dataclass(frozen=True)
class Batching:
    """How an epoch is cut up."""

    batch_size: int
    """Examples that a process takes through the model at once."""
    n_processes: int
    """They take neighbouring batches at the same time and wait for the longest, so neighbours are alike too."""
    accumulation: int
    """Batches of each process in one optimiser step."""
    window_steps: int
    """Optimiser steps whose examples are sorted together; 0 sorts nothing."""
    seed: int

    @property
    def group_size(self) -> int:
        """Examples that all processes take through the model at once."""
        return self.batch_size * self.n_processes

    @property
    def step_size(self) -> int:
        """Examples in one optimiser step."""
        return self.group_size * self.accumulation


def epoch_order(lengths: Sequence[int], batching: Batching, epoch: int) -> list[int]:
    """Every example's index once, in the order in which a data loader cuts them into batches.

    The same arguments give the same order. Examples that do not fill the last batch are drawn at random, not by length:
    a batch that is short counts as much as others, and the same kind of example must not gain by that.

    >>> epoch_order([9, 1, 8, 2], Batching(2, n_processes=1, accumulation=2, window_steps=1, seed=0), epoch=0)
    [1, 3, 2, 0]
    """
    shuffled = list(range(len(lengths)))
    rng = random.Random(f"{batching.seed}/{epoch}")
    rng.shuffle(shuffled)
    if not batching.window_steps:
        return shuffled
    window = batching.step_size * batching.window_steps
    windows = (shuffled[start : start + window] for start in range(0, len(shuffled), window))
    return [index for part in windows for index in _grouped(part, lengths, batching.group_size, rng)]


def padded_tokens(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> int:
    """Positions the model works on when each batch of `order` is padded to its longest example.

    >>> padded_tokens([5, 1, 5, 1], [0, 1, 2, 3], 2), padded_tokens([5, 1, 5, 1], [0, 2, 1, 3], 2)
    (20, 12)
    """
    batches = _cut(order, batch_size)
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def _grouped(indices: Sequence[int], lengths: Sequence[int], group_size: int, rng: random.Random) -> list[int]:
    n_whole = len(indices) // group_size * group_size
    ranked = sorted((lengths[index], place, index) for place, index in enumerate(indices[:n_whole]))
    groups = _cut(list(map(itemgetter(2), ranked)), group_size)
    rng.shuffle(groups)
    return [index for group in groups for index in group] + list(indices[n_whole:])


def _cut(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
