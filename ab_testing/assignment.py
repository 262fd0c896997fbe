"""Which variant a unit sees: the same answer in every process and on every host, with nothing stored but the route.

Four draws decide, each with a salt of its own, so that none knows of another: whether the unit is held out, whether
its slot of a layer belongs to an experiment, a canary's zone, and the variant.

A draw is the keyed hash of the unit. All that does not depend on the unit is prepared once per route: the hashers with
their keys, the assignments there are to choose from, and where a draw's bytes are enough, the bytes to compare with.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from ab_testing.errors import InvalidExperiment, InvalidUnit
from ab_testing.experiment import CANARY_RESERVE, CONTROL, HOLDOUT, TREATMENT, Experiment, Holdout, Route, Variant
from ab_testing.slot_table import N_SLOTS, owned

if TYPE_CHECKING:
    from hashlib import blake2b as Hasher

RESERVED, REST = "reserved", "rest"
_RAMP = "ramp"
_SLOT = "slot"
_BITS = 53
_UNUSED_BITS = 64 - _BITS
_ULP = 2.0**-_BITS
_MAX_ROUTES = 256


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


def assign_variant(salt: str, unit_id: str, weights: Mapping[str, float]) -> str:
    """Return the name that `unit_id` draws, with probability proportional to its weight.

    >>> assign_variant("salt", "ada", {"control": 1.0, "treatment": 0.0})
    'control'

    Raises:
        InvalidExperiment: No weight is positive.
    """
    by_name = {name: Assignment(None, name, "", weight, False, 0) for name, weight in weights.items()}
    return _Race(salt, weights, by_name).of(_encoded(unit_id)).variant


def assign(route: Route, unit_id: str | None, *, random_unit: str = "") -> Assignment:
    """Return what the unit sees on this route.

    Args:
        route: The alias's route.
        unit_id: Who asks; None when nobody can be named.
        random_unit: Drawn afresh by the caller for a request without a unit. It is served but never analysed.

    Raises:
        InvalidUnit: Neither `unit_id` nor `random_unit` is given while an experiment runs.
    """
    known = _known_routes.get(id(route))
    draws = known if known is not None and known.route is route else _prepared(route)
    if unit_id:
        return draws.named.of(unit_id.encode("utf-8", "surrogatepass"))
    if not random_unit and route.experiment is not None:
        raise InvalidUnit("a request without a unit needs a random one")
    return draws.unnamed.of(_encoded(random_unit))._replace(is_analysed=False)


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
    return _bits_of(f"holdout/{holdout.salt}", HOLDOUT, unit_id) < holdout.share * 2.0**_BITS


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
    return _bits_of(salt, _SLOT, unit_id) * N_SLOTS >> _BITS


def treatment_probability(weight: float) -> float:
    """Return how likely an analysed unit of a canary at `weight` is to see the treatment.

    >>> treatment_probability(0.5)
    0.5
    """
    return weight / (weight + CANARY_RESERVE)


def canary_place(experiment: Experiment, unit_id: str) -> str:
    """Return `treatment`, `reserved` (the control that never moves) or `rest` (the control, not analysed)."""
    found = _draw_of(experiment).of(_encoded(unit_id))
    if found.variant == TREATMENT:
        return TREATMENT
    return RESERVED if found.is_analysed else REST


def split_variant(experiment: Experiment, unit_id: str) -> Variant:
    """Return the variant of a fixed split that the unit draws, or that its slot belongs to."""
    return experiment.variant(_draw_of(experiment).of(_encoded(unit_id)).variant)


class _Draw:
    """A choice between assignments that depends on the unit alone."""

    def of(self, unit: bytes) -> Assignment:
        raise NotImplementedError


class _Certain(_Draw):
    """No choice."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def of(self, unit: bytes) -> Assignment:  # noqa: ARG002
        return self._assignment


class _Parts(_Draw):
    """The draw's range in parts, each of which has an owner that decides further."""

    def __init__(self, copy: Callable[[], Hasher], cuts: Sequence[int], owners: Sequence[_Draw]) -> None:
        """
        Args:
            copy: A copy of the draw's hasher.
            cuts: The smallest number, of 53 bits, of each part but the first.
            owners: One more than there are cuts.
        """
        self._copy = copy
        # As bytes in the order of a digest: whole numbers are in the order of their bytes, the largest first.
        self._cuts = [(cut << _UNUSED_BITS).to_bytes(8, "big") for cut in cuts]
        self._owners = owners

    def of(self, unit: bytes) -> Assignment:
        hasher = self._copy()
        hasher.update(unit)
        return self._owners[bisect_right(self._cuts, hasher.digest())].of(unit)


class _Race(_Draw):
    """An exponential race: the smallest time wins, with probability proportional to weight.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005, the
    logarithmic method): raising one weight only moves units into that variant. Zero weights are never drawn.
    """

    def __init__(self, salt: str, weights: Mapping[str, float], prizes: Mapping[str, Assignment]) -> None:
        """
        Raises:
            InvalidExperiment: No weight is positive.
        """
        # By name, which breaks ties: the first to reach a time keeps it, and the order of the weights is no matter.
        names = sorted([name for name, weight in weights.items() if weight > 0])
        if not names:
            raise InvalidExperiment("no variant has a positive weight")
        runners = [(_hasher(salt, name).copy, weights[name], prizes[name]) for name in names]
        self._runners = runners if len(runners) > 1 else []  # One alone need not run.
        self._first = prizes[names[0]]

    def of(self, unit: bytes) -> Assignment:
        winner, shortest = self._first, math.inf
        for copy, weight, prize in self._runners:
            hasher = copy()
            hasher.update(unit)
            uniform = ((int.from_bytes(hasher.digest(), "big") >> _UNUSED_BITS) + 1) * _ULP  # (0, 1]: it has a log.
            time = -math.log(uniform) / weight
            if time < shortest:
                winner, shortest = prize, time
        return winner


class _Halves(_Draw):
    """A race of two with equal weights, which need no logarithm: the larger draw wins."""

    def __init__(self, salt: str, first: tuple[str, _Draw], second: tuple[str, _Draw]) -> None:
        """`first` wins a tie; both are a name and the draw that follows."""
        self._copy_first, self._first = _hasher(salt, first[0]).copy, first[1]
        self._copy_second, self._second = _hasher(salt, second[0]).copy, second[1]

    def of(self, unit: bytes) -> Assignment:
        hasher, other = self._copy_first(), self._copy_second()
        hasher.update(unit)
        other.update(unit)
        mine, theirs = hasher.digest(), other.digest()
        is_first = mine >= theirs or _bits(mine) == _bits(theirs)  # A tie of the bits that count.
        return self._first.of(unit) if is_first else self._second.of(unit)


class _RouteDraws(NamedTuple):
    """All that a route may draw."""

    route: Route
    named: _Draw
    unnamed: _Draw
    """Nobody without a name is held out."""


_known_routes: dict[int, _RouteDraws] = {}
"""By the identity of the route, which costs more to compare than to draw from. Each holds its route, so that no other
one can have that identity."""


def _prepared(route: Route) -> _RouteDraws:
    """Return the draws of a route that was not seen before, and remember them."""
    unnamed = _unnamed_draw(route)
    named = unnamed if route.holdout is None else _holdout_draw(route.holdout, route.champion, unnamed)
    if len(_known_routes) >= _MAX_ROUTES:
        _known_routes.clear()
    draws = _known_routes[id(route)] = _RouteDraws(route, named, unnamed)
    return draws


def _holdout_draw(holdout: Holdout, champion: str, others: _Draw) -> _Draw:
    held = _Certain(Assignment(HOLDOUT, HOLDOUT, champion, holdout.share, False, 0))
    hasher = _hasher(f"holdout/{holdout.salt}", HOLDOUT)
    return _Parts(hasher.copy, [math.ceil(holdout.share * 2.0**_BITS)], [held, others])


def _unnamed_draw(route: Route) -> _Draw:
    outside = _Certain(Assignment(None, CONTROL, route.champion, 1.0, False, 0))
    first = route.experiment
    if first is None or first.layer is None:
        return outside if first is None else _draw_of(first)
    runs: list[tuple[int, _Draw]] = []
    ranges = [(each.layer, _draw_of(each)) for each in route.experiments if each.layer is not None]
    for layer, draw in sorted(ranges, key=lambda claimed: claimed[0].start):
        runs += [(layer.start, outside), (layer.end, draw)]
    return _slot_draw(f"layer/{first.layer.name}", [*runs, (N_SLOTS, outside)])


@lru_cache(maxsize=_MAX_ROUTES)
def _draw_of(experiment: Experiment) -> _Draw:
    if experiment.is_canary:
        return _canary_draw(experiment)
    prizes = {
        each.name: Assignment(
            experiment.key, each.name, each.model, _share_of(experiment, each), True, experiment.phase
        )
        for each in experiment.variants
    }
    if experiment.slots is not None:
        return _slot_draw(experiment.salt, [(end, _Certain(prizes[name])) for name, end in experiment.slots])
    return _Race(experiment.salt, {each.name: each.weight for each in experiment.variants}, prizes)


def _share_of(experiment: Experiment, variant: Variant) -> float:
    """How likely a variant of a fixed split is: of a slot table what it owns, since weights are rounded to slots."""
    if experiment.slots is not None:
        return owned(experiment.slots, variant.name) / N_SLOTS
    total = 0.0
    for each in experiment.variants:
        total += each.weight
    return variant.weight / total


def _slot_draw(salt: str, runs: Iterable[tuple[int, _Draw]]) -> _Draw:
    """Return the draw of an owner of slots; a run is the slot after its last one, and its owner."""
    cuts, owners, start = list[int](), list[_Draw](), 0
    for end, owner in runs:
        if end > start:
            cuts.append(-(-(start << _BITS) // N_SLOTS))  # The smallest number that `slot_of` puts there.
            owners.append(owner)
            start = end
    return _Parts(_hasher(salt, _SLOT).copy, cuts[1:], owners)


def _canary_draw(experiment: Experiment) -> _Draw:
    """The zone is drawn first, then the place in the ramp, so that no unit of the reserved control ever becomes
    treatment. Units in the rest of the ramp see the control and are not analysed: a later step may move them, and a
    unit that has been on both sides belongs to neither.
    """
    control, treatment = experiment.variant(CONTROL), experiment.variant(TREATMENT)
    likely, share = treatment_probability(treatment.weight), treatment.weight / (1 - CANARY_RESERVE)
    reserved = Assignment(experiment.key, CONTROL, control.model, 1 - likely, True, experiment.phase)
    prizes = {
        TREATMENT: Assignment(experiment.key, TREATMENT, treatment.model, likely, True, experiment.phase),
        REST: reserved._replace(is_analysed=False),
    }
    ramp = _Race(experiment.salt + "/ramp", {TREATMENT: share, REST: 1 - share}, prizes)
    return _Halves(experiment.salt + "/zone", (RESERVED, _Certain(reserved)), (_RAMP, ramp))


def _bits_of(salt: str, name: str, unit_id: str) -> int:
    """A uniform draw from 0 to 2^53 - 1."""
    hasher = _hasher(salt, name).copy()
    hasher.update(_encoded(unit_id))
    return _bits(hasher.digest())


def _bits(digest: bytes) -> int:
    return int.from_bytes(digest, "big") >> _UNUSED_BITS


def _encoded(unit_id: str) -> bytes:
    return unit_id.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=4096)
def _hasher(salt: str, name: str) -> Hasher:
    """One that has its key already: copying it is cheaper than making it."""
    # Hashed, because blake2b takes at most 64 bytes of key; the length keeps ("ab", "c") apart from ("a", "bc").
    key = blake2b(f"{len(salt)}:{salt}/{name}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
    return blake2b(digest_size=8, key=key)
