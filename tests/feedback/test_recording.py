"""From bytes to records: whatever a client or an engine wrote, a row comes of it and its text is the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.interactions import FeedbackEvent, Status
from feedback.recording import (
    COMPLETE_REASONS,
    Answer,
    Exchange,
    conversation_sha,
    event_from_json,
    event_to_json,
    exchange_from_json,
    exchange_to_json,
    parse_answer,
    parse_interaction,
    prompt_messages,
)
from tests.pawl.records import SERVED

ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=200) | st.sampled_from(
    ["\x00", "\ud800", "\udfff\ud800", "data: [DONE]\n\n", '"', "\\", "\r\n", "🌹", ""]
)
"""Lone surrogates and NUL included."""


def exchange(**changes: Any) -> Exchange:
    facts: dict[str, Any] = {
        **SERVED,
        "id": "0" * 48,
        "completion_id": "chatcmpl-" + "0" * 48,
        "created_at": 1.5,
        "user_id": "ada",
        "unit_id": "ada",
        "is_stream": False,
    }
    return Exchange(**(facts | changes))


def request_of(text: str) -> bytes:
    return json.dumps({"model": "assistant", "messages": [{"role": "user", "content": text}]}).encode()


def whole(text: str, reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage}).encode()


def stream_of(deltas: list[dict[str, Any]], reason: str | None = "stop") -> bytes:
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    if choices:
        choices[-1]["finish_reason"] = reason
    chunks = [{"choices": [choice]} for choice in choices]
    chunks.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})  # type: ignore[dict-item]
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


@given(asked=ANY_TEXT, answered=ANY_TEXT)
def test_any_text_comes_back_as_it_was(asked: str, answered: str) -> None:
    found = parse_interaction(exchange(), request_of(asked), whole(answered))
    assert found.prompt == ({"role": "user", "content": asked},)
    assert found.completion == {"role": "assistant", "content": answered}
    assert (found.is_complete, found.prompt_tokens, found.completion_tokens) == (True, 3, 4)


@given(pieces=st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_a_stream_joins_to_its_text(pieces: list[str]) -> None:
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
    found = parse_answer(stream_of(deltas), is_stream=True)
    assert found.message == {"role": "assistant", "content": "".join(pieces)}
    assert (found.finish_reason, found.prompt_tokens, found.completion_tokens) == ("stop", 3, 4)


def test_a_megabyte() -> None:
    text = "é\x00x" * 350_000
    found = parse_interaction(exchange(), request_of(text), whole(text))
    assert found.completion == {"role": "assistant", "content": text}


def test_a_stream_cut_at_any_byte_is_incomplete_and_a_prefix() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "Wätér "}, {"content": "it"}]
    stream = stream_of(deltas)
    finished_at = stream.index(b'"finish_reason": "stop"')
    for end in range(len(stream)):
        found = parse_interaction(exchange(is_stream=True), request_of("q"), stream[:end])
        text = found.completion["content"] if found.completion else ""
        assert "Wätér it".startswith(text)
        assert found.is_complete <= (end > finished_at)
    assert parse_interaction(exchange(is_stream=True), request_of("q"), stream).is_complete


@given(request=st.binary(max_size=200), response=st.binary(max_size=200), is_stream=st.booleans())
def test_any_bytes_give_a_row(request: bytes, response: bytes, is_stream: bool) -> None:
    found = parse_interaction(exchange(is_stream=is_stream), request, response)
    assert found.id == "0" * 48


WORDS = ["choices", "message", "delta", "usage", "tool_calls", "function", "index", "content", "finish_reason", "text"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(body=JSON, is_stream=st.booleans())
def test_any_json_gives_a_row(body: object, is_stream: bool) -> None:
    raw = json.dumps(body).encode()
    response = b"data: " + raw + b"\n\n" if is_stream else raw
    found = parse_interaction(exchange(is_stream=is_stream), raw, response)
    reason = found.finish_reason
    assert reason is None or (reason.isascii() and reason.isprintable() and len(reason) <= 32)


def test_tool_calls_are_put_together() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "water", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"plant":'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "wait", "arguments": "{"}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": '"rose"}'}},
                {"index": 1, "function": {"arguments": "}"}},
            ]
        },
    ]
    found = parse_interaction(exchange(is_stream=True), request_of("q"), stream_of(deltas, "tool_calls"))
    assert found.completion == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "water", "arguments": '{"plant":"rose"}'}},
            {"id": "b", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
        ],
    }
    assert found.is_complete


def test_unknown_fields_of_a_message_are_kept() -> None:
    deltas = [{"role": "assistant", "reasoning": "It is "}, {"reasoning": "dawn."}, {"content": "Now."}]
    found = parse_answer(stream_of(deltas), is_stream=True)
    assert found.message == {"role": "assistant", "content": "Now.", "reasoning": "It is dawn."}


def test_of_several_choices_the_first_is_kept() -> None:
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for index, text in ((1, "second"), (0, "first"))
    ]
    found = parse_answer(json.dumps({"choices": choices}).encode(), is_stream=False)
    assert found.message == {"role": "assistant", "content": "first"}


@given(reason=st.sampled_from([*COMPLETE_REASONS, "length", "content_filter", "abort"]), status=st.sampled_from(Status))
def test_what_counts_as_complete(reason: str, status: Status) -> None:
    found = parse_interaction(exchange(status=status), request_of("q"), whole("a", reason))
    assert found.is_complete == (status == Status.OK and reason in COMPLETE_REASONS)


def test_the_older_completions_api() -> None:
    request = json.dumps({"prompt": "Roses", "suffix": "."}).encode()
    response = json.dumps({"choices": [{"index": 0, "text": "are", "finish_reason": "stop"}]}).encode()
    found = parse_interaction(exchange(route="completions"), request, response)
    assert found.prompt == ({"role": "user", "content": "Roses"},)
    assert found.completion == {"role": "assistant", "content": "are"}


def test_without_consent_no_text_is_in_the_record() -> None:
    found = parse_interaction(exchange(is_stored=False), request_of("secret"), whole("secret"))
    assert "secret" not in repr(found)
    assert found.completion_tokens == 4


@given(text=ANY_TEXT, other=ANY_TEXT)
def test_a_conversations_hash_tells_conversations_apart(text: str, other: str) -> None:
    def sha(content: str, alias: str = "a") -> str:
        body = json.loads(request_of(content))
        return conversation_sha(alias, prompt_messages(body) or (), body)

    assert (sha(text) == sha(other)) == (text == other)
    assert sha(text) != sha(text, "b")


def test_an_exchange_survives_the_spool() -> None:
    before = exchange(user_id="ädä", status=Status.SHUTDOWN, first_byte_ms=1.25)
    assert exchange_from_json(exchange_to_json(before)) == before


@given(value=ANY_TEXT | st.floats(0, 1) | st.just(True), comment=st.none() | ANY_TEXT)
def test_an_event_survives_the_spool(value: Any, comment: str | None) -> None:
    tags = {"screen": comment or "x"}
    before = FeedbackEvent(
        "e", "f", "0" * 48, "c", "edit", value, False, comment, comment, tags, "", None, 1_700_000_000.123456
    )
    assert event_from_json(event_to_json(before)) == before


ANSWERS = json.loads((Path(__file__).parent / "engine_answers.json").read_text())
"""Answers of every form, written with vLLM 0.32's own models."""
CALL = {"id": "call_1", "type": "function", "function": {"name": "water", "arguments": '{"plant":"rose"}'}}
SPOKEN = {"role": "assistant", "content": "Wätér it."}


def sse(events: list[dict[str, Any]]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


def test_a_whole_answer_of_the_responses_api() -> None:
    found = parse_answer(json.dumps(ANSWERS["responses"]).encode(), False, "responses")
    assert found.message == SPOKEN | {"reasoning": "It is dawn.", "tool_calls": [CALL]}
    assert found[1:] == ("tool_calls", 3, 4)
    cut = parse_answer(json.dumps(ANSWERS["responses_incomplete"]).encode(), False, "responses")
    assert cut == (SPOKEN, "length", 3, 4)


def test_a_stream_of_the_responses_api() -> None:
    events = ANSWERS["responses_stream"]
    found = parse_answer(sse(events), True, "responses")
    assert found[1:] == ("tool_calls", 3, 4)
    assert found.message == SPOKEN | {"tool_calls": [CALL]}
    unfinished = parse_answer(sse(events[:-1]), True, "responses")
    assert unfinished == Answer(found.message, None, None, None)
    assert parse_answer(sse(events[:2]), True, "responses").message == SPOKEN | {"content": "Wätér "}


def test_a_whole_answer_of_the_messages_api() -> None:
    found = parse_answer(json.dumps(ANSWERS["messages"]).encode(), False, "messages")
    call = CALL | {"id": "toolu_1", "function": {"name": "water", "arguments": '{"plant": "rose"}'}}
    assert found.message == SPOKEN | {"reasoning": "It is dawn.", "tool_calls": [call]}
    assert found[1:] == ("tool_calls", 3, 4)
    assert parse_answer(sse(ANSWERS["messages_stream"]), True, "messages") == found


@pytest.mark.parametrize(
    ("reason", "finish", "is_complete"),
    [
        ("end_turn", "stop", True),
        ("stop_sequence", "stop", True),
        ("tool_use", "tool_calls", True),
        ("max_tokens", "length", False),
        ("refusal", "content_filter", False),
    ],
)
def test_stop_reasons_of_the_messages_api(reason: str, finish: str, is_complete: bool) -> None:
    response = json.dumps(ANSWERS["messages"] | {"stop_reason": reason}).encode()
    found = parse_interaction(exchange(route="messages"), request_of("q"), response)
    assert (found.finish_reason, found.is_complete) == (finish, is_complete)


@pytest.mark.parametrize("route", ["responses", "messages"])
def test_a_stream_of_another_api_cut_at_any_byte_is_a_prefix(route: str) -> None:
    stream = sse(ANSWERS[f"{route}_stream"])
    for end in range(len(stream)):
        found = parse_interaction(exchange(route=route, is_stream=True), request_of("q"), stream[:end])
        text = found.completion["content"] if found.completion else ""
        assert "Wätér it.".startswith(text)
        assert not found.is_complete or end > len(stream) * 0.8


def test_embeddings_leave_their_usage_and_no_text() -> None:
    response = b'{"object":"list","data":[{"index":0,"embedding":[0.5]}],"usage":{"prompt_tokens":3,"total_tokens":3}}'
    request = json.dumps({"model": "a", "input": "secret"}).encode()
    found = parse_interaction(exchange(route="embeddings"), request, response)
    assert (found.prompt, found.completion, found.prompt_tokens, found.is_complete) == (None, None, 3, False)
    assert "secret" not in repr(found)


def test_a_conversation_of_the_responses_api() -> None:
    body = {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Roses?"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "call_1", "name": "water", "arguments": '{"plant":"rose"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "done"},
        ],
    }
    assert prompt_messages(body, "responses") == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Roses?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    )
    assert prompt_messages({"input": "Roses?"}, "responses") == ({"role": "user", "content": "Roses?"},)


def test_a_conversation_of_the_messages_api() -> None:
    use = {"type": "tool_use", "id": "call_1", "name": "water", "input": {"plant": "rose"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "done"}]}
    body = {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Roses?"},
            {"role": "assistant", "content": [{"type": "text", "text": "I will."}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "And ferns?"}]},
        ],
    }
    call = CALL | {"function": {"name": "water", "arguments": '{"plant": "rose"}'}}
    assert prompt_messages(body, "messages") == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Roses?"},
        {"role": "assistant", "content": "I will.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        {"role": "user", "content": "And ferns?"},
    )


def test_of_several_prompts_the_first_is_kept_as_its_choice_is() -> None:
    assert prompt_messages({"prompt": ["Roses", "Ferns"]}) == ({"role": "user", "content": "Roses"},)
    assert prompt_messages({"prompt": [[1, 2]]}) is None


DIALECT_WORDS = [
    *("type", "content", "text", "output", "item", "delta", "response", "message", "usage", "status", "index"),
    *("output_index", "content_block", "stop_reason", "input", "system", "instructions", "messages", "role"),
    *("tool_use", "thinking", "function_call", "response.output_item.done", "response.output_text.delta"),
]
DIALECT_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from(DIALECT_WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(DIALECT_WORDS), inner, max_size=4),
    max_leaves=12,
)


@given(body=DIALECT_JSON, is_stream=st.booleans(), route=st.sampled_from(["responses", "messages", "embeddings"]))
def test_any_json_gives_a_row_of_any_route(body: object, is_stream: bool, route: str) -> None:
    raw = json.dumps(body).encode()
    response = b"data: " + raw + b"\n\n" if is_stream else raw
    found = parse_interaction(exchange(is_stream=is_stream, route=route), raw, response)
    assert found.id == "0" * 48
    json.dumps([found.prompt, found.completion])
