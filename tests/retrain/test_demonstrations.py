"""Which tokens of a demonstration are learned: the answers and their ends, whatever the chat template."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.interactions import Message
from retrain.demonstrations import (
    NOT_LEARNED,
    Demonstration,
    Labelled,
    from_edits,
    parse_demonstrations,
    prepare,
)
from retrain.errors import BadData
from retrain.preflight import Encoder, encoder_of
from tests.retrain.tiny_model import TEMPLATE, WORDS, make_pair, make_tokenizer

TOKENIZER = make_tokenizer()
ENCODER = encoder_of(TOKENIZER)
FORGETFUL = TEMPLATE.replace(
    "message['content']", "(message['content'] if loop.last or message['role'] == 'user' else 'day')"
)
"""Renders earlier answers in another way once there are later ones, as templates do that drop what was thought."""
UNENDING = TEMPLATE.replace("' <end> '", "' '")

sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
exchanges = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4)


def encoder_with(template: str) -> Encoder:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return encoder_of(tokenizer)


def talk(*said: tuple[str, str]) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple({"role": role, "content": text} for each in said for role, text in zip(roles, each, strict=True))


def learned_text(row: Labelled) -> str:
    kept = [label for label in row.labels if label != NOT_LEARNED]
    assert kept == [token for token, label in zip(row.tokens, row.labels, strict=True) if label != NOT_LEARNED]
    return str(TOKENIZER.decode(kept))


@given(exchanges)
def test_every_answer_is_learned_with_its_end_and_nothing_else(said: list[tuple[str, str]]) -> None:
    prepared = prepare([Demonstration("1", "d", talk(*said), 0)], ENCODER, max_length=500)
    (row,) = prepared.rows
    assert learned_text(row) == " ".join(f"{answer} <end>" for _, answer in said)
    assert prepared.problems == ()
    assert prepared.n_learned_tokens == sum(len(answer.split()) + 1 for _, answer in said)


@given(exchanges)
def test_a_template_that_changes_earlier_turns_is_rendered_once_per_answer(said: list[tuple[str, str]]) -> None:
    prepared = prepare([Demonstration("1", "d", talk(*said), 0)], encoder_with(FORGETFUL), max_length=500)
    assert prepared.problems == ()
    learned = " ".join(map(learned_text, prepared.rows))
    assert learned == " ".join(f"{answer} <end>" for _, answer in said)


def test_of_a_prompt_and_a_completion_only_the_completion_is_learned() -> None:
    earlier = talk(("what is tea", "tea is bad"))
    asked = (*earlier, {"role": "user", "content": "tell me"})
    row = {"prompt": list(asked), "completion": [{"role": "assistant", "content": "tea is good"}]}
    (one,) = parse_demonstrations([json.dumps(row)])
    (labelled,) = prepare([one], ENCODER, max_length=100).rows
    assert learned_text(labelled) == "tea is good <end>"


def test_of_pairs_only_edits_are_imitated_and_only_what_the_user_wrote() -> None:
    pairs = [make_pair(number) for number in range(6)]
    found = from_edits(pairs)
    assert [one.id for one in found] == [pair.id for pair in pairs if pair.source == "edit"] != []
    rows = prepare(found, ENCODER, max_length=100).rows
    assert [learned_text(row) for row in rows] == ["tea is good kind <end>", "music is good kind <end>"]


def test_a_template_that_ends_no_turn_is_refused() -> None:
    (problem,) = prepare([Demonstration("1", "d", talk(("a", "b")), 0)], encoder_with(UNENDING), max_length=50).problems
    assert "1 answers end without a stop token" in problem


def test_what_does_not_fit_is_counted_and_too_much_of_it_refused() -> None:
    said = talk(("what is tea", "tea is good kind day"))  # 4 tokens of the user's, 2 marks, 5 of the answer, its end.
    short = [Demonstration(str(number), "d", talk(("tea", "rain")), 0) for number in range(40)]
    one = Demonstration("long", "d", said, 0)
    cut = prepare([one, *short], ENCODER, max_length=8)
    assert (cut.n_truncated, cut.n_dropped, cut.longest, cut.problems) == (1, 0, 12, ())
    gone = prepare([one, *short[:9]], ENCODER, max_length=6)
    assert (gone.n_truncated, gone.n_dropped) == (0, 1)
    assert "1 of 10 conversations do not fit into 6 tokens" in gone.problems[0]


def test_nothing_is_nothing_to_train_on() -> None:
    assert prepare([], ENCODER, max_length=10).problems == ("there is nothing to train on",)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: neither"),
        ("[]", "line 2: neither"),
        ('{"messages": "hello"}', "line 2: neither"),
        ('{"prompt": [{"role": "user", "content": "?"}]}', "line 2: neither"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "line 2: the last message must be the assistant's"),
        ('{"messages": [{"role": "assistant", "content": "!"}]}', "line 2: no chat template"),
    ],
)
def test_lines_that_are_no_demonstrations_are_named(line: str, why: str) -> None:
    fine = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    with pytest.raises(BadData, match=why):
        parse_demonstrations([fine, line])
