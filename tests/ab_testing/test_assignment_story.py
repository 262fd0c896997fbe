"""What is told of an assignment is what the assignment does."""

from __future__ import annotations

import pytest

from ab_testing.assignment import assign
from ab_testing.assignment_story import explain
from ab_testing.experiment import Experiment, Holdout, LayerRange, Route, Variant, canary_experiment

VARIANTS = (Variant("a", "m0", 1), Variant("b", "m1", 1))
LAYERED = Experiment("tone", "s", VARIANTS, layer=LayerRange("checkout", 0, 5000))
SLOTS = Experiment("ramp", "s", VARIANTS, slots=(("a", 5000), ("b", 10000)))
CANARY = canary_experiment("r7", "salt", champion="m0", candidate="m1", weight=0.2)
HELD_OUT = Holdout(0.3, "salt")
UNITS = [f"user-{number}" for number in range(60)]


@pytest.mark.parametrize(
    ("experiment", "places"),
    [
        (None, {"champion", "holdout"}),
        (LAYERED, {"split", "outside", "holdout"}),
        (SLOTS, {"split", "holdout"}),
        (CANARY, {"reserved", "treatment", "rest", "holdout"}),
    ],
    ids=["nothing", "layer", "slots", "canary"],
)
def test_the_story_ends_as_the_assignment_does(experiment: Experiment | None, places: set[str]) -> None:
    route = Route("assistant", 1, "m0", experiment, holdout=HELD_OUT)
    told = {unit: explain(route, unit) for unit in UNITS}
    assert {found.place for found in told.values()} == places
    for unit, found in told.items():
        assert found.assignment == assign(route, unit)
        text = "; ".join(found.steps)
        assert (found.place == "holdout") == text.startswith("held out with 0.3 of all users")
        assert found.assignment.is_analysed == text.endswith("the user's outcome counts")


def test_slots_are_named() -> None:
    found = explain(Route("assistant", 1, "m0", LAYERED), "ada")
    assert found.layer == "checkout"
    assert found.steps[0].startswith(f"slot {found.layer_slot} of the layer checkout (tone has 0 to 4999), ")
    assert explain(Route("assistant", 1, "m0", SLOTS), "ada").steps[0].startswith("slot ")


def test_without_a_hold_out_none_is_told() -> None:
    assert explain(Route("assistant", 1, "m0"), "ada").steps == ("no experiment runs: everybody sees the champion",)
