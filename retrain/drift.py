"""How far rounds have taken a model from its base, and whether the next one should go on from there.

A round that continues its parent is kept close to the parent, not to the base: every round gets a new allowance, and
what all of them together change adds up unseen. So each model's distance from the base is measured and kept with it;
and a round starts again from the base, with what earlier rounds learned from, once the distance or the number of rounds
is over a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

from pawl.settings import RebaseSettings

RECORD = "incremental"
"""Where an adapter's manifest holds its `RoundRecord`."""


class Start(StrEnum):
    """What a round's adapter starts as."""

    FIRST = "first"
    """Nothing: there is no adapter to continue."""
    CONTINUE = "continue"
    """Its parent."""
    REBASE = "rebase"
    """Nothing again, though there is a parent."""


@dataclass(frozen=True)
class Drift:
    """A model's distance from its base."""

    kl: float
    """Nats per token: the mean over an answer's tokens of KL(model || base), given the prompt and the answer so far."""
    weight_change: float
    """Of the layers that the adapter is on: the norm of what it adds over the norm of what it is added to."""


@dataclass(frozen=True)
class RoundRecord:
    """What an adapter's manifest says of the round that made it."""

    start: Start
    reference: Literal["parent", "base"]
    rounds: int
    """On top of the base: 1 for an adapter that started as nothing."""
    drift: Drift | None
    """None where nobody measured it."""


@dataclass(frozen=True)
class Parent:
    """A model that could be continued."""

    name: str
    rounds: int
    drift: Drift | None


@dataclass(frozen=True)
class Plan:
    """How a round begins, and why."""

    start: Start
    rounds: int
    reason: str


def plan_round(parent: Parent | None, settings: RebaseSettings, *, tried: Iterable[Drift] = ()) -> Plan:
    """Whether to continue the parent.

    Args:
        tried: the drift of candidates that already continued this parent. One over a limit would only be made again.
    """
    if parent is None:
        return Plan(Start.FIRST, 1, "there is no adapter to continue")
    if settings.every_rounds is not None and parent.rounds >= settings.every_rounds:
        return Plan(Start.REBASE, 1, f"{parent.name} has {parent.rounds} rounds on top of the base")
    if parent.drift is not None and (over := over_limits(parent.drift, settings)):
        return Plan(Start.REBASE, 1, f"{parent.name} is too far from the base: {'; '.join(over)}")
    for drift in tried:
        if over := over_limits(drift, settings):
            return Plan(Start.REBASE, 1, f"a round that continued {parent.name} went too far: {'; '.join(over)}")
    return Plan(Start.CONTINUE, parent.rounds + 1, f"{parent.name} is continued")


def over_limits(drift: Drift, settings: RebaseSettings) -> tuple[str, ...]:
    """Sentences about the limits that are broken; a number that is none breaks every limit."""
    measured = (
        ("nats per token", drift.kl, settings.max_kl),
        ("of the weights' norm", drift.weight_change, settings.max_weight_change),
    )
    return tuple(
        f"{value:.3g} {unit}, the limit is {limit:g}"
        for unit, value, limit in measured
        if limit is not None and not value <= limit
    )


def record_of(plan: Plan, reference: Literal["parent", "base"], drift: Drift | None) -> dict[str, Any]:
    """What goes into the manifest."""
    return asdict(RoundRecord(plan.start, "base" if plan.rounds == 1 else reference, plan.rounds, drift))


def read_record(manifest: Mapping[str, Any]) -> RoundRecord | None:
    """What an adapter's manifest says of its round; None if it was made before such records, or is damaged."""
    try:
        tree = manifest[RECORD]
        drift = Drift(**tree["drift"]) if tree["drift"] else None
        return RoundRecord(Start(tree["start"]), tree["reference"], int(tree["rounds"]), drift)
    except (KeyError, TypeError, ValueError):
        return None


def parent_of(name: str, manifest: Mapping[str, Any]) -> Parent:
    """A model as something to continue."""
    record = read_record(manifest)
    return Parent(name, record.rounds if record else 1, record.drift if record else None)


def drift_curve(lineage: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Parent, ...]:
    """The drift of a model and its ancestors, oldest first.

    Args:
        lineage: names and manifests, youngest first, as the registry gives them.
    """
    return tuple(parent_of(name, manifest) for name, manifest in reversed(lineage))
