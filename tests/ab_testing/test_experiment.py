import json
from dataclasses import replace
from typing import Any

import pytest

from ab_testing.errors import ABTestingError, InvalidExperiment
from ab_testing.experiment import Experiment, Holdout, LayerRange, Route, Variant, canary_experiment, reweighed

CANARY = canary_experiment("r7", "salt-7", champion="m0", candidate="m1", weight=0.1, phase=1)
LAYERED = Experiment("warm", "w", (Variant("a", "m0", 1),), layer=LayerRange("checkout", 0, 3000))
SLOTS = Experiment("ramp", "r", (Variant("a", "m0", 1), Variant("b", "m1", 1)), slots=(("a", 5000), ("b", 10000)))
SPLIT = Experiment("tone", "s", (Variant("a", "m0", 3), Variant("b", "m1", 0), Variant("c", "m2", 1)))


@pytest.mark.parametrize("experiment", [None, CANARY, SPLIT, LAYERED, SLOTS])
def test_a_route_survives_json(experiment: Experiment | None) -> None:
    route = Route("assistant", 3, "m0", experiment)
    assert Route.from_json(json.loads(json.dumps(route.to_json()))) == route


def test_a_route_of_several_splits_and_a_hold_out_survives_json() -> None:
    other = replace(LAYERED, key="long", layer=LayerRange("checkout", 3000, 4000))
    route = Route("assistant", 3, "m0", LAYERED, (other,), Holdout(0.05, "salt"))
    assert Route.from_json(json.loads(json.dumps(route.to_json()))) == route


def test_a_route_from_before_there_were_layers_and_hold_outs_is_read() -> None:
    stored = (
        '{"alias": "assistant", "version": 3, "champion": "m0", "experiment": {"key": "tone", "salt": "s",'
        ' "variants": [{"name": "a", "model": "m0", "weight": 3}, {"name": "b", "model": "m1", "weight": 0},'
        ' {"name": "c", "model": "m2", "weight": 1}], "reserved_control": 0.0, "phase": 0}}'
    )
    assert Route.from_json(json.loads(stored)) == Route("assistant", 3, "m0", SPLIT)
    assert set(Route("assistant", 3, "m0", SPLIT).to_json()) == set(json.loads(stored))


@pytest.mark.parametrize(
    "other",
    [
        SPLIT,
        replace(LAYERED, key="long", layer=LayerRange("search", 3000, 4000)),
        replace(LAYERED, key="long", layer=LayerRange("checkout", 2999, 4000)),
        replace(LAYERED, layer=LayerRange("checkout", 3000, 4000)),
    ],
    ids=["no layer", "another layer", "the same users", "the same key"],
)
def test_splits_that_could_want_the_same_user_are_refused(other: Experiment) -> None:
    for pair in ((LAYERED, other), (other, LAYERED)):
        with pytest.raises(InvalidExperiment):
            Route("assistant", 3, "m0", pair[0], (pair[1],))


def test_other_weights_are_the_next_phase() -> None:
    moved = reweighed(SLOTS, {"a": 0.5})
    assert (moved.phase, moved.variant("a").weight, moved.variant("b").weight) == (1, 0.5, 1)
    assert moved.slots == (("a", 3333), ("b", 10000))
    with pytest.raises(InvalidExperiment, match="canary"):
        reweighed(CANARY, {"treatment": 0.3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "holdout"},
        {"slots": (("a", 5000), ("b", 9999))},
        {"slots": (("a", 5000), ("z", 10000))},
        {"slots": (("a", 5000), ("b", 5000), ("a", 10000))},
        {"variants": CANARY.variants, "reserved_control": 0.5, "slots": (("control", 10000),)},
    ],
)
def test_what_cannot_be_allocated_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidExperiment):
        replace(SLOTS, **wrong)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (-1, 5), (5, 10001), (7, 6)])
def test_a_part_of_a_layer_has_users(start: int, end: int) -> None:
    with pytest.raises(InvalidExperiment):
        LayerRange("checkout", start, end)


@pytest.mark.parametrize(("share", "salt"), [(0.0, "s"), (1.0, "s"), (float("nan"), "s"), (0.1, "")])
def test_a_hold_out_has_a_share_and_a_salt(share: float, salt: str) -> None:
    with pytest.raises(InvalidExperiment):
        Holdout(share, salt)


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
