"""What a gateway consults for one model alias: the champion, and the experiment running beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ab_testing.errors import InvalidExperiment

CONTROL = "control"
TREATMENT = "treatment"
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

    def __post_init__(self) -> None:
        if not self.key or not self.salt:
            raise InvalidExperiment("an experiment needs a key and a salt")
        if self.phase < 0:
            raise InvalidExperiment(f"experiment {self.key!r}: phase must be >= 0, got {self.phase}")
        _check_names(self)
        _check_weights(self)

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
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Experiment:
        variants = cast(Sequence[JsonObject], data["variants"])
        return cls(
            key=str(data["key"]),
            salt=str(data["salt"]),
            variants=tuple(Variant.from_json(variant) for variant in variants),
            reserved_control=float(cast(float, data.get("reserved_control", 0.0))),
            phase=int(cast(int, data.get("phase", 0))),
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests for one alias go. Its version counts writes, so that a stale copy can be told from a fresh one."""

    alias: str
    version: int
    champion: str
    experiment: Experiment | None = None

    def __post_init__(self) -> None:
        if not self.alias or not self.champion:
            raise InvalidExperiment("a route needs an alias and a champion")
        if self.version < 0:
            raise InvalidExperiment(f"route {self.alias!r}: version must be >= 0, got {self.version}")

    def to_json(self) -> dict[str, object]:
        return {
            "alias": self.alias,
            "version": self.version,
            "champion": self.champion,
            "experiment": None if self.experiment is None else self.experiment.to_json(),
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Route:
        experiment = cast(JsonObject | None, data.get("experiment"))
        return cls(
            alias=str(data["alias"]),
            version=int(cast(int, data["version"])),
            champion=str(data["champion"]),
            experiment=None if experiment is None else Experiment.from_json(experiment),
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
