"""Which variant a unit sees: the same answer in every process and on every host, with nothing stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from ab_testing.errors import InvalidExperiment, InvalidUnit
from ab_testing.experiment import CANARY_RESERVE, CONTROL, TREATMENT, Experiment, Route

_RESERVED, _RAMP, _REST = "reserved", "ramp", "rest"
_ZONES = {_RESERVED: CANARY_RESERVE, _RAMP: 1 - CANARY_RESERVE}


class Assignment(NamedTuple):
    """What the hash says about one unit."""

    experiment: str | None
    """Key of the experiment; None when the alias has none."""
    variant: str
    model: str
    probability: float
    """How likely *this variant* was, among units that are analysed. See `treatment_probability` for the other one."""
    is_analysed: bool
    phase: int


def assign_variant(salt: str, unit_id: str, weights: Mapping[str, float]) -> str:
    """Return the name that `unit_id` draws, with probability proportional to its weight.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005, the
    logarithmic method): raising one weight only moves units into that variant. Zero weights are never drawn.

    >>> assign_variant("salt", "ada", {"control": 1.0, "treatment": 0.0})
    'control'

    Raises:
        InvalidExperiment: No weight is positive.
    """
    unit = unit_id.encode("utf-8", "surrogatepass")
    # The name breaks ties, so that the answer does not depend on the order of the mapping.
    times = [(_finish_time(salt, name, unit, weight), name) for name, weight in weights.items() if weight > 0]
    if not times:
        raise InvalidExperiment("no variant has a positive weight")
    return min(times)[1]


def assign(route: Route, unit_id: str | None, *, random_unit: str = "") -> Assignment:
    """Return what the unit sees on this route.

    Args:
        route: The alias's route.
        unit_id: Who asks; None when nobody can be named.
        random_unit: Drawn afresh by the caller for a request without a unit. It is served but never analysed.

    Raises:
        InvalidUnit: Neither `unit_id` nor `random_unit` is given while an experiment runs.
    """
    experiment = route.experiment
    if experiment is None:
        return Assignment(None, CONTROL, route.champion, 1.0, False, 0)
    unit = unit_id or random_unit
    if not unit:
        raise InvalidUnit("a request without a unit needs a random one")
    assignment = _canary(experiment, unit) if experiment.is_canary else _fixed_split(experiment, unit)
    return assignment if unit_id else assignment._replace(is_analysed=False)


def treatment_probability(weight: float) -> float:
    """Return how likely an analysed unit of a canary at `weight` is to see the treatment.

    >>> treatment_probability(0.5)
    0.5
    """
    return weight / (weight + CANARY_RESERVE)


def _fixed_split(experiment: Experiment, unit_id: str) -> Assignment:
    weights = {variant.name: variant.weight for variant in experiment.variants}
    chosen = experiment.variant(assign_variant(experiment.salt, unit_id, weights))
    share = chosen.weight / sum(weights.values())
    return Assignment(experiment.key, chosen.name, chosen.model, share, True, experiment.phase)


def _canary(experiment: Experiment, unit_id: str) -> Assignment:
    """Draw the zone, then the place in the ramp, so that no unit of the reserved control ever becomes treatment.

    Units in the rest of the ramp see the control and are not analysed: a later step may move them, and a unit that has
    been on both sides belongs to neither.
    """
    treatment = experiment.variant(TREATMENT)
    likely = treatment_probability(treatment.weight)
    place = _canary_place(experiment.salt, unit_id, treatment.weight)
    if place == TREATMENT:
        return Assignment(experiment.key, TREATMENT, treatment.model, likely, True, experiment.phase)
    model = experiment.variant(CONTROL).model
    return Assignment(experiment.key, CONTROL, model, 1 - likely, place == _RESERVED, experiment.phase)


def _canary_place(salt: str, unit_id: str, weight: float) -> str:
    zone = assign_variant(salt + "/zone", unit_id, _ZONES)
    if zone == _RESERVED:
        return zone
    share = weight / (1 - CANARY_RESERVE)
    return assign_variant(salt + "/ramp", unit_id, {TREATMENT: share, _REST: 1 - share})


def _finish_time(salt: str, name: str, unit: bytes, weight: float) -> float:
    """Exponential race: the smallest time wins, with probability proportional to weight."""
    bits = int.from_bytes(blake2b(unit, digest_size=8, key=_hash_key(salt, name)).digest(), "big") >> 11
    uniform = (bits + 1) * 2.0**-53  # (0, 1]: never zero, so the logarithm is finite.
    return -math.log(uniform) / weight


@lru_cache(maxsize=4096)
def _hash_key(salt: str, name: str) -> bytes:
    # Hashed, because blake2b takes at most 64 bytes of key; the length keeps ("ab", "c") apart from ("a", "bc").
    return blake2b(f"{len(salt)}:{salt}/{name}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
