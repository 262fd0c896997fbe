import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ab_testing.assignment import (
    Assignment,
    assign,
    assign_variant,
    force,
    is_held_out,
    layer_slot,
    slot_of,
    split_variant,
    treatment_probability,
)
from ab_testing.errors import InvalidExperiment, InvalidUnit
from ab_testing.experiment import Experiment, Holdout, LayerRange, Route, Variant, canary_experiment, reweighed
from ab_testing.slot_table import new_table

SPLIT = (Variant("a", "m0", 1), Variant("b", "m1", 1))
HELD_OUT = Holdout(0.1, "salt")
WEIGHTS = {"control": 0.5, "treatment": 0.3, "other": 0.2}
UNITS = [f"user-{number}" for number in range(20_000)]
THREE = Experiment("three", "three", tuple(Variant(name, name, weight) for name, weight in WEIGHTS.items()))
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


@pytest.mark.parametrize(
    ("unit", "in_layer", "slot", "is_out"),
    [
        ("ada", 2322, 7399, False),
        ("grace", 5965, 9145, False),
        ("user-1", 8791, 5815, True),
        ("user-2", 4540, 4521, False),
        ("Zoë", 5280, 595, True),
        ("\ud800", 3879, 7190, True),
    ],
)
def test_slots_and_hold_outs_never_change_from_release_to_release(
    unit: str, in_layer: int, slot: int, is_out: bool
) -> None:
    seen = (layer_slot("checkout", unit), slot_of("salt", unit), is_held_out(HELD_OUT, unit))
    assert seen == (in_layer, slot, is_out)


def layered(key: str, start: int, end: int, layer: str = "checkout") -> Experiment:
    return Experiment(key, f"{key}-salt", SPLIT, layer=LayerRange(layer, start, end))


def test_experiments_of_one_layer_never_share_a_unit() -> None:
    here = Route("assistant", 1, "m0", layered("one", 0, 3000), (layered("two", 3000, 4000),))
    there = Route("helper", 1, "m0", layered("three", 4000, 10000))
    seen = Counter((assign(here, unit).experiment, assign(there, unit).experiment) for unit in UNITS[:8000])
    shares = {("one", None): 0.3, ("two", None): 0.1, (None, "three"): 0.6}
    assert set(seen) == set(shares)
    expected = [share * 8000 for share in shares.values()]
    assert stats.chisquare([seen[pair] for pair in shares], expected).pvalue > 0.001


def test_those_outside_see_the_champion_and_are_not_analysed() -> None:
    route = Route("assistant", 1, "m0", layered("one", 0, 3000))
    outside = [a for a in (assign(route, unit) for unit in UNITS[:200]) if a.experiment is None]
    assert outside
    assert set(outside) == {Assignment(None, "control", "m0", 1.0, False, 0)}


def test_layers_are_independent_of_each_other_and_of_the_variants() -> None:
    one = Route("assistant", 1, "m0", layered("one", 0, 5000))
    two = Route("helper", 1, "m0", layered("two", 0, 5000, "search"))
    seen = [(assign(one, unit), assign(two, unit)) for unit in UNITS]
    layers = Counter((a.experiment or "", b.experiment or "") for a, b in seen)
    variants = Counter((a.variant, b.variant) for a, b in seen if a.experiment and b.experiment)
    for counts, names in ((layers, (("one", ""), ("two", ""))), (variants, (("a", "b"), ("a", "b")))):
        rows = [[counts[first, second] for second in names[1]] for first in names[0]]
        assert stats.chi2_contingency(rows).pvalue > 0.001


def test_whoever_is_held_out_sees_the_champion_whatever_runs() -> None:
    out = [unit for unit in UNITS if is_held_out(HELD_OUT, unit)]
    assert stats.binomtest(len(out), len(UNITS), HELD_OUT.share).pvalue > 0.001
    for route in (Route("assistant", 1, "m0"), canary(0.5), Route("assistant", 1, "m0", layered("one", 0, 9000))):
        held = replace(route, holdout=HELD_OUT)
        assert {assign(held, unit) for unit in out} == {Assignment("holdout", "holdout", "m0", 0.1, False, 0)}
        assert all(assign(held, unit) == assign(route, unit) for unit in UNITS[:300] if unit not in out)


def test_a_hold_out_only_grows_and_is_drawn_on_its_own() -> None:
    grown = replace(HELD_OUT, share=0.2)
    assert all(is_held_out(grown, unit) for unit in UNITS if is_held_out(HELD_OUT, unit))
    table = Counter((is_held_out(HELD_OUT, unit), assign(canary(0.5), unit).variant) for unit in UNITS)
    rows = [[table[is_out, variant] for variant in ("control", "treatment")] for is_out in (True, False)]
    assert stats.chi2_contingency(rows).pvalue > 0.001


def test_nobody_is_held_out() -> None:
    """A hold-out is of users: whoever has no name is drawn anew each time and belongs to no group."""
    held = replace(canary(0.5), holdout=Holdout(0.999, "salt"))
    assert assign(held, None, random_unit="ada").experiment == "r7"


def test_a_forced_variant_is_served_and_never_analysed() -> None:
    assert force(canary(0.1), "treatment") == Assignment("r7", "treatment", "m1", 1.0, False, 0)
    several = Route("assistant", 1, "m0", layered("one", 0, 3000), (layered("two", 3000, 4000),))
    named = [force(several, name) for name in ("b", "one/b", "two/b")]
    assert [found and found.experiment for found in named] == ["one", "one", "two"]
    slashed = Route("assistant", 1, "m0", Experiment("tone/2", "salt", (Variant("a/b", "m1", 1),)))
    assert force(slashed, "tone/2/a/b") == force(slashed, "a/b") is not None
    assert force(several, "c") is force(several, "three/b") is force(Route("assistant", 1, "m0"), "control") is None


def test_a_split_with_slots_follows_its_table() -> None:
    table = (("a", 2500), ("b", 10000))
    route = Route("assistant", 1, "m0", Experiment("ramp", "salt", SPLIT, slots=table))
    for unit in UNITS[:500]:
        assert assign(route, unit).variant == ("a" if slot_of("salt", unit) < 2500 else "b")


def test_the_probability_of_a_split_with_slots_is_what_its_table_gives() -> None:
    """Not the weight's: 0.00014 is one slot and not 1.4, which many users would show as a mismatch."""
    variants = (Variant("a", "m0", 0.99986), Variant("b", "m1", 0.00014))
    split = Experiment("ramp", "salt", variants, slots=new_table({each.name: each.weight for each in variants}))
    likely = {found.variant: found.probability for found in (assign(Route("x", 1, "m0", split), u) for u in UNITS)}
    assert likely == {"a": 0.9999, "b": 0.0001}


def test_a_ramp_from_one_donor_moves_only_its_users_to_the_receiver() -> None:
    variants = (Variant("a", "m0", 50), Variant("b", "m1", 50), Variant("c", "m2", 0))
    before = Experiment("ramp", "salt", variants, slots=new_table({"a": 50, "b": 50, "c": 0}))
    after = reweighed(before, {"a": 40, "c": 10})
    moves = Counter((split_variant(before, unit).name, split_variant(after, unit).name) for unit in UNITS)
    assert set(moves) == {("a", "a"), ("b", "b"), ("a", "c")}
    assert stats.binomtest(moves["a", "c"], len(UNITS), 0.1).pvalue > 0.001


def test_shares_of_100_000_units_are_within_three_standard_deviations() -> None:
    """`python -m bench.assignment` looks at a million."""
    n = 100_000
    counts = Counter(split_variant(THREE, f"u{number}").name for number in range(n))
    for name, share in WEIGHTS.items():
        assert abs(counts[name] - n * share) < 3 * sqrt(n * share * (1 - share))


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


def plain_draw(salt: str, name: str, unit: str) -> int:
    """53 bits, as the first release drew them: everything below says again, step by step, what `assign` prepares."""
    key = hashlib.blake2b(f"{len(salt)}:{salt}/{name}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
    digest = hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") >> 11


def plain_race(salt: str, weights: Mapping[str, float], unit: str) -> str:
    drawn = {name: (plain_draw(salt, name, unit) + 1) / 2**53 for name, weight in weights.items() if weight > 0}
    return min(drawn, key=lambda name: (-log(drawn[name]) / weights[name], name))


def plain_variant(experiment: Experiment, unit: str) -> tuple[str, bool]:
    """The variant, and whether the unit is analysed."""
    salt, weights = experiment.salt, {each.name: each.weight for each in experiment.variants}
    if experiment.slots is not None:
        slot = plain_draw(salt, "slot", unit) * 10_000 >> 53
        return next(name for name, end in experiment.slots if slot < end), True
    if not experiment.is_canary:
        return plain_race(salt, weights, unit), True
    if plain_draw(salt + "/zone", "reserved", unit) >= plain_draw(salt + "/zone", "ramp", unit):
        return "control", True
    share = weights["treatment"] / 0.5
    place = plain_race(salt + "/ramp", {"treatment": share, "rest": 1 - share}, unit)
    return ("treatment", True) if place == "treatment" else ("control", False)


def plain_assignment(route: Route, unit: str) -> tuple[str | None, str, bool]:
    """Experiment, variant, and whether the unit is analysed."""
    held = route.holdout
    if held is not None and plain_draw(f"holdout/{held.salt}", "holdout", unit) < held.share * 2**53:
        return "holdout", "holdout", False
    for experiment in route.experiments:
        layer = experiment.layer
        if layer is None or layer.start <= plain_draw(f"layer/{layer.name}", "slot", unit) * 10_000 >> 53 < layer.end:
            return experiment.key, *plain_variant(experiment, unit)
    return None, "control", False


@st.composite
def splits(draw: st.DrawFn, key: str = "one", layer: LayerRange | None = None) -> Experiment:
    given = draw(weights.map(lambda found: {name or "unnamed": weight for name, weight in found.items()}))
    variants = tuple(Variant(name, f"m-{name}", weight) for name, weight in given.items())
    slots = new_table(given) if draw(st.booleans()) else None
    return Experiment(key, draw(st.text(min_size=1)), variants, layer=layer, slots=slots)


@st.composite
def layers(draw: st.DrawFn) -> Route:
    """Two ranges of one layer, which may touch each other and its ends, on one alias in any order."""
    cuts = draw(st.lists(st.integers(0, 10_000), min_size=4, max_size=4).map(sorted))
    ranges = [
        LayerRange("checkout", start, end) for start, end in ((cuts[0], cuts[1]), (cuts[2], cuts[3])) if start < end
    ]
    found = draw(st.permutations([draw(splits(key=str(place), layer=each)) for place, each in enumerate(ranges)]))
    return Route("assistant", 1, "m0", found[0], tuple(found[1:])) if found else Route("assistant", 1, "m0")


canaries = st.builds(canary, st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.5]), st.text(min_size=1))
routes = st.one_of(canaries, splits().map(lambda split: Route("assistant", 1, "m0", split)), layers())
holdouts = st.none() | st.builds(Holdout, st.floats(1e-9, 1 - 2**-53), st.text(min_size=1))


@given(routes, holdouts, st.lists(st.text(min_size=1), min_size=1, max_size=30))
def test_what_is_prepared_changes_no_answer(route: Route, holdout: Holdout | None, units: list[str]) -> None:
    route = replace(route, holdout=holdout)
    found = [assign(route, unit) for unit in units]
    assert [(each.experiment, each.variant, each.is_analysed) for each in found] == [
        plain_assignment(route, unit) for unit in units
    ]
