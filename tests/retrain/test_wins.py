"""Who wins by a judge that reads or by a reward model, and the sets of questions that both answer for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from feedback.judged.constitution import load_constitution
from feedback.judged.judge import judge_of
from pawl.errors import PawlError
from pawl.settings import JudgeSettings
from retrain.answer_scores import Conversation
from retrain.errors import BadData, EvaluationFailed
from retrain.generations import Sampling
from retrain.judged_sets import Question, duels_of, load_questions
from retrain.measurements import Wins
from retrain.wins import Duel, LlmUmpire, hold, reward_umpire
from tests.retrain.fake_engine import FakeEngine, serving

CONSTITUTION = load_constitution(None)
SAMPLING = Sampling(1.0, 20, 1, 0)


def duel(unit: str, parent: str, candidate: str, longer: float = 0.0) -> Duel:
    return Duel(unit, ({"role": "user", "content": "How?"},), parent, candidate, longer)


def scores_of(first: int, second: int) -> str:
    return json.dumps({"scores": {one.id: {"first": first, "second": second} for one in CONSTITUTION.principles}})


def fair(_model: str, asked: str) -> str:
    """A judge that counts how often an answer says good."""
    first, second = (part.count("good") for part in re.split("second answer begins", asked)[:2])
    return scores_of(min(10, first), min(10, second))


def first_is_best(_model: str, _asked: str) -> str:
    return scores_of(9, 2)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serving(FakeEngine(base="judge", answer=fair)) as served:
        yield served


@pytest.fixture
def umpire(engine: FakeEngine) -> Iterator[LlmUmpire]:
    judge = judge_of(JudgeSettings(url=f"{engine.url}/v1", model="judge", attempts=1))
    yield LlmUmpire(judge, CONSTITUTION, "none", 2)
    judge.close()


DUELS = [duel("a", "bad", "good", 5.0), duel("b", "good", "bad"), duel("c", "good", "good", -3.0)]


def test_a_judge_decides_duels_in_both_orders(engine: FakeEngine, umpire: LlmUmpire) -> None:
    assert hold(DUELS, umpire) == Wins(("a", "b", "c"), (1.0, 0.0, 0.5), (5.0, 0.0, -3.0))
    assert len(engine.bodies) == 2 * len(DUELS)


def test_a_judge_that_goes_by_the_place_decides_nothing(engine: FakeEngine, umpire: LlmUmpire) -> None:
    engine.answer = first_is_best
    assert list(umpire(DUELS)) == [0.5, 0.5, 0.5]


def test_a_judge_that_cannot_be_read_is_an_error_not_a_draw(engine: FakeEngine, umpire: LlmUmpire) -> None:
    engine.answer = lambda _model, _asked: "I would rather not say."
    with pytest.raises(EvaluationFailed, match="3 of 3 replies"):
        umpire(DUELS)


def test_a_judge_that_is_away_is_an_error(umpire: LlmUmpire) -> None:
    umpire.judge.stop()
    with pytest.raises(PawlError, match="the judge at"):
        umpire(DUELS)


def test_a_reward_model_decides_by_its_score() -> None:
    seen: list[Conversation] = []

    def score(conversations: Sequence[Conversation]) -> list[float]:
        seen.extend(conversations)
        return [float("good" in conversation[-1]["content"]) for conversation in conversations]

    assert list(reward_umpire(score)(DUELS)) == [1.0, 0.0, 0.5]
    assert [message["role"] for message in seen[0]] == ["user", "assistant"]


def test_nothing_to_judge_is_no_measurement_and_lost_scores_an_error() -> None:
    assert hold([], lambda _duels: []) is None
    with pytest.raises(EvaluationFailed, match="0 scores for 3"):
        hold(DUELS, lambda _duels: [])


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_kinds_of_sets_are_read(tmp_path: Path) -> None:
    alpaca = write_lines(tmp_path / "a.jsonl", {"instruction": "Name a fruit.", "input": "", "output": "x"}, {
        "instruction": "Translate.", "input": "Hallo"
    })  # fmt: skip
    assert [one.turns for one in load_questions(alpaca)] == [("Name a fruit.",), ("Translate.\n\nHallo",)]
    mt_bench = write_lines(tmp_path / "m.jsonl", {"question_id": 81, "category": "writing", "turns": ["One.", "Two."]})
    assert load_questions(mt_bench) == (Question("81", ("One.", "Two.")),)


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"turns": []}', '{"turns": "no"}', '{"instruction": 3}'])
def test_other_files_are_named_with_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(BadData, match=r"set\.jsonl"):
        load_questions(path)


def test_each_model_hears_its_own_first_answer_before_the_second_question(engine: FakeEngine) -> None:
    engine.adapters["tuned"] = "/a"
    engine.answer = lambda model, asked: f"{model} on {asked}"
    asked = (Question("1", ("One?", "Two?")), Question("2", ("Three?",)))
    first, second = duels_of(engine.url, "judge", "tuned", asked, SAMPLING)
    assert first.candidate == "tuned on One?\n\n[user] Two?\n\n[assistant] tuned on Two?"
    assert first.parent.startswith("judge on One?")
    assert (second.parent, second.candidate) == ("judge on Three?", "tuned on Three?")
    later = [body["messages"] for body in engine.bodies if len(body["messages"]) == 3]
    assert {(str(m[1]["content"]), m[1]["role"]) for m in later} == {
        ("tuned on One?", "assistant"),
        ("judge on One?", "assistant"),
    }
