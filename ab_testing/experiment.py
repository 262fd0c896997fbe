"""What a gateway consults for one model alias: the champion, and the experiment running beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

from ab_testing.errors import InvalidExperiment
from ab_testing.slot_table import N_SLOTS, SlotTable, check_table, reassigned

CONTROL = "control"
TREATMENT = "treatment"
HOLDOUT = "holdout"
"""What is recorded, as experiment and as variant, of the users that no experiment touches; no experiment's key."""
CANARY_RESERVE = 0.5
"""Share of traffic that a canary keeps on the champion, from first to last, to compare with."""

JsonObject = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the models that an experiment serves."""

    name: str
    model: str
    weight: float
    """Share of traffic; a fixed split may use any scale, a canary uses shares of all traffic."""

    def __post_init__(self) -> None:
        if not self.name or not self.model:
            raise InvalidExperiment("a variant needs a name and a model")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InvalidExperiment(f"variant {self.name!r}: weight must be a number >= 0, got {self.weight}")

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "model": self.model, "weight": self.weight}

    @classmethod
    def from_json(cls, data: JsonObject) -> Variant:
        return cls(name=str(data["name"]), model=str(data["model"]), weight=float(cast(float, data["weight"])))


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The part of a layer that an experiment has: the users whose slot in the layer is in `[start, end)`."""

    name: str
    start: int
    end: int

    def __post_init__(self) -> None:
        if not self.name or not 0 <= self.start < self.end <= N_SLOTS:
            raise InvalidExperiment(
                f"layer {self.name!r}: a range needs 0 <= start < end <= {N_SLOTS}, got {self.start} and {self.end}"
            )

    @property
    def share(self) -> float:
        """Of all users."""
        return (self.end - self.start) / N_SLOTS

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "start": self.start, "end": self.end}

    @classmethod
    def from_json(cls, data: JsonObject) -> LayerRange:
        return cls(str(data["name"]), int(cast(int, data["start"])), int(cast(int, data["end"])))


@dataclass(frozen=True, slots=True)
class Holdout:
    """The users that no experiment and no canary touches."""

    share: float
    salt: str

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.salt):
            raise InvalidExperiment(f"a hold-out needs a salt and a share between 0 and 1, got {self.share}")

    def to_json(self) -> dict[str, object]:
        return {"share": self.share, "salt": self.salt}

    @classmethod
    def from_json(cls, data: JsonObject) -> Holdout:
        return cls(float(cast(float, data["share"])), str(data["salt"]))


@dataclass(frozen=True, slots=True)
class Experiment:
    """Variants and the salt that decides who sees which.

    Two shapes. A fixed split (`reserved_control` 0) analyses every unit. A canary (`reserved_control` 0.5) has a
    control and a treatment; half of the traffic is a reserved control that never moves, and the treatment grows inside
    the other half.
    """

    key: str
    salt: str
    variants: tuple[Variant, ...]
    reserved_control: float = 0.0
    phase: int = 0
    """Counts weight changes; a unit is analysed under the phase in which it was first seen."""
    layer: LayerRange | None = None
    """None for all users."""
    slots: SlotTable | None = None
    """Who owns which users; None where they are drawn by weighted rendezvous hashing."""

    def __post_init__(self) -> None:
        if not self.key or not self.salt:
            raise InvalidExperiment("an experiment needs a key and a salt")
        if self.key == HOLDOUT:
            raise InvalidExperiment(
                f"no experiment may be called {HOLDOUT!r}: that is the hold-out's name in the records"
            )
        if self.phase < 0:
            raise InvalidExperiment(f"experiment {self.key!r}: phase must be >= 0, got {self.phase}")
        _check_names(self)
        _check_weights(self)
        _check_allocation(self)

    @property
    def is_canary(self) -> bool:
        return self.reserved_control > 0

    def variant(self, name: str) -> Variant:
        """Return the variant called `name`.

        Raises:
            InvalidExperiment: There is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise InvalidExperiment(f"experiment {self.key!r} has no variant {name!r}")

    def to_json(self) -> dict[str, object]:
        return {
            "key": self.key,
            "salt": self.salt,
            "variants": [variant.to_json() for variant in self.variants],
            "reserved_control": self.reserved_control,
            "phase": self.phase,
            **({"layer": self.layer.to_json()} if self.layer else {}),
            **({"slots": [list(run) for run in self.slots]} if self.slots else {}),
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Experiment:
        variants = cast(Sequence[JsonObject], data["variants"])
        layer = cast(JsonObject | None, data.get("layer"))
        runs = cast(Sequence[tuple[str, int]] | None, data.get("slots"))
        return cls(
            key=str(data["key"]),
            salt=str(data["salt"]),
            variants=tuple(Variant.from_json(variant) for variant in variants),
            reserved_control=float(cast(float, data.get("reserved_control", 0.0))),
            phase=int(cast(int, data.get("phase", 0))),
            layer=None if layer is None else LayerRange.from_json(layer),
            slots=None if runs is None else tuple((str(name), int(end)) for name, end in runs),
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests for one alias go. Its version counts writes, so that a stale copy can be told from a fresh one."""

    alias: str
    version: int
    champion: str
    experiment: Experiment | None = None
    """The canary or the fixed split that runs."""
    more: tuple[Experiment, ...] = ()
    """Further fixed splits of the alias, each with a range of its own in the same layer."""
    holdout: Holdout | None = None

    def __post_init__(self) -> None:
        if not self.alias or not self.champion:
            raise InvalidExperiment("a route needs an alias and a champion")
        if self.version < 0:
            raise InvalidExperiment(f"route {self.alias!r}: version must be >= 0, got {self.version}")
        if self.more:
            _check_shared_layer(self)

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """All that run, of which a user is in at most one."""
        return () if self.experiment is None else (self.experiment, *self.more)

    def control_model(self, key: str | None) -> str:
        """Return what is served where a variant of the experiment `key` cannot be."""
        for experiment in self.experiments:
            if experiment.key == key:
                return next((each.model for each in experiment.variants if each.name == CONTROL), self.champion)
        return self.champion

    def to_json(self) -> dict[str, object]:
        return {
            "alias": self.alias,
            "version": self.version,
            "champion": self.champion,
            "experiment": None if self.experiment is None else self.experiment.to_json(),
            **({"more": [experiment.to_json() for experiment in self.more]} if self.more else {}),
            **({"holdout": self.holdout.to_json()} if self.holdout else {}),
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Route:
        experiment = cast(JsonObject | None, data.get("experiment"))
        more = cast(Sequence[JsonObject], data.get("more", ()))
        holdout = cast(JsonObject | None, data.get("holdout"))
        return cls(
            alias=str(data["alias"]),
            version=int(cast(int, data["version"])),
            champion=str(data["champion"]),
            experiment=None if experiment is None else Experiment.from_json(experiment),
            more=tuple(Experiment.from_json(each) for each in more),
            holdout=None if holdout is None else Holdout.from_json(holdout),
        )


def canary_experiment(
    key: str, salt: str, *, champion: str, candidate: str, weight: float, phase: int = 0
) -> Experiment:
    """Return the canary that gives `candidate` the share `weight` of all traffic."""
    return Experiment(
        key=key,
        salt=salt,
        variants=(Variant(CONTROL, champion, 1.0 - weight), Variant(TREATMENT, candidate, weight)),
        reserved_control=CANARY_RESERVE,
        phase=phase,
    )


def reweighed(experiment: Experiment, weights: Mapping[str, float]) -> Experiment:
    """Return a fixed split with other weights, in its next phase: as few users as possible change sides.

    Args:
        weights: by variant; those that are not named keep theirs.

    Raises:
        InvalidExperiment: it has no such variant, is a canary, or no weight is positive.
    """
    if experiment.is_canary:
        raise InvalidExperiment(f"{experiment.key!r} is a canary: its weight is the controller's")
    for name in weights:
        experiment.variant(name)
    variants = tuple(replace(each, weight=weights.get(each.name, each.weight)) for each in experiment.variants)
    slots = experiment.slots and reassigned(experiment.slots, {each.name: each.weight for each in variants})
    return replace(experiment, variants=variants, slots=slots, phase=experiment.phase + 1)


def _check_names(experiment: Experiment) -> None:
    names = Counter(variant.name for variant in experiment.variants)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise InvalidExperiment(f"experiment {experiment.key!r}: variant {twice[0]!r} is named twice")
    if experiment.is_canary and set(names) != {CONTROL, TREATMENT}:
        raise InvalidExperiment(f"canary {experiment.key!r}: needs exactly the variants control and treatment")


def _check_weights(experiment: Experiment) -> None:
    if not any(variant.weight > 0 for variant in experiment.variants):
        raise InvalidExperiment(f"experiment {experiment.key!r}: no variant has a positive weight")
    if experiment.reserved_control not in (0.0, CANARY_RESERVE):
        raise InvalidExperiment(f"experiment {experiment.key!r}: reserved_control must be 0 or {CANARY_RESERVE}")
    if experiment.is_canary and experiment.variant(TREATMENT).weight > 1 - CANARY_RESERVE:
        raise InvalidExperiment(
            f"canary {experiment.key!r}: treatment may take at most {1 - CANARY_RESERVE} of traffic"
        )


def _check_allocation(experiment: Experiment) -> None:
    if experiment.is_canary and (experiment.layer or experiment.slots):
        raise InvalidExperiment(f"canary {experiment.key!r}: it has zones of its own, neither a layer nor slots")
    if experiment.slots is not None:
        check_table(experiment.slots, [variant.name for variant in experiment.variants])


def _check_shared_layer(route: Route) -> None:
    """Several experiments of one alias must not want the same user, who can see but one model."""
    taken = [(experiment.layer, experiment.key) for experiment in route.experiments if experiment.layer]
    if len(taken) <= len(route.more) or len({layer.name for layer, _ in taken}) > 1:
        raise InvalidExperiment(f"route {route.alias!r}: several experiments at once must share a layer")
    if len({key for _, key in taken}) < len(taken):
        raise InvalidExperiment(f"route {route.alias!r}: two experiments have the same key")
    ordered = sorted((layer.start, layer.end) for layer, _ in taken)
    if any(later[0] < earlier[1] for earlier, later in pairwise(ordered)):
        raise InvalidExperiment(f"route {route.alias!r}: two experiments claim the same users")
