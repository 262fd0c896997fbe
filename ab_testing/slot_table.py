"""Slot tables: which variant owns each of 10,000 equal parts of the users, so that a change of weights moves the least.

Rendezvous hashing moves the least when a variant grows at the expense of all others in proportion. When one variant
alone gives up traffic it moves users between the others too; only a table that remembers its owners does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise

from ab_testing.errors import InvalidExperiment

N_SLOTS = 10_000

SlotTable = tuple[tuple[str, int], ...]
"""Runs of slots of one owner: its name, and the slot after its last one. Short, since changes cut few runs."""


def new_table(weights: Mapping[str, float]) -> SlotTable:
    """Return the table of an experiment that begins: one run for each variant with a weight.

    >>> new_table({"control": 3, "treatment": 1})
    (('control', 7500), ('treatment', 10000))

    Raises:
        InvalidExperiment: no weight is positive.
    """
    return _table([name for name, n in slot_counts(weights).items() for _ in range(n)])


def reassigned(table: SlotTable, weights: Mapping[str, float]) -> SlotTable:
    """Return the table after a change of weights: only variants that have too many slots give any away.

    A variant gives its last slots, so that the runs stay few, and they go to those that have too few, in the order of
    `weights`. A variant that `weights` does not name loses all of its slots.

    >>> reassigned((("a", 5000), ("b", 10000)), {"a": 40, "b": 50, "c": 10})
    (('a', 4000), ('c', 5000), ('b', 10000))

    Raises:
        InvalidExperiment: no weight is positive.
    """
    owners, wanted = owners_of(table), slot_counts(weights)
    has = {name: owners.count(name) for name in {*owners, *wanted}}
    surplus = {name: n - wanted.get(name, 0) for name, n in has.items()}
    receivers = [name for name in wanted for _ in range(-surplus[name])]
    for slot in reversed(range(N_SLOTS)):
        if surplus[owners[slot]] > 0:
            surplus[owners[slot]] -= 1
            owners[slot] = receivers.pop()
    return _table(owners)


def slot_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Return how many slots each variant is due: its share, rounded so that all slots have an owner.

    The largest remainders are rounded up (Hamilton's method); the earlier name wins a tie.

    >>> slot_counts({"a": 1, "b": 1, "c": 1})
    {'a': 3334, 'b': 3333, 'c': 3333}

    Raises:
        InvalidExperiment: no weight is positive.
    """
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise InvalidExperiment("no variant has a positive weight")
    due = {name: weight / total * N_SLOTS for name, weight in weights.items()}
    counts = {name: math.floor(exact) for name, exact in due.items()}
    by_remainder = sorted(due, key=lambda name: counts[name] - due[name])
    for name in by_remainder[: N_SLOTS - sum(counts.values())]:
        counts[name] += 1
    return counts


def owners_of(table: SlotTable) -> list[str]:
    """Return the owner of each slot."""
    owners: list[str] = []
    for name, end in table:
        owners.extend([name] * (end - len(owners)))
    return owners


def owned(table: SlotTable, name: str) -> int:
    """Return how many slots a variant owns.

    >>> owned((("a", 4000), ("c", 5000), ("a", 10000)), "a")
    9000
    """
    slots, start = 0, 0
    for owner, end in table:
        if owner == name:
            slots += end - start
        start = end
    return slots


def check_table(table: SlotTable, names: Sequence[str]) -> None:
    """Make sure that every slot has an owner among `names`.

    Raises:
        InvalidExperiment: one has none.
    """
    ends = [0, *(end for _, end in table)]
    if any(end <= before for before, end in pairwise(ends)) or ends[-1] != N_SLOTS:
        raise InvalidExperiment(f"a slot table needs runs that end at {N_SLOTS}, got {ends[1:]}")
    if strange := [name for name, _ in table if name not in names]:
        raise InvalidExperiment(f"a slot belongs to {strange[0]!r}, which is no variant")


def _table(owners: Sequence[str]) -> SlotTable:
    end, runs = 0, []
    for name, slots in groupby(owners):
        end += sum(1 for _ in slots)
        runs.append((name, end))
    return tuple(runs)
