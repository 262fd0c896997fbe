"""Tasks with known answers, and echoes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl.settings import GateSettings
from practice.corpus import Habit, answer, task_of
from retrain.capability import is_solved, load_tasks
from retrain.echo import echoed_share
from retrain.errors import BadData
from retrain.evaluation import Contender, EvaluationPlan, ProbeSets, measure_capability
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.practice_tasks import capability_lines, write_capability_set


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"id": "sum", "prompt": "2 + 2?", "answer": "4"},
        {"id": "year", "prompt": [{"role": "user", "content": "When?"}], "pattern": r"\b1969\b"},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_answers_are_exact_and_patterns_are_found(tasks: Path) -> None:
    exact, pattern = load_tasks(tasks)
    assert is_solved(exact, " 4\n")
    assert is_solved(exact, "<think>3? No.</think>4")
    assert not is_solved(exact, "It is 4.")
    assert is_solved(pattern, "In July 1969, I think.")
    assert not is_solved(pattern, "In 11969.")


@pytest.mark.parametrize(
    "row",
    ["", "{", "[]", "{}", '{"prompt": "x"}', '{"prompt": "x", "answer": "y", "pattern": "z"}',
     '{"prompt": "", "answer": "y"}', '{"prompt": "x", "pattern": "("}', '{"prompt": [1], "answer": "y"}'],
)  # fmt: skip
def test_other_lines_are_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(BadData, match=r"tasks\.jsonl"):
        load_tasks(path)


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(adapters={"tuned": "/a"})) as engine:
        yield engine


def test_both_models_are_set_the_tasks_without_chance(fake: FakeEngine, tasks: Path) -> None:
    fake.answer = lambda model, asked: "4" if asked == "2 + 2?" else "1969" if model == "tiny" else "never"
    plan = EvaluationPlan(
        base_model="unused",
        parent=Contender("tiny", None),
        candidate=Contender("tuned", Path("/a")),
        engine_url=fake.url,
        probes=ProbeSets((), (), ()),
        dtype="float32",
        max_length=64,
        batch_size=4,
        toxicity_threshold=0.5,
        gate=GateSettings(capability_set=tasks, samples_per_prompt=3),
        seed=11,
    )
    found = measure_capability(plan)
    assert found is not None
    assert (found.units, found.parent, found.candidate) == (("sum", "year"), (1.0, 1.0), (1.0, 0.0))
    assert {body["temperature"] for body in fake.bodies} == {0.0}
    assert measure_capability(replace(plan, gate=GateSettings())) is None


def test_the_practice_world_has_a_set_that_its_good_answers_solve(tmp_path: Path) -> None:
    rng = random.Random(1)
    found = load_tasks(write_capability_set(tmp_path / "set.jsonl"))
    assert len(found) == len(capability_lines()) > 100
    for one in found:
        task = task_of(str(one.probe.prompt[0]["content"]))
        assert task is not None
        assert is_solved(one, answer(Habit.HELPFUL, task, rng))
        assert not is_solved(one, answer(Habit.CURT, task, rng))


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), max_size=20)


@given(WORDS, WORDS)
def test_the_share_of_echoed_words_is_one(asked: list[str], said: list[str]) -> None:
    share = echoed_share(" ".join(asked), " ".join(said))
    assert 0 <= share <= 1
    if len(asked) >= 3:
        assert echoed_share(" ".join(asked), " ".join(asked).upper() + "!") == 1
    assert echoed_share("", " ".join(said)) == 0


def test_short_answers_and_single_words_in_common_are_no_echo() -> None:
    assert echoed_share("Shall I go or stay?", "Stay.") == 0
    assert echoed_share("How do I bake bread?", "To bake bread, mix flour and water.") == 0


def test_line_ends_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    """JSON allows some of them as they are."""
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "Say\u2028this\u0085.", "answer": "this"}\r\n\n')
    assert len(load_tasks(path)) == 1
