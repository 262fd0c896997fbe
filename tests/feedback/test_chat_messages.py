"""Messages as chat templates read them: whatever a client or a model wrote, and nothing made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from feedback.chat_messages import MAX_DEPTH, Unfit, calls_tools, for_templates, unfit
from feedback.interactions import Message
from tests.feedback.test_export import messages

ASK: tuple[Message, ...] = ({"role": "user", "content": "Hello?"},)


def calling(arguments: object, **fields: Any) -> Message:
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    } | fields


def arguments_read(message: Message) -> object:
    return for_templates(message)["tool_calls"][0]["function"]["arguments"]


@given(messages)
def test_what_is_fit_is_read_the_same_twice_and_has_no_empty_fields(message: Message) -> None:
    if unfit((message,)) is None:
        read = for_templates(message)
        assert for_templates(read) == read == json.loads(json.dumps(read, allow_nan=False))
        assert None not in read.values()
        assert isinstance(read["content"], str)
        assert not calls_tools([read]) or calls_tools([message])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"b": 1, "a": [{"c": null}]}', {"b": 1, "a": [{"c": None}]}),
        ({"b": 1}, {"b": 1}),
        ("", {}),
        (None, {}),
        ('{"n": NaN, "big": 100000000000000000000}', {"n": None, "big": "100000000000000000000"}),
    ],
)
def test_arguments_are_objects_in_the_order_they_were_written(written: object, read: dict[str, object]) -> None:
    assert unfit(ASK, calling(written)) is None
    assert json.dumps(arguments_read(calling(written))) == json.dumps(read)


@pytest.mark.parametrize("broken", ["{", "[1]", '"text"', "1", 7, ["x"], '{"a":' * 100_000, "9" * 5000])
def test_broken_arguments_are_no_answer_and_none_in_the_history(broken: object) -> None:
    """The engine reads a history with them; what it wrote when it answered with them, no template can write."""
    assert unfit(ASK, calling(broken)) is Unfit.BROKEN_CALL
    assert unfit((*ASK, calling(broken)), {"role": "assistant", "content": "Hi."}) is None
    assert arguments_read(calling(broken)) == {}


def test_arguments_deeper_than_any_reader_goes_are_broken() -> None:
    nested = ['{"a":' * depth + "1" + "}" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 2)]
    assert [unfit(ASK, calling(text)) for text in nested] == [None, Unfit.BROKEN_CALL]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, Unfit.NOT_TEXT),
        ({"role": "user", "content": {"text": "x"}}, Unfit.NOT_TEXT),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, Unfit.BROKEN_CALL),
        ({"role": "assistant", "content": "x", "tool_calls": "look"}, Unfit.BROKEN_CALL),
        ({"role": "assistant", "content": None, "function_call": {"name": "look"}}, Unfit.BROKEN_CALL),
        ({"role": "assistant", "content": "x", "tool_calls": [], "function_call": None}, None),
        ({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]}, None),
    ],
)
def test_what_no_template_shows_is_unfit_wherever_it_stands(message: Message, reason: Unfit | None) -> None:
    plain: Message = {"role": "assistant", "content": "Hi."}
    assert unfit((*ASK, message), plain, plain) is reason
    assert unfit(ASK, plain, message) is reason
