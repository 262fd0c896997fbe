"""Which questions may be compared at all."""

from __future__ import annotations

from typing import Any

import pytest

from feedback.interactions import Message
from feedback.recording import conversation_sha
from feedback.similarity.questions import MAX_CHARS, Question, question_of
from tests.feedback.similarity.asking import BEFORE, SKY, SKY_AGAIN, TOOLS, user


def question(*prompt: Message, alias: str = "assistant", **body: Any) -> Question | None:
    return question_of(alias, conversation_sha(alias, prompt, body), prompt)


def setting(*prompt: Message, alias: str = "assistant") -> bytes:
    found = question(*prompt, alias=alias)
    assert found is not None
    return found.setting


def test_questions_after_the_same_messages_may_be_compared() -> None:
    assert setting(*BEFORE, user(SKY)) == setting(*BEFORE, user(SKY_AGAIN))
    parts: Message = {"role": "user", "content": [{"type": "text", "text": SKY}]}
    assert setting(parts) == setting(user(SKY))


@pytest.mark.parametrize(
    "other",
    [
        (user(SKY),),
        (*BEFORE[1:], user(SKY)),
        ({**BEFORE[0], "content": "Be long."}, *BEFORE[1:], user(SKY)),
        (*BEFORE, {**user(SKY), "name": "ann"}),
        (*BEFORE, user(SKY + " In 1 sentence.")),
    ],
)
def test_anything_else_before_or_in_it_keeps_them_apart(other: tuple[Message, ...]) -> None:
    assert setting(*other) != setting(*BEFORE, user(SKY))


def test_another_alias_or_number_is_another_setting() -> None:
    assert setting(user(SKY), alias="helper") != setting(user(SKY))
    assert setting(user("What is 2 + 2?")) != setting(user("What is 2 + 3?"))
    assert setting(user("What is ２ + 2?")) == setting(user("What is 2 + 2??"))


@pytest.mark.parametrize(
    "prompt",
    [
        (),
        (user(" "),),
        (user("a" * (MAX_CHARS + 1)),),
        (user(SKY), {"role": "assistant", "content": "Light."}),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},),
        ({"role": "user", "content": None},),
    ],
)
def test_what_is_no_question_in_words_is_compared_with_nothing(prompt: tuple[Message, ...]) -> None:
    assert question(*prompt) is None


def test_nor_is_a_question_with_tools_or_a_prompt_that_was_changed() -> None:
    assert question(user(SKY), tools=TOOLS) is None
    assert question_of("assistant", conversation_sha("assistant", (user(SKY),), {}), [user("[name]")]) is None
    assert question_of("assistant", None, [user(SKY)]) is None
