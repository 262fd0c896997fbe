"""What is kept of a call: the facts, and the bytes as far as its caller wants them stored."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from ab_testing.assignment import Assignment
from feedback.recording import Exchange, parse_answer
from pawl.ids import Principal
from serving import call_record
from serving.call import Call
from serving.call_record import meta_of, without_text
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


BASE: dict[str, Any] = {
    "route": "chat.completions",
    "alias": "assistant",
    "experiment": "tone",
    "assigned_variant": "treatment",
    "served_variant": "control",
    "probability": 0.25,
    "is_analysed": True,
    "phase": 2,
    "route_version": 7,
    "model": "base-model",
}
OTHERS = {
    "route": "completions",
    "alias": "helper",
    "experiment": None,
    "assigned_variant": "control",
    "served_variant": "treatment",
    "probability": 0.75,
    "is_analysed": False,
    "phase": 3,
    "route_version": 8,
    "model": 'a "model"',
}


def call_that(number: int, facts: dict[str, Any]) -> Call:
    """One with these facts, of a user of its own."""
    call = SimpleNamespace(
        suffix=f"{number:048x}",
        unique=f"{number:032x}",
        created_at=float(number),
        route=facts["route"],
        request=SimpleNamespace(alias=facts["alias"], is_stream=False, is_stored=True),
        principal=Principal("key", f"user {number}"),
        assignment=Assignment(
            facts["experiment"],
            facts["assigned_variant"],
            "assigned-model",
            facts["probability"],
            facts["is_analysed"],
            facts["phase"],
        ),
        variant=facts["served_variant"],
        model=facts["model"],
        known=SimpleNamespace(version=facts["route_version"]),
        regenerate_of=None,
        status="ok",
        error=None,
        started=0.0,
        first_byte_at=0.0,
    )
    return cast(Call, call)


@pytest.mark.parametrize("max_shared", [1_000, 1, 2])
def test_facts_that_calls_share_are_those_of_each(monkeypatch: pytest.MonkeyPatch, max_shared: int) -> None:
    monkeypatch.setattr(call_record, "MAX_SHARED", max_shared)
    monkeypatch.setattr(call_record, "_shared", {})
    ways = [BASE, *({**BASE, name: other} for name, other in OTHERS.items())]
    for number, facts in enumerate([*ways, *ways]):
        meta = orjson.loads(meta_of(call_that(number, facts)))
        assert {name: meta[name] for name in facts} == facts
        assert set(meta) == {field.name for field in fields(Exchange)}
        assert (meta["id"], meta["user_id"], meta["http_status"]) == (f"{number:048x}", f"user {number}", 200)
        assert len(call_record._shared) <= max_shared
