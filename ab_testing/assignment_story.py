"""Why a unit sees what it sees: every draw of `ab_testing.assignment`, in words and for programs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ab_testing.assignment import (
    RESERVED,
    Assignment,
    assign,
    canary_place,
    experiment_of,
    is_held_out,
    layer_slot,
    slot_of,
)
from ab_testing.experiment import TREATMENT, Experiment, Holdout, Route

NOTHING_RUNS = "no experiment runs: everybody sees the champion"
NOT_ANALYSED = "not analysed, since no experiment has this user"

Place = Literal["champion", "holdout", "outside", "split", "reserved", "treatment", "rest"]


class Explanation(NamedTuple):
    """What a unit sees and what led to it."""

    assignment: Assignment
    place: Place
    """`champion`: nothing runs; `outside`: of the layer's parts; the last three are a canary's zones."""
    layer: str | None
    layer_slot: int | None
    slot: int | None
    """In the slot table of a split that has one."""
    steps: tuple[str, ...]
    """In words, in the order in which they decide."""


def explain(route: Route, unit_id: str) -> Explanation:
    """Return what the unit sees on this route, and why."""
    assignment = assign(route, unit_id)
    steps = _holdout_steps(route.holdout, unit_id)
    if route.holdout is not None and is_held_out(route.holdout, unit_id):
        return Explanation(assignment, "holdout", None, None, None, steps)
    if route.experiment is None:
        return Explanation(assignment, "champion", None, None, None, (*steps, NOTHING_RUNS))
    layer = route.experiment.layer.name if route.experiment.layer else None
    in_layer = None if layer is None else layer_slot(layer, unit_id)
    experiment = experiment_of(route, unit_id)
    steps = (*steps, *_layer_steps(route, layer, in_layer, experiment))
    if experiment is None:
        return Explanation(assignment, "outside", layer, in_layer, None, (*steps, NOT_ANALYSED))
    place = place_of(experiment, unit_id)
    slot = None if experiment.slots is None else slot_of(experiment.salt, unit_id)
    steps = (*steps, _draw(experiment, assignment, place, slot), _standing(assignment))
    return Explanation(assignment, place, layer, in_layer, slot, steps)


def place_of(experiment: Experiment, unit_id: str) -> Place:
    """Return the zone of a unit of an experiment."""
    if not experiment.is_canary:
        return "split"
    place = canary_place(experiment, unit_id)
    if place == RESERVED:
        return "reserved"
    return "treatment" if place == TREATMENT else "rest"


def _holdout_steps(holdout: Holdout | None, unit_id: str) -> tuple[str, ...]:
    if holdout is None:
        return ()
    if is_held_out(holdout, unit_id):
        return (f"held out with {holdout.share:.4g} of all users, whom no experiment touches: sees the champion",)
    return (f"not held out ({holdout.share:.4g} of all users are)",)


def _layer_steps(
    route: Route, layer: str | None, in_layer: int | None, experiment: Experiment | None
) -> tuple[str, ...]:
    if layer is None:
        return ()
    parts = ", ".join(
        f"{each.key} has {each.layer.start} to {each.layer.end - 1}" for each in route.experiments if each.layer
    )
    where = "outside all of them: sees the champion" if experiment is None else f"so it is {experiment.key}'s"
    return (f"slot {in_layer} of the layer {layer} ({parts}), {where}",)


def _draw(experiment: Experiment, assignment: Assignment, place: Place, slot: int | None) -> str:
    if slot is not None:
        return f"slot {slot} of {experiment.key} belongs to {assignment.variant}"
    if place == "split":
        return f"the hash of {experiment.key}'s salt and the user draws {assignment.variant}"
    zones = {
        "reserved": "the reserved half, which sees the control from first to last",
        "treatment": "the part of the other half that the candidate has reached",
        "rest": "the part of the other half that the candidate has not reached yet: sees the control",
    }
    return f"the hash of {experiment.key}'s salt and the user draws {zones[place]}"


def _standing(assignment: Assignment) -> str:
    if assignment.is_analysed:
        return "the user's outcome counts"
    return "not analysed, since a later step may move this user"
