"""Layers: experiments that share one never share a user; those of different layers do not know of each other."""

from __future__ import annotations

from collections.abc import Iterable

from ab_testing.errors import InvalidExperiment
from ab_testing.experiment import LayerRange
from ab_testing.slot_table import N_SLOTS


def free_range(name: str, share: float, taken: Iterable[LayerRange]) -> LayerRange:
    """Return the first range of the layer that is free and gives `share` of all users.

    Args:
        name: the layer.
        share: in parts of 1; a ten-thousandth is the smallest.
        taken: the ranges of all experiments that run, of whatever layer.

    Raises:
        InvalidExperiment: there is no room for it in one piece; says where there is some.
    """
    size = share_in_slots(share)
    gaps = free_gaps(name, taken)
    for start, end in gaps:
        if end - start >= size:
            return LayerRange(name, start, start + size)
    room = ", ".join(f"{(end - start) / N_SLOTS:g}" for start, end in gaps) or "none"
    raise InvalidExperiment(f"the layer {name!r} has no {share:g} of the users left in one piece; free: {room}")


def free_gaps(name: str, taken: Iterable[LayerRange]) -> list[tuple[int, int]]:
    """Return the pieces of the layer that no experiment has, as first slot and the slot after the last.

    >>> free_gaps("tone", [LayerRange("tone", 2000, 5000), LayerRange("length", 0, 9000)])
    [(0, 2000), (5000, 10000)]
    """
    gaps, start = [], 0
    for each in sorted((each.start, each.end) for each in taken if each.name == name):
        if each[0] > start:
            gaps.append((start, each[0]))
        start = max(start, each[1])
    return [*gaps, (start, N_SLOTS)] if start < N_SLOTS else gaps


def layer_range(name: str, start: float, end: float) -> LayerRange:
    """Return a part of a layer that is given in shares of all users."""
    return LayerRange(name, round(start * N_SLOTS), round(end * N_SLOTS))


def share_in_slots(share: float) -> int:
    """
    Raises:
        InvalidExperiment: it is no share of at least one slot.
    """
    size = round(share * N_SLOTS) if 0 < share <= 1 else 0
    if size < 1 or abs(size - share * N_SLOTS) > 1e-6:
        raise InvalidExperiment(f"a share of a layer is more than 0, at most 1, in steps of 0.0001; got {share:g}")
    return size
