import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.assignment import assign, assign_variant, treatment_probability
from ab_testing.errors import InvalidExperiment, InvalidUnit
from ab_testing.experiment import Experiment, Route, Variant, canary_experiment

WEIGHTS = {"control": 0.5, "treatment": 0.3, "other": 0.2}
UNITS = [f"user-{number}" for number in range(20_000)]
STEPS = (0.01, 0.1, 0.5)

names = st.text(max_size=12)
weights = st.dictionaries(names, st.floats(1e-6, 1e6), min_size=1, max_size=6)


def canary(weight: float, salt: str = "salt") -> Route:
    return Route("assistant", 1, "m0", canary_experiment("r7", salt, champion="m0", candidate="m1", weight=weight))


@pytest.mark.parametrize(
    ("unit", "variant"),
    [
        ("ada", "other"),
        ("grace", "other"),
        ("user-1", "control"),
        ("user-2", "control"),
        ("user-3", "other"),
        ("Zoë", "control"),
        ("\ud800", "treatment"),
    ],
)
def test_assignments_never_change_from_release_to_release(unit: str, variant: str) -> None:
    assert assign_variant("salt", unit, WEIGHTS) == variant


@pytest.mark.parametrize(
    ("unit", "places"),
    [
        ("ada", [("control", False), ("control", False), ("treatment", True)]),
        ("user-2", [("control", True), ("control", True), ("control", True)]),
        ("user-7", [("control", False), ("treatment", True), ("treatment", True)]),
        ("user-152", [("treatment", True), ("treatment", True), ("treatment", True)]),
    ],
)
def test_canary_assignments_never_change_from_release_to_release(unit: str, places: list[tuple[str, bool]]) -> None:
    seen = [assign(canary(weight), unit) for weight in STEPS]
    assert [(assignment.variant, assignment.is_analysed) for assignment in seen] == places


@given(weights, names, names, st.data(), st.floats(1, 100))
def test_raising_a_weight_only_moves_units_into_that_variant(
    weights: dict[str, float], salt: str, unit: str, data: st.DataObject, factor: float
) -> None:
    raised = data.draw(st.sampled_from(sorted(weights)))
    before = assign_variant(salt, unit, weights)
    assert assign_variant(salt, unit, weights | {raised: weights[raised] * factor}) in {before, raised}


@given(weights, names, names)
def test_only_proportions_matter_and_the_order_does_not(weights: dict[str, float], salt: str, unit: str) -> None:
    reversed_weights = dict(reversed(weights.items()))
    assert assign_variant(salt, unit, reversed_weights) == assign_variant(salt, unit, weights)
    doubled = {name: weight * 2.0 for name, weight in weights.items()}
    assert assign_variant(salt, unit, doubled) == assign_variant(salt, unit, weights)


@given(weights, names, names)
def test_a_variant_without_weight_gets_nobody(weights: dict[str, float], salt: str, unit: str) -> None:
    without = weights | {"nobody": 0.0}
    assert assign_variant(salt, unit, without) != "nobody"


def test_no_positive_weight_is_an_error() -> None:
    with pytest.raises(InvalidExperiment):
        assign_variant("salt", "ada", {"control": 0.0})


def test_shares_follow_the_weights() -> None:
    counts = Counter(assign_variant("shares", unit, WEIGHTS) for unit in UNITS)
    expected = [share * len(UNITS) for share in WEIGHTS.values()]
    assert stats.chisquare([counts[name] for name in WEIGHTS], expected).pvalue > 0.001


def test_two_salts_split_units_independently() -> None:
    table = Counter((assign_variant("one", u, WEIGHTS), assign_variant("two", u, WEIGHTS)) for u in UNITS)
    rows = [[table[first, second] for second in WEIGHTS] for first in WEIGHTS]
    assert stats.chi2_contingency(rows).pvalue > 0.001


@pytest.mark.parametrize("weight", STEPS)
def test_canary_zones_have_their_shares(weight: float) -> None:
    seen = Counter((a.variant, a.is_analysed) for a in (assign(canary(weight, "zones"), unit) for unit in UNITS))
    shares = {("control", True): 0.5, ("treatment", True): weight, ("control", False): 0.5 - weight}
    positive = {place: share for place, share in shares.items() if share > 0}
    assert set(seen) == set(positive)
    expected = [share * len(UNITS) for share in positive.values()]
    assert stats.chisquare([seen[place] for place in positive], expected).pvalue > 0.001


@given(st.text(min_size=1), st.text(min_size=1), st.lists(st.floats(0.001, 0.5), min_size=2, max_size=5))
def test_a_growing_canary_never_moves_an_analysed_unit(salt: str, unit: str, steps: list[float]) -> None:
    seen = [assign(canary(weight, salt), unit) for weight in sorted(steps)]
    for before, after in pairwise(seen):
        if before.is_analysed:
            assert (after.variant, after.is_analysed) == (before.variant, True)


def test_canary_probabilities_are_those_among_analysed_units() -> None:
    places = {a.variant: a for a in (assign(canary(0.1), unit) for unit in UNITS[:200]) if a.is_analysed}
    assert places["treatment"].probability == pytest.approx(0.1 / 0.6)
    assert places["control"].probability == pytest.approx(0.5 / 0.6)
    assert treatment_probability(0.1) == pytest.approx(0.1 / 0.6)


def test_a_fixed_split_analyses_everybody() -> None:
    split = Experiment("tone", "salt", (Variant("a", "m0", 3), Variant("b", "m1", 1)), phase=2)
    seen = {a.variant: a for a in (assign(Route("assistant", 1, "m0", split), unit) for unit in UNITS[:100])}
    assert {name: (a.model, a.probability, a.is_analysed, a.phase) for name, a in seen.items()} == {
        "a": ("m0", 0.75, True, 2),
        "b": ("m1", 0.25, True, 2),
    }


def test_nobody_is_served_but_not_analysed() -> None:
    named = assign(canary(0.5), "ada")
    assert named.is_analysed
    assert assign(canary(0.5), None, random_unit="ada") == named._replace(is_analysed=False)
    with pytest.raises(InvalidUnit):
        assign(canary(0.5), None)


def test_without_an_experiment_everyone_gets_the_champion() -> None:
    assignment = assign(Route("assistant", 1, "m0"), None)
    assert (assignment.experiment, assignment.model, assignment.is_analysed) == (None, "m0", False)


def test_every_process_gives_the_same_answer() -> None:
    code = (
        "from ab_testing.assignment import assign_variant\n"
        "weights = {'control': 0.5, 'treatment': 0.3, 'other': 0.2}\n"
        "print([assign_variant('salt', f'user-{n}', weights) for n in range(200)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert outputs == {f"{[assign_variant('salt', unit, WEIGHTS) for unit in UNITS[:200]]}\n"}
