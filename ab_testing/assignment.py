"""Which variant a unit sees: the same answer in every process and on every host, with nothing stored but the route.

Four draws decide, each with a salt of its own, so that none knows of another: whether the unit is held out, whether
its slot of a layer belongs to an experiment, a canary's zone, and the variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from ab_testing.errors import InvalidExperiment, InvalidUnit
from ab_testing.experiment import CANARY_RESERVE, CONTROL, HOLDOUT, TREATMENT, Experiment, Holdout, Route, Variant
from ab_testing.slot_table import N_SLOTS, owned

if TYPE_CHECKING:
    from hashlib import blake2b as Hasher

RESERVED, REST = "reserved", "rest"
_RAMP = "ramp"
_SLOT = "slot"
_BITS = 53
_ULP = 2.0**-_BITS


class Assignment(NamedTuple):
    """What the hash says about one unit."""

    experiment: str | None
    """Key of the experiment; None when the unit is in none, `holdout` when it is kept out of all."""
    variant: str
    model: str
    probability: float
    """How likely *this variant* was, among units that are analysed. See `treatment_probability` for the other one."""
    is_analysed: bool
    phase: int


class Arm(Protocol):
    """What a unit can draw."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...


class _Arm(NamedTuple):
    name: str
    weight: float


_AnArm = TypeVar("_AnArm", bound=Arm)


def assign_variant(salt: str, unit_id: str, weights: Mapping[str, float]) -> str:
    """Return the name that `unit_id` draws, with probability proportional to its weight.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005, the
    logarithmic method): raising one weight only moves units into that variant. Zero weights are never drawn.

    >>> assign_variant("salt", "ada", {"control": 1.0, "treatment": 0.0})
    'control'

    Raises:
        InvalidExperiment: No weight is positive.
    """
    return _fastest(salt, [_Arm(name, weight) for name, weight in weights.items()], _encoded(unit_id)).name


def assign(route: Route, unit_id: str | None, *, random_unit: str = "") -> Assignment:
    """Return what the unit sees on this route.

    Args:
        route: The alias's route.
        unit_id: Who asks; None when nobody can be named.
        random_unit: Drawn afresh by the caller for a request without a unit. It is served but never analysed.

    Raises:
        InvalidUnit: Neither `unit_id` nor `random_unit` is given while an experiment runs.
    """
    if unit_id and route.holdout is not None and is_held_out(route.holdout, unit_id):
        return Assignment(HOLDOUT, HOLDOUT, route.champion, route.holdout.share, False, 0)
    if route.experiment is None:
        return Assignment(None, CONTROL, route.champion, 1.0, False, 0)
    unit = unit_id or random_unit
    if not unit:
        raise InvalidUnit("a request without a unit needs a random one")
    experiment = experiment_of(route, unit)
    if experiment is None:
        return Assignment(None, CONTROL, route.champion, 1.0, False, 0)
    assignment = _canary(experiment, unit) if experiment.is_canary else _fixed_split(experiment, unit)
    return assignment if unit_id else assignment._replace(is_analysed=False)


def force(route: Route, name: str) -> Assignment | None:
    """Return what somebody sees who asks for a variant by its name, which no analysis counts; None if there is none.

    Args:
        route: The alias's route.
        name: The variant's, or `KEY/VARIANT` where several experiments of the alias have one of that name.
    """
    for experiment in route.experiments:
        for each in experiment.variants:
            if name in (each.name, f"{experiment.key}/{each.name}"):
                return Assignment(experiment.key, each.name, each.model, 1.0, False, experiment.phase)
    return None


def is_held_out(holdout: Holdout, unit_id: str) -> bool:
    """Whether no experiment may touch the unit. A larger share keeps everybody who was held out before."""
    return _bits_of(f"holdout/{holdout.salt}", HOLDOUT, _encoded(unit_id)) < holdout.share * 2.0**_BITS


def experiment_of(route: Route, unit_id: str) -> Experiment | None:
    """Return the experiment in whose part of the layer the unit lies, if any."""
    first = route.experiment
    if first is None or first.layer is None:
        return first
    slot = layer_slot(first.layer.name, unit_id)
    for experiment in route.experiments:
        if experiment.layer is not None and experiment.layer.start <= slot < experiment.layer.end:
            return experiment
    return None


def layer_slot(layer: str, unit_id: str) -> int:
    """Return the unit's place in a layer, the same for all experiments that share it."""
    return slot_of(f"layer/{layer}", unit_id)


def slot_of(salt: str, unit_id: str) -> int:
    """Return which of the 10,000 equal parts of all units this one is in."""
    return _bits_of(salt, _SLOT, _encoded(unit_id)) * N_SLOTS >> _BITS


def treatment_probability(weight: float) -> float:
    """Return how likely an analysed unit of a canary at `weight` is to see the treatment.

    >>> treatment_probability(0.5)
    0.5
    """
    return weight / (weight + CANARY_RESERVE)


def canary_place(salt: str, unit_id: str, weight: float) -> str:
    """Return `treatment`, `reserved` (the control that never moves) or `rest` (the control, not analysed).

    The zone is drawn first, then the place in the ramp, so that no unit of the reserved control ever becomes treatment.
    """
    unit = _encoded(unit_id)
    zones = salt + "/zone"  # Halves: of two equal weights the larger draw wins.
    if _bits_of(zones, RESERVED, unit) >= _bits_of(zones, _RAMP, unit):
        return RESERVED
    return _fastest(salt + "/ramp", _ramp_arms(weight), unit).name


def split_variant(experiment: Experiment, unit_id: str) -> Variant:
    """Return the variant of a fixed split that the unit draws, or that its slot belongs to."""
    if experiment.slots is not None:
        slot = slot_of(experiment.salt, unit_id)
        return experiment.variant(next(name for name, end in experiment.slots if slot < end))
    return _fastest(experiment.salt, experiment.variants, _encoded(unit_id))


def _fixed_split(experiment: Experiment, unit_id: str) -> Assignment:
    chosen = split_variant(experiment, unit_id)
    likely = _share_of(experiment, chosen)
    return Assignment(experiment.key, chosen.name, chosen.model, likely, True, experiment.phase)


def _share_of(experiment: Experiment, variant: Variant) -> float:
    """How likely a variant of a fixed split is: of a slot table what it owns, since weights are rounded to slots."""
    if experiment.slots is not None:
        return owned(experiment.slots, variant.name) / N_SLOTS
    total = 0.0
    for each in experiment.variants:
        total += each.weight
    return variant.weight / total


def _canary(experiment: Experiment, unit_id: str) -> Assignment:
    """Units in the rest of the ramp see the control and are not analysed: a later step may move them, and a unit that
    has been on both sides belongs to neither.
    """
    first, second = experiment.variants
    treatment, control = (second, first) if second.name == TREATMENT else (first, second)
    likely = treatment_probability(treatment.weight)
    place = canary_place(experiment.salt, unit_id, treatment.weight)
    if place == TREATMENT:
        return Assignment(experiment.key, TREATMENT, treatment.model, likely, True, experiment.phase)
    return Assignment(experiment.key, CONTROL, control.model, 1 - likely, place == RESERVED, experiment.phase)


def _fastest(salt: str, arms: Iterable[_AnArm], unit: bytes) -> _AnArm:
    """An exponential race: the smallest time wins, with probability proportional to weight.

    Raises:
        InvalidExperiment: No weight is positive.
    """
    winner: _AnArm | None = None
    shortest = math.inf
    for arm in arms:
        weight = arm.weight
        if weight <= 0:
            continue
        hasher = _hasher(salt, arm.name).copy()  # As `_bits_of`, without a call.
        hasher.update(unit)
        uniform = ((int.from_bytes(hasher.digest(), "big") >> 11) + 1) * _ULP  # (0, 1]: the logarithm is finite.
        time = -math.log(uniform) / weight
        # The name breaks ties, so that the answer does not depend on the order.
        if winner is None or time < shortest or (time == shortest and arm.name < winner.name):
            winner, shortest = arm, time
    if winner is None:
        raise InvalidExperiment("no variant has a positive weight")
    return winner


def _bits_of(salt: str, name: str, unit: bytes) -> int:
    """A uniform draw from 0 to 2^53 - 1."""
    hasher = _hasher(salt, name).copy()
    hasher.update(unit)
    return int.from_bytes(hasher.digest(), "big") >> 11


def _encoded(unit_id: str) -> bytes:
    return unit_id.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=256)
def _ramp_arms(weight: float) -> tuple[_Arm, _Arm]:
    share = weight / (1 - CANARY_RESERVE)
    return _Arm(TREATMENT, share), _Arm(REST, 1 - share)


@lru_cache(maxsize=4096)
def _hasher(salt: str, name: str) -> Hasher:
    """One that has its key already: copying it is cheaper than making it."""
    # Hashed, because blake2b takes at most 64 bytes of key; the length keeps ("ab", "c") apart from ("a", "bc").
    key = blake2b(f"{len(salt)}:{salt}/{name}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
    return blake2b(digest_size=8, key=key)
