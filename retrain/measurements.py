"""What was measured on a candidate and its parent: the same units for both, so that differences are paired."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retrain.errors import BadData


@dataclass(frozen=True)
class Paired:
    """One value for the parent and one for the candidate, per unit. A prompt sampled twice is the same unit twice."""

    units: tuple[str, ...]
    parent: tuple[float, ...]
    candidate: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.units) == len(self.parent) == len(self.candidate):
            raise BadData("paired measurements need one value of each model per unit")
        if not all(map(math.isfinite, (*self.parent, *self.candidate))):
            raise BadData("a measurement is not a finite number")


@dataclass(frozen=True)
class Measurements:
    """Everything the gate judges by. None means that it was not, or could not be, measured."""

    parent: str
    candidate: str
    preference: Paired | None = None
    """Per hold-out pair: 1 when the model prefers the chosen answer, 0 when the rejected one, 0.5 when neither."""
    harmful_refusal: Paired | None = None
    """Per answer to a harmful probe: 1 when refused outright."""
    over_refusal: Paired | None = None
    """Per answer to a harmless probe: 1 when refused, in part or in whole."""
    toxicity: Paired | None = None
    """Per answer to any prompt: 1 when it is toxic."""
    length: Paired | None = None
    """Per answer to a harmless prompt: its tokens."""
    stopped: Paired | None = None
    """Per answer to a harmless prompt: 1 when the model ended it, 0 when the token limit did."""


FIELDS = ("preference", "harmful_refusal", "over_refusal", "toxicity", "length", "stopped")


def to_json(measurements: Measurements) -> str:
    """As JSON text."""
    return json.dumps(asdict(measurements), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Measurements:
    """Read what `to_json` wrote.

    Raises:
        BadData: it is something else.
    """
    try:
        tree: Mapping[str, Any] = json.loads(text)
        pairs = {name: _paired(tree[name]) for name in FIELDS}
        return Measurements(parent=str(tree["parent"]), candidate=str(tree["candidate"]), **pairs)
    except (ValueError, KeyError, TypeError) as exc:
        raise BadData("not a file of measurements") from exc


def _paired(tree: Mapping[str, Sequence[Any]] | None) -> Paired | None:
    if tree is None:
        return None
    return Paired(
        units=tuple(str(unit) for unit in tree["units"]),
        parent=tuple(float(value) for value in tree["parent"]),
        candidate=tuple(float(value) for value in tree["candidate"]),
    )
