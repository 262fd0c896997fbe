"""What is kept of a call whose caller does not want it stored."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from feedback.recording import parse_answer
from serving.call_record import without_text
from tests.feedback.test_recording import ANSWERS

CHAT = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hush"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
}


def events_of(events: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)


@pytest.mark.parametrize(
    ("route", "answer", "is_stream"),
    [
        ("chat.completions", orjson.dumps(CHAT), False),
        ("completions", orjson.dumps({"choices": [{"text": "hush"}], "usage": CHAT["usage"]}), False),
        ("chat.completions", events_of([CHAT]) + b"data: [DONE]\n\n", True),
        ("responses", orjson.dumps(ANSWERS["responses"]), False),
        ("responses", orjson.dumps(ANSWERS["responses_incomplete"]), False),
        ("responses", events_of(ANSWERS["responses_stream"]), True),
        ("messages", orjson.dumps(ANSWERS["messages"]), False),
        ("messages", events_of(ANSWERS["messages_stream"]), True),
    ],
)
def test_the_counts_stay_and_the_texts_go(route: str, answer: bytes, is_stream: bool) -> None:
    before = parse_answer(answer, is_stream, route)
    reduced = without_text(answer, route, is_stream=is_stream)
    after = parse_answer(reduced, is_stream, route)
    assert (after.prompt_tokens, after.completion_tokens) == (before.prompt_tokens, before.completion_tokens)
    assert after.prompt_tokens is not None
    # Calls of tools are text too, and without them a response says no more than that it was completed.
    called = route == "responses" and before.finish_reason == "tool_calls"
    assert after.finish_reason == ("stop" if called else before.finish_reason)
    assert "hush" not in reduced.decode()
    assert before.message is not None
    text = before.message.get("content")
    assert text
    assert str(text) not in reduced.decode()
