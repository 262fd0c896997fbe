"""The best of several answers, and the preferences they make."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.answer_scores import Conversation
from retrain.best_of_n import ScoredAnswer, answers_of_engine, as_row, best_of_n, preferences
from retrain.dataset import parse_originals
from retrain.errors import BadData, EvaluationFailed
from retrain.generations import sample_seed
from retrain.prompts import Prompt, distinct, parse_prompts
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.rewards import kindness
from tests.retrain.tiny_model import WORDS

answers = st.lists(st.sampled_from(WORDS), min_size=0, max_size=5).map(" ".join)


def ask(text: str) -> Prompt:
    return ({"role": "user", "content": text},)


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(answers, min_size=n, max_size=n), max_size=5)))
def test_answers_are_ranked_and_none_is_lost(texts: list[list[str]]) -> None:
    n = len(texts[0]) if texts else 1
    prompts = [ask(f"question {number}") for number in range(len(texts))]
    ranked = best_of_n(lambda *_: texts, prompts, n, kindness)
    assert [one.prompt for one in ranked] == prompts
    for one, drawn in zip(ranked, texts, strict=True):
        scores = [answer.score for answer in one.answers]
        assert sorted(answer.text for answer in one.answers) == sorted(set(drawn))
        assert scores == sorted(scores, reverse=True)
        assert one.best.score == max(kindness([[*one.prompt, {"content": text}] for text in drawn]))
        assert one.worst.score <= one.mean + 1e-9
        assert one.mean <= one.best.score + 1e-9


@given(st.lists(st.lists(answers, min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.0, 1.0))
def test_preferences_set_different_answers_apart_by_the_margin(texts: list[list[str]], margin: float) -> None:
    ranked = best_of_n(lambda *_: texts, [ask(str(number)) for number in range(len(texts))], 3, kindness)
    rows = preferences(ranked, min_margin=margin)
    assert len(rows) == sum(len(one.answers) > 1 and one.best.score - one.worst.score >= margin for one in ranked)
    for row in rows:
        assert row["margin"] >= margin
        assert row["chosen"] != row["rejected"]
    assert len({row["pair_id"] for row in rows}) == len(rows)


def test_preferences_can_be_trained_on() -> None:
    """In the format of the original preferences."""
    ranked = best_of_n(lambda *_: [["tea is bad", "tea is good"]], [ask("tea?")], 2, kindness)
    (example,) = parse_originals(json.dumps(row) for row in preferences(ranked, min_margin=0.1))
    assert (example.chosen["content"], example.rejected["content"]) == ("tea is good", "tea is bad")
    assert example.source == "best_of_n"
    assert as_row(ranked[0])["answers"][0] == {"text": "tea is good", "score": pytest.approx(1 / 3)}


def test_the_engine_is_asked_so_often_and_never_with_one_seed_twice() -> None:
    with serving(FakeEngine(answer=lambda _model, prompt: f"{prompt} is good")) as engine:
        answer = answers_of_engine(engine.url, "tiny", temperature=0.7, max_tokens=9, seed=4)
        ranked = best_of_n(answer, [ask("tea"), ask("rain")], 3, kindness)
        bodies = engine.bodies
    assert [one.answers for one in ranked] == [
        (ScoredAnswer("tea is good", 1 / 3),),
        (ScoredAnswer("rain is good", 1 / 3),),
    ]
    assert {body["seed"] for body in bodies} == {sample_seed(4, str(n), k) for n in range(2) for k in range(3)}
    assert len(bodies) == 6
    assert all((body["temperature"], body["max_tokens"]) == (0.7, 9) for body in bodies)


@pytest.mark.parametrize("texts", [[["a", "b"]], [["a", "b"], ["c"]]])
def test_missing_answers_are_an_error(texts: list[list[str]]) -> None:
    with pytest.raises(EvaluationFailed, match="not every one of 2 prompts got 2 answers"):
        best_of_n(lambda *_: texts, [ask("a"), ask("b")], 2, kindness)


def test_prompts_are_read_in_every_form() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "b"}]
    lines = '"a"\n{"prompt": [{"role": "user", "content": "b"}]}\n{"prompt": "c"}\n'
    assert parse_prompts(lines) == [ask("a"), ask("b"), ask("c")]
    assert parse_prompts('["a", ' + str(messages).replace("'", '"') + "]") == [ask("a"), tuple(messages)]
    assert parse_prompts('"a"') == [ask("a")]
    assert parse_prompts("") == []


@pytest.mark.parametrize("text", ["{", "[1]", '[{"prompt": []}]', '[[{"content": "no role"}]]', '["a"]\n"b"'])
def test_what_holds_no_prompts_is_refused(text: str) -> None:
    with pytest.raises(BadData, match="prompts"):
        parse_prompts(text)


def test_a_question_is_asked_once() -> None:
    image: Conversation = [{"role": "user", "content": [{"type": "image_url"}]}]
    assert distinct([ask("Tea?"), tuple(image), ask("rain?"), ask("tea?")]) == [ask("Tea?"), ask("rain?")]
