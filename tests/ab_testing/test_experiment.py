import json

import pytest

from ab_testing.errors import ABTestingError, InvalidExperiment
from ab_testing.experiment import Experiment, Route, Variant, canary_experiment

CANARY = canary_experiment("r7", "salt-7", champion="m0", candidate="m1", weight=0.1, phase=1)
SPLIT = Experiment("tone", "s", (Variant("a", "m0", 3), Variant("b", "m1", 0), Variant("c", "m2", 1)))


@pytest.mark.parametrize("experiment", [None, CANARY, SPLIT])
def test_a_route_survives_json(experiment: Experiment | None) -> None:
    route = Route("assistant", 3, "m0", experiment)
    assert Route.from_json(json.loads(json.dumps(route.to_json()))) == route


def test_a_canary_keeps_half_of_the_traffic_in_reserve() -> None:
    assert CANARY.is_canary
    assert CANARY.reserved_control == 0.5
    assert CANARY.variant("control").model == "m0"
    assert CANARY.variant("treatment") == Variant("treatment", "m1", 0.1)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_of_at_least_zero(weight: float) -> None:
    with pytest.raises(InvalidExperiment, match="weight"):
        Variant("control", "m0", weight)


@pytest.mark.parametrize(
    ("variants", "reserved", "message"),
    [
        ((), 0.0, "no variant"),
        ((Variant("a", "m", 0),), 0.0, "no variant"),
        ((Variant("a", "m", 1), Variant("a", "n", 1)), 0.0, "named twice"),
        ((Variant("a", "m", 1), Variant("b", "n", 1)), 0.5, "control and treatment"),
        ((Variant("control", "m", 0.4), Variant("treatment", "n", 0.6)), 0.5, "at most"),
        ((Variant("control", "m", 0.9), Variant("treatment", "n", 0.1)), 0.3, "reserved_control"),
    ],
)
def test_what_cannot_be_served_is_refused(variants: tuple[Variant, ...], reserved: float, message: str) -> None:
    with pytest.raises(InvalidExperiment, match=message):
        Experiment("k", "s", variants, reserved)


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(InvalidExperiment, match="no variant 'z'"):
        SPLIT.variant("z")


def test_all_errors_are_value_errors() -> None:
    assert issubclass(ABTestingError, ValueError)
