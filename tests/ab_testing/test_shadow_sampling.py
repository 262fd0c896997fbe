"""Which questions a candidate is asked, and that it is asked the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ab_testing.shadow_sampling import IMMATERIAL, SENT, is_drawn, request_of, why_left_out
from feedback.interactions import Interaction, Status
from feedback.recording import conversation_sha
from feedback.tools import offered_tools
from tests.pawl.records import served

PARAMETERS = {"model": "assistant", "stream": True, "temperature": 0.2, "max_tokens": 50, "metadata": {"a": "b"}}


def asked(**changes: Any) -> Interaction:
    """A question as the gateway keeps it."""
    one = served(1, **({"parameters": PARAMETERS} | changes))
    tools = {"tools": one.tools} if one.tools else {}
    sha = changes.get("prompt_sha") or conversation_sha(one.alias, one.prompt or (), tools)
    return Interaction(**{**vars(one), "prompt_sha": sha})


@given(st.lists(st.text("0123456789abcdef", min_size=48, max_size=48), min_size=1, max_size=20), st.floats(0, 1))
def test_a_larger_share_has_all_of_a_smaller_one(ids: list[str], share: float) -> None:
    smaller = {one for one in ids if is_drawn(one, "salt", share / 2)}
    assert smaller <= {one for one in ids if is_drawn(one, "salt", share)}
    assert not any(is_drawn(one, "salt", 0.0) for one in ids)
    assert all(is_drawn(one, "salt", 1.0) for one in ids)


def test_another_run_draws_others() -> None:
    ids = [f"{n:048x}" for n in range(1000)]
    one, other = ({each for each in ids if is_drawn(each, salt, 0.5)} for salt in ("one", "other"))
    assert 150 < len(one & other) < 350


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"is_stored": False}, "not_whole"),
        ({"is_complete": False}, "not_whole"),
        ({"status": Status.CLIENT_DISCONNECTED}, "not_whole"),
        ({"completion": None}, "not_whole"),
        ({"route": "responses"}, "not_whole"),
        ({"user_id": "zoe"}, "opted_out"),
        ({"user_id": "yan", "key_id": "k1"}, "opted_out"),
        ({"user_id": "yan", "key_id": "k2"}, None),
        ({"user_id": None}, "nobody"),
        ({"user_id": None, "key_id": "k2"}, None),
        ({"prompt_sha": "0" * 64}, "not_as_asked"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"model": "m", "prompt_logprobs": 1}}, "parameters"),
        ({"question": "My key is AKIAIOSFODNN7EXAMPLE, what now?"}, "secret"),
        ({"question": "Write to ann.lee@gmail.com for me."}, "personal_data"),
    ],
)
def test_what_is_left_out(changes: dict[str, Any], why: str | None) -> None:
    assert why_left_out(asked(**changes), {"zoe", "k1/yan"}) == why


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_question_with_tools_is_asked_again_with_them() -> None:
    """The hash is that of the request as it came; tools are kept in the form of chat completions."""
    prompt = ({"role": "user", "content": "Rain?"},)
    body = {"model": "assistant", "messages": list(prompt), "tools": [TOOL]}
    one = asked(
        prompt=prompt,
        tools=offered_tools(body, "chat.completions"),
        prompt_sha=conversation_sha("assistant", prompt, body),
        parameters={"model": "assistant", "tool_choice": "auto", "parallel_tool_calls": False},
    )
    assert why_left_out(one, ()) is None
    again = request_of(one, "candidate")
    assert (again["tools"], again["tool_choice"], again["parallel_tool_calls"]) == ([TOOL], "auto", False)
    assert conversation_sha("assistant", one.prompt or (), again) == one.prompt_sha


def test_tools_that_were_not_kept_as_they_came_cannot_be_asked_again() -> None:
    one = asked()
    sha = conversation_sha(one.alias, one.prompt or (), {"tools": [TOOL, {"type": "web_search"}]})
    assert why_left_out(asked(tools=(TOOL,), prompt_sha=sha), ()) == "not_as_asked"
    secret = {"type": "function", "function": {"name": "f", "description": "uses AKIAIOSFODNN7EXAMPLE"}}
    assert why_left_out(asked(tools=(secret,)), ()) == "secret"


def test_the_same_is_asked_of_another_model() -> None:
    one = asked()
    assert request_of(one, "candidate") == {
        "model": "candidate",
        "messages": list(one.prompt or ()),
        "temperature": 0.2,
        "max_tokens": 50,
        "stream": False,
    }


def test_no_parameter_is_both_sent_and_immaterial() -> None:
    assert not SENT & IMMATERIAL
