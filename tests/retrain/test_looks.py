"""Asking again where a check cannot tell: what is asked, what is decided when, and that the error rate is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gate_power import Simulated, broken, disagreement, simulate, worst
from pawl.settings import GateSettings
from retrain import evaluation
from retrain.evaluation import EvaluationPlan, ProbeSets, asked_by, evaluate
from retrain.examination import chances_of
from retrain.gate import Verdict, cannot_tell_yet, judge
from retrain.looks import Look, answers_at, chance_to_pass, looks_of, plan_looks
from retrain.measurements import Measurements, Paired, from_json, to_json
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.test_evaluation import CANDIDATE, count_fools, plan_for, probes
from tests.retrain.test_gate import GOOD, SETTINGS, check_named, rates


def answered(n_prompts: int, *answers: tuple[int, int]) -> Paired:
    """For each answer to each prompt, how many prompts the parent and the candidate give a one to."""
    units = tuple(str(prompt) for prompt in range(n_prompts) for _ in answers)
    sides = [[float(prompt < pair[side]) for prompt in range(n_prompts) for pair in answers] for side in (0, 1)]
    return Paired(units, tuple(sides[0]), tuple(sides[1]))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 0.4))
def test_the_looks_end_at_the_bound_and_their_levels_add_up(first: int, most: int, alpha: float) -> None:
    planned = plan_looks(first, most)
    looks = looks_of(planned, alpha)
    assert planned[0] == first
    assert planned[-1] == max(first, most)
    assert all(before < after <= 2 * before for before, after in pairwise(planned))
    assert sum(look.alpha for look in looks) == pytest.approx(alpha)
    assert all(look.alpha > 0 for look in looks)


def test_a_look_sees_the_first_answers_to_each_prompt() -> None:
    paired = Paired(("a", "a", "b", "b", "b"), (1.0, 0.0, 1.0, 0.0, 0.0), (0.0,) * 5)
    assert answers_at(paired, 1) == Paired(("a", "b"), (1.0, 1.0), (0.0, 0.0))
    assert answers_at(paired, 2) == Paired(("a", "a", "b", "b"), (1.0, 0.0, 1.0, 0.0), (0.0,) * 4)
    assert answers_at(paired, 3) is None
    assert answers_at(Paired((), (), ()), 1) is None


def over_refusal(paired: Paired, *looks: int) -> tuple[Verdict, int | None]:
    check = check_named(judge(replace(GOOD, over_refusal=paired, looks=looks), SETTINGS), "over_refusal")
    return check.verdict, check.n_answers


def test_the_first_look_that_decides_stands_unless_a_later_one_fails() -> None:
    n, same, worse = 500, (10, 10), (10, 60)
    assert over_refusal(answered(n, same), 1, 2) == (Verdict.PASS, 1)
    assert over_refusal(answered(n, same, (10, 18)), 1, 2) == (Verdict.PASS, 1)
    assert over_refusal(answered(n, same, worse), 1, 2) == (Verdict.FAIL, 2)
    assert over_refusal(answered(n, worse, same), 1, 2) == (Verdict.FAIL, 1)
    assert over_refusal(answered(n, (10, 17), (17, 10)), 1, 2) == (Verdict.PASS, 2)


def test_a_look_is_stricter_than_the_only_one_would_be() -> None:
    """Asked once and for all this would pass; where it may be asked again that would let too much through."""
    narrow = answered(170, (10, 10))
    assert over_refusal(narrow) == (Verdict.PASS, None)
    assert over_refusal(narrow, 1) == (Verdict.PASS, 1)
    assert over_refusal(narrow, 1, 2, 4, 8) == (Verdict.CANNOT_TELL, 1)


def test_fewer_answers_than_planned_are_judged_at_the_first_level() -> None:
    assert over_refusal(answered(130, (10, 10)), 2, 4, 8) == (Verdict.CANNOT_TELL, None)


def test_what_cannot_tell_says_what_would_have_passed() -> None:
    check = check_named(judge(replace(GOOD, over_refusal=rates(100, 5, 5)), SETTINGS), "over_refusal")
    assert check.verdict == Verdict.CANNOT_TELL
    assert check.power == pytest.approx(0.412, abs=0.001)
    assert check.reason.endswith("an equal of the parent would have passed with 41 %")


def test_only_what_more_answers_can_decide_is_asked_again() -> None:
    few = rates(100, 5, 5)
    undecided = replace(GOOD, over_refusal=few, looks=(1, 2))
    assert cannot_tell_yet(judge(undecided, SETTINGS)) == {"over_refusal"}
    assert not cannot_tell_yet(judge(GOOD, SETTINGS))
    assert not cannot_tell_yet(judge(replace(undecided, toxicity=None), SETTINGS))
    assert not cannot_tell_yet(judge(replace(undecided, preference=rates(10, 5, 5)), SETTINGS))


def test_each_check_asks_its_own_prompts() -> None:
    sets = ProbeSets(probes("harmful", 2), probes("benign", 2), probes("real", 1))
    asked = {
        name: [probe.id for probe in asked_by(sets, [name])] for name in ("harmful_refusal", "over_refusal", "echo")
    }
    assert asked["harmful_refusal"] == ["harmful0", "harmful1"]
    assert asked["over_refusal"] == ["benign0", "benign1"]
    assert asked["echo"] == ["benign0", "benign1", "real0"]
    assert asked_by(sets, ["toxicity", "echo"]) == sets.all
    assert asked_by(sets, []) == ()


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(adapters={CANDIDATE: "/a"}, answer=lambda _model, _prompt: "Do this.")) as engine:
        yield engine


def plan_of_looks(fake: FakeEngine, margin: float) -> EvaluationPlan:
    gate = GateSettings(
        samples_per_prompt=1, max_samples_per_prompt=4, max_tokens=9, kl_parent_limit=None, kl_base_limit=None,
        harmful_refusal_margin=margin, over_refusal_margin=0.9, toxicity_margin=0.9, stop_margin=0.9, echo_margin=0.9,
    )  # fmt: skip
    sets = ProbeSets(probes("harmful", 20), probes("benign", 20), ())
    return replace(plan_for(fake), gate=gate, probes=sets)


@pytest.mark.parametrize(("margin", "n_each"), [(0.9, 1), (0.01, 4)])
def test_prompts_are_asked_again_until_the_checks_can_tell(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, margin: float, n_each: int
) -> None:
    """Twenty harmful prompts pass a wide margin at once, and a narrow one never."""
    monkeypatch.setattr(evaluation, "measure_preference", lambda *_: GOOD.preference)
    found = evaluate(plan_of_looks(fake, margin), [], count_fools)
    m = found.measurements
    assert m.looks == (1, 2, 4)
    assert m.harmful_refusal is not None
    assert m.over_refusal is not None
    assert len(m.harmful_refusal.units) == 20 * n_each
    assert len(m.over_refusal.units) == 20
    assert len(found.answers) == len(fake.bodies) == 2 * (20 + 20 * n_each)
    seeds = [body["seed"] for body in fake.bodies if body["model"] == CANDIDATE]
    assert len(set(seeds)) == len(seeds)


def test_looks_are_kept_with_the_measurements() -> None:
    measured = replace(GOOD, looks=(2, 4))
    assert from_json(to_json(measured)) == measured
    old = Measurements("p", "c", preference=rates(4, 2, 2))
    assert from_json(to_json(old)).looks == ()


def test_asking_again_keeps_the_error_rate_and_passes_more_of_the_good() -> None:
    """The short form of `python -m bench.gate_power`."""
    margin, n = 0.2, 120
    lost = simulate(40, margin, (1, 2, 4), margin, n)
    assert broken(lost, margin, 0.05) is None
    assert lost.n_passed <= 12
    once, again = (simulate(40, 0.0, looks, margin, n) for looks in ((1,), (1, 2, 4)))
    assert again.n_passed > once.n_passed
    assert again.n_answers < 4
    assert broken(Simulated(40, margin, (1,), 100, 20, 0, 1.0, 0.05), margin, 0.05) is not None


def test_what_the_bounds_are_worst_for_is_counted_out() -> None:
    assert worst(100, (1,), 0.02) == 0, "with so few prompts nothing passes"
    assert worst(265, (2, 4, 8, 16), 0.02) < worst(265, (1,), 0.02)
    assert worst(105, (1,), 0.05) == pytest.approx(0.099, abs=0.0005), "docs/gate.md says so"


def test_the_chance_to_pass_is_foretold() -> None:
    told = [chance_to_pass(n, Look(2, 0.05), 0.05, disagreement=disagreement()) for n in (50, 100, 200, 400)]
    assert told == sorted(told)
    assert chance_to_pass(1000, Look(1, 0.05), 0.05, disagreement=0.1, change=-0.05) == pytest.approx(0.05, abs=0.01)
    sets = ProbeSets(probes("harmful", 30), probes("benign", 300), ())
    chances = chances_of(sets, GateSettings())
    assert chances["harmful_refusal"] < 0.1 < 0.9 < chances["over_refusal"]
    assert chances_of(ProbeSets((), (), ()), GateSettings())["echo"] == 0.0
