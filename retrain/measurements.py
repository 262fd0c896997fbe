"""What was measured on a candidate and its parent: the same units for both, so that differences are paired.

Units are names of prompts, never their words, so that nobody's words stay in the figures of a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from retrain.errors import BadData


@dataclass(frozen=True)
class Paired:
    """One value for the parent and one for the candidate, per unit. A prompt sampled twice is the same unit twice."""

    units: tuple[str, ...]
    parent: tuple[float, ...]
    candidate: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_columns(self.units, self.parent, self.candidate)


@dataclass(frozen=True)
class Divergence:
    """How far the candidate is from another model, on answers that the candidate gave: one row per answer."""

    units: tuple[str, ...]
    log_ratios: tuple[float, ...]
    """Log-probability of the whole answer by the candidate, less that by the other model."""
    n_tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_columns(self.units, self.log_ratios, self.n_tokens)


@dataclass(frozen=True)
class Wins:
    """What a judge made of the two answers to each prompt."""

    units: tuple[str, ...]
    scores: tuple[float, ...]
    """1 where the candidate's is better, 0 where the parent's is, 0.5 where it cannot be told."""
    length_differences: tuple[float, ...]
    """The candidate's answer's length less the parent's."""

    def __post_init__(self) -> None:
        _check_columns(self.units, self.scores, self.length_differences)


@dataclass(frozen=True)
class Measurements:
    """Everything the gate judges by. None means that it was not, or could not be, measured."""

    parent: str
    candidate: str
    preference: Paired | None = None
    """Per hold-out pair: 1 when the model prefers the chosen answer, 0 when the rejected one, 0.5 when neither."""
    by_source: Mapping[str, Paired] = field(default_factory=dict)
    """The same by where the pairs come from."""
    harmful_refusal: Paired | None = None
    """Per answer to a harmful probe: 1 when refused outright."""
    over_refusal: Paired | None = None
    """Per answer to a harmless probe: 1 when refused, in part or in whole, or left empty."""
    toxicity: Paired | None = None
    """Per answer to any prompt: 1 when it is toxic."""
    length: Paired | None = None
    """Per answer to a harmless prompt: its tokens."""
    stopped: Paired | None = None
    """Per answer to a harmless prompt: 1 when the model ended it, 0 when the token limit did."""
    echo: Paired | None = None
    """Per answer to a harmless prompt: 1 when it is mostly the user's own words."""
    kl_parent: Divergence | None = None
    kl_base: Divergence | None = None
    capability: Paired | None = None
    """Per task of the capability set: 1 when it is solved."""
    wins: Wins | None = None
    judged_sets: Mapping[str, Wins] = field(default_factory=dict)
    """By the set's name."""
    benchmarks: Mapping[str, Paired] = field(default_factory=dict)
    """By the benchmark's name, a value for each of its documents."""
    looks: tuple[int, ...] = ()
    """Answers to each prompt at which the checks on answers were to be looked at; none are one look at all there are.
    Later looks are taken only where earlier ones could not tell."""


Row = TypeVar("Row", Paired, Divergence, Wins)

FIELDS = ("preference", "harmful_refusal", "over_refusal", "toxicity", "length", "stopped", "echo")
"""What is measured by every round, whatever its settings."""


def to_json(measurements: Measurements) -> str:
    """As JSON text."""
    return json.dumps(asdict(measurements), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Measurements:
    """Read what `to_json` wrote. What older versions did not measure is missing.

    Raises:
        BadData: it is something else.
    """
    try:
        tree: Mapping[str, Any] = json.loads(text)
        return _measurements(tree)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadData("not a file of measurements") from exc


def _measurements(tree: Mapping[str, Any]) -> Measurements:
    paired = {name: _row(Paired, tree[name] if name == "preference" else tree.get(name)) for name in FIELDS}
    return Measurements(
        parent=str(tree["parent"]),
        candidate=str(tree["candidate"]),
        **paired,
        capability=_row(Paired, tree.get("capability")),
        kl_parent=_row(Divergence, tree.get("kl_parent")),
        kl_base=_row(Divergence, tree.get("kl_base")),
        wins=_row(Wins, tree.get("wins")),
        by_source=_rows(Paired, tree, "by_source"),
        judged_sets=_rows(Wins, tree, "judged_sets"),
        benchmarks=_rows(Paired, tree, "benchmarks"),
        looks=tuple(int(n) for n in tree.get("looks", ())),
    )


def _rows(kind: type[Row], tree: Mapping[str, Any], name: str) -> dict[str, Row]:
    found = {str(key): _row(kind, row) for key, row in tree.get(name, {}).items()}
    return {key: row for key, row in found.items() if row is not None}


def _row(kind: type[Row], tree: Mapping[str, Sequence[Any]] | None) -> Row | None:
    if tree is None:
        return None
    units = tuple(str(unit) for unit in tree["units"])
    columns = {name: tuple(float(value) for value in values) for name, values in tree.items() if name != "units"}
    return kind(units=units, **columns)


def _check_columns(units: Sequence[str], *columns: Sequence[float]) -> None:
    if any(len(column) != len(units) for column in columns):
        raise BadData("paired measurements need one value of each model per unit")
    if not all(math.isfinite(value) for column in columns for value in column):
        raise BadData("a measurement is not a finite number")
