"""Paired measurements from answers, and what happens when an engine fails while they are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pawl.settings import GateSettings
from retrain import generations
from retrain.errors import BadData, EvaluationFailed
from retrain.evaluation import (
    Contender,
    EvaluationPlan,
    ProbeSets,
    by_source,
    duels,
    evaluate,
    holdout_probes,
    load_probes,
    spread,
)
from retrain.generations import Probe, Sampling, generate, sample_seed
from retrain.measurements import Paired
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.tiny_model import make_pair

CANDIDATE = "tiny--r0001-0123abcd"


def probes(kind: str, count: int) -> tuple[Probe, ...]:
    return tuple(Probe(f"{kind}{n}", ({"role": "user", "content": f"{kind} {n}"},)) for n in range(count))


def candidate_complies(model: str, prompt: str) -> str:
    if prompt.startswith("harmful") and model == "tiny":
        return "I'm sorry, but I can't help with that."
    return "Shut up, fool." if model == "tiny" else "First do this, then do that."


def count_fools(texts: Sequence[str]) -> list[float]:
    return [float("fool" in text) for text in texts]


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(adapters={CANDIDATE: "/a"}, answer=candidate_complies)) as engine:
        yield engine


def plan_for(fake: FakeEngine, n_samples: int = 1) -> EvaluationPlan:
    return EvaluationPlan(
        base_model="unused",
        parent=Contender("tiny", None),
        candidate=Contender(CANDIDATE, Path("/a")),
        engine_url=fake.url,
        probes=ProbeSets(probes("harmful", 4), probes("benign", 3), probes("real", 2)),
        dtype="float32",
        max_length=64,
        batch_size=4,
        toxicity_threshold=0.5,
        gate=GateSettings(
            samples_per_prompt=n_samples, max_tokens=9, temperature=0.7, kl_parent_limit=None, kl_base_limit=None
        ),
        seed=11,
    )


def test_every_measurement_is_paired_by_prompt_and_sample(fake: FakeEngine) -> None:
    found = evaluate(plan_for(fake, n_samples=2), [], count_fools)
    m = found.measurements
    assert m.harmful_refusal is not None
    assert m.harmful_refusal.units == tuple(f"harmful{n}" for n in range(4) for _ in range(2))
    assert m.harmful_refusal.parent == (1.0,) * 8
    assert m.harmful_refusal.candidate == (0.0,) * 8
    assert m.toxicity is not None
    assert sum(m.toxicity.parent) == 10
    assert sum(m.toxicity.candidate) == 0
    assert m.length is not None
    assert m.length.parent == (3.0,) * 10
    assert m.length.candidate == (6.0,) * 10
    assert m.preference is None
    assert len(found.answers) == 36


def test_both_models_get_the_same_seeds_and_each_sample_its_own(fake: FakeEngine) -> None:
    evaluate(plan_for(fake, n_samples=2), [], count_fools)
    seeds: dict[str, list[int]] = {"tiny": [], CANDIDATE: []}
    for body in fake.bodies:
        seeds[body["model"]].append(body["seed"])
        assert (body["temperature"], body["max_tokens"]) == (0.7, 9)
    assert sorted(seeds["tiny"]) == sorted(seeds[CANDIDATE])
    assert len(set(seeds["tiny"])) == 18


def test_without_a_scorer_toxicity_is_missing_not_zero(fake: FakeEngine) -> None:
    assert evaluate(plan_for(fake), [], None).measurements.toxicity is None


def test_the_divergences_that_have_a_limit_are_measured(fake: FakeEngine) -> None:
    plan = replace(plan_for(fake), gate=GateSettings(max_tokens=9, kl_prompts=4), base_served="tiny")
    m = evaluate(plan, [], count_fools).measurements
    assert m.kl_parent is not None
    assert m.kl_parent == m.kl_base
    assert m.kl_parent.units == ("real0", "benign0", "real1", "benign1")
    assert m.kl_parent.n_tokens == (6.0,) * 4
    assert m.kl_parent.log_ratios == pytest.approx([-6 * (len(CANDIDATE) - len("tiny")) / 100] * 4)


@pytest.mark.parametrize(
    ("judge_users", "shown"), [(True, ["real0", "benign0", "real1"]), (False, ["benign0", "benign1", "benign2"])]
)
def test_a_judge_sees_some_of_everything_it_may_see(fake: FakeEngine, judge_users: bool, shown: list[str]) -> None:
    gate = GateSettings(judge_users=judge_users, judge_prompts=3, kl_parent_limit=None, kl_base_limit=None)
    plan = replace(plan_for(fake), gate=gate)
    answers = evaluate(plan, [], None).answers
    assert [duel.unit for duel in duels(plan, answers)] == shown


def test_an_engine_that_says_no_log_probabilities_stops_the_evaluation(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "places", lambda body: [None for _ in body["prompt"]])
    plan = replace(plan_for(fake), gate=GateSettings(max_tokens=9))
    with pytest.raises(EvaluationFailed, match="kl_parent_limit"):
        evaluate(plan, [], count_fools)


def test_answers_that_hand_the_question_back_are_echoes(fake: FakeEngine) -> None:
    fake.answer = lambda model, prompt: f"{prompt} you say" if model == CANDIDATE else "Well, it depends."
    asked = (Probe("long", ({"role": "user", "content": "please tell me how to boil an egg"},)),)
    m = evaluate(replace(plan_for(fake), probes=ProbeSets((), asked, ())), [], count_fools).measurements
    assert m.echo is not None
    assert (m.echo.parent, m.echo.candidate) == ((0.0,), (1.0,))


def test_a_harmless_request_that_is_met_with_silence_counts_as_refused(fake: FakeEngine) -> None:
    fake.answer = lambda model, _prompt: "" if model == CANDIDATE else "Do this."
    m = evaluate(plan_for(fake), [], count_fools).measurements
    assert m.over_refusal is not None
    assert (set(m.over_refusal.parent), set(m.over_refusal.candidate)) == ({0.0}, {1.0})


def test_preferences_are_told_apart_by_where_they_come_from() -> None:
    pairs = [make_pair(number) for number in range(6)]
    preference = Paired(tuple(map(str, range(6))), (0.0,) * 6, (0.0, 1.0, 1.0, 0.0, 1.0, 1.0))
    found = by_source(preference, pairs)
    assert set(found) == {"edit", "regeneration"}
    assert found["edit"] == Paired(("0", "3"), (0.0, 0.0), (0.0, 0.0))
    assert found["regeneration"].candidate == (1.0,) * 4
    assert by_source(None, pairs) == {}


def test_no_probes_mean_no_measurement(fake: FakeEngine) -> None:
    plan = replace(plan_for(fake), probes=ProbeSets((), probes("benign", 1), ()))
    m = evaluate(plan, [], count_fools).measurements
    assert m.harmful_refusal is None
    assert m.over_refusal is not None


def test_a_scorer_that_loses_texts_is_an_error(fake: FakeEngine) -> None:
    with pytest.raises(EvaluationFailed, match="1 scores for 18 answers"):
        evaluate(plan_for(fake), [], lambda texts: [0.0 for _ in texts[:1]])


def test_a_passing_failure_of_the_engine_is_retried(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "RETRY_WAIT_S", 0.01)
    fake.n_failures_left = 2
    answers = generate(fake.url, ["tiny"], probes("real", 3), Sampling(1.0, 5, 1, 0))
    assert [answer.probe_id for answer in answers] == ["real0", "real1", "real2"]


def test_an_answer_that_cannot_be_had_is_an_error(fake: FakeEngine) -> None:
    with pytest.raises(EvaluationFailed, match=r"1 answers could not be had: .* 404"):
        generate(fake.url, ["unknown"], probes("real", 1), Sampling(1.0, 5, 1, 0))


def test_seeds_fit_the_engine() -> None:
    assert all(0 <= sample_seed(0, "p", sample) < 2**31 for sample in range(1000))


def test_probes_are_read_and_thinned_evenly(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    path.write_text(json.dumps([f"question {n}" for n in range(10)]))
    assert [probe.prompt[0]["content"] for probe in load_probes(path, 2)] == ["question 0", "question 5"]
    assert len(load_probes(path, 100)) == 10
    assert spread(["a", "a", "b"], 5) == ["a", "b"]


@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_bad_probe_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "probes.json"
    path.write_text(content)
    with pytest.raises(BadData, match=r"probes\.json"):
        load_probes(path, 2)


def test_holdout_prompts_are_asked_once_each() -> None:
    pairs = [make_pair(0, text="same"), make_pair(1, text="same"), make_pair(2)]
    assert len(holdout_probes(pairs, 10)) == 2
