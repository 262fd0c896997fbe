"""What of a request passes, what is refused by which name, and what the engine gets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import BadRequest
from serving.fields.json_input import MAX_CONTAINERS, nests_too_deep, parse_object
from serving.fields.json_schemas import MAX_SCHEMA_BYTES
from serving.fields.refusals import BY_ENGINES
from serving.fields.table import NEVER_FORWARDED
from serving.request_fields import CompletionRequest, FieldLimits, parse_request, upstream_body
from tests.serving.engine_schema import MINIMAL

LIMITS = FieldLimits()
CALL = {"id": "call_1", "type": "function", "function": {"name": "water", "arguments": '{"plant": "rose"}'}}
SCHEMA = {"type": "object", "properties": {"pattern": {"type": "string"}}, "required": ["pattern"]}
WITH_DEFS = {
    "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
    "$ref": "#/$defs/Node",
}
TOOL = {
    "type": "function",
    "function": {"name": "water", "description": "Waters.", "parameters": SCHEMA, "strict": True},
}
ANTHROPIC_TOOL = {"name": "water", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}

FULL: Mapping[str, Mapping[str, Any]] = {
    "chat.completions": {
        "model": "a",
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "Roses?"}]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": None,
                "function_call": None,
                "annotations": [],
                "reasoning_content": "Hm.",
                "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "water"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": WITH_DEFS, "strict": True}},
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "logit_bias": {"50256": -100},
        "stop": ["a", "b"],
        "bad_words": ["x"],
        "top_k": 5,
        "n": 2,
        "max_completion_tokens": 7,
    },
    "completions": {"model": "a", "prompt": ["Roses", "Ferns"], "n": 2, "max_tokens": 7, "logprobs": 3},
    "responses": {
        "model": "a",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Roses?"}]},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "water", "arguments": "{}", "namespace": None},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "done"}]},
            {
                "type": "message",
                "id": "msg",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": None}],
            },
        ],
        "tools": [{"type": "function", "name": "water", "parameters": SCHEMA, "strict": False}],
        "tool_choice": "auto",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "background": False,
        "max_output_tokens": 7,
    },
    "embeddings": {"model": "a", "input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 8},
    "messages": {
        "model": "a",
        "max_tokens": 2000,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "5m"}}],
        "messages": [
            {"role": "user", "content": "Roses?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "Yes.", "citations": None},
                    {"type": "tool_use", "id": "t", "name": "water", "input": {"anything": [{"image_url": 1}]}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "done"}]},
        ],
        "tools": [ANTHROPIC_TOOL],
        "tool_choice": {"type": "tool", "name": "water"},
        "stop_sequences": ["x"],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "ada"},
        "top_k": 5,
    },
}
FREE = frozenset({"input", "metadata", "logit_bias", "schema", "parameters", "input_schema"})
"""Objects whose keys are the client's own, or that have a check of their own."""


def parse(body: Mapping[str, Any], route: str = "chat.completions", limits: FieldLimits = LIMITS) -> CompletionRequest:
    return parse_request(orjson.dumps(body), route, limits)


def refusal_of(body: Mapping[str, Any], route: str = "chat.completions", limits: FieldLimits = LIMITS) -> BadRequest:
    with pytest.raises(BadRequest) as refusal:
        parse(body, route, limits)
    assert refusal.value.status == 400
    return refusal.value


def chat(**fields: Any) -> dict[str, Any]:
    return {**MINIMAL["chat.completions"], **fields}


def answered_in(schema: object) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})


def objects_in(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a request that the table knows, with its path."""
    if isinstance(value, dict):
        yield path, value
        for name, child in value.items():
            if name not in FREE or isinstance(child, list):
                yield from objects_in(child, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from objects_in(child, f"{path}[{index}]")


@pytest.mark.parametrize("route", sorted(FULL))
def test_everything_that_is_listed_passes_unchanged(route: str) -> None:
    forwarded = orjson.loads(upstream_body(parse(FULL[route], route), "a-v1", "salt"))
    expected = {name: value for name, value in FULL[route].items() if name not in NEVER_FORWARDED}
    expected |= {"model": "a-v1", "cache_salt": "salt"} | ({"store": False} if route == "responses" else {})
    assert forwarded == expected


@pytest.mark.parametrize("route", sorted(FULL))
def test_dangerous_fields_are_refused_in_every_object(route: str) -> None:
    dangerous = {*BY_ENGINES, "image_url", "made_up"} - {"choice"}
    places = [path for path, _ in objects_in(FULL[route])]
    for place in places:
        for name in dangerous:
            body = json.loads(json.dumps(FULL[route]))
            dict(objects_in(body))[place][name] = "x"
            refusal = refusal_of(body, route)
            assert refusal.param == (f"{place}.{name}" if place else name)
            assert refusal.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("route", "change", "param"),
    [
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"conversation": "c"}, "conversation"),
        ("responses", {"background": True}, "background"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("responses", {"tools": [{"type": "mcp", "server_url": "http://169.254.169.254"}]}, "tools[0].type"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": [1, -1]}, "input"),
        ("embeddings", {"input": [[1], []]}, "input"),
        ("embeddings", {"input": [{"role": "user", "content": "x"}]}, "input"),
        ("embeddings", {"encoding_format": "bytes"}, "encoding_format"),
        ("embeddings", {"stream": True}, "stream"),
        ("messages", {"max_tokens": None}, "max_tokens"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, None),
        ("messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ("messages", {"metadata": {"user_id": 7}}, "metadata"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [1.5]}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [2**31]}, "prompt"),
    ],
)
def test_what_other_routes_refuse(route: str, change: dict[str, Any], param: str | None) -> None:
    found = refusal_of({**MINIMAL[route], **change}, route)
    assert found.param == (param or "messages[0].content[0].type")


@pytest.mark.parametrize(
    ("schema", "below"),
    [
        ({"type": "string", "pattern": "(a+)+$"}, ".pattern"),
        ({"properties": {"a": {"pattern": "x"}}}, ".properties.a.pattern"),
        (
            {"properties": {"properties": {"properties": {"a": {"pattern": "x"}}}}},
            ".properties.properties.properties.a",
        ),
        ({"patternProperties": {"(a+)+$": {}}}, ".patternProperties"),
        ({"$ref": "http://169.254.169.254/"}, ".$ref"),
        ({"$ref": "#/default", "default": {"pattern": "x"}}, ".$ref"),
        ({"$ref": "#/properties", "properties": {"patternProperties": {"(a+)+": {}}}}, ".$ref"),
        ({"anyOf": [{"type": "string"}, {"format": "regex"}]}, ".anyOf[1].format"),
        ({"type": "nonsense"}, ".type"),
        ({"type": "array", "items": {"maxItems": 10**9}}, ".items.maxItems"),
        ({"x-guidance": {"whitespace_pattern": "(a+)+"}}, ".x-guidance"),
        ({"made-up": {"pattern": "x"}}, ".made-up"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, ""),
        ({"not": {"not": {"not": {"items": {"items": {"items": [[[[[[[[[[[{}]]]]]]]]]]]}}}}}}, ""),
        ({"items": 7}, ".items"),
        ([], ""),
    ],
)
def test_schemas_that_an_engine_should_not_see(schema: object, below: str) -> None:
    assert (refusal_of(answered_in(schema)).param or "").startswith(f"response_format.json_schema.schema{below}")
    tool = {"type": "function", "function": {"name": "n", "parameters": schema}}
    assert (refusal_of(chat(tools=[tool])).param or "").startswith(f"tools[0].function.parameters{below}")
    body = {**MINIMAL["messages"], "tools": [{"name": "n", "input_schema": schema}]}
    assert (refusal_of(body, "messages").param or "").startswith(f"tools[0].input_schema{below}")


@pytest.mark.parametrize("schema", [SCHEMA, WITH_DEFS, {}, {"type": ["string", "null"], "examples": [{"pattern": 1}]}])
def test_schemas_that_pass(schema: object) -> None:
    assert parse(answered_in(schema)).body["response_format"]


def test_an_operator_can_let_fields_pass() -> None:
    limits = FieldLimits(
        allow_fields=("chat_template_kwargs", "messages.content.image_url", "tools.function.parameters.pattern")
    )
    image = {"type": "image_url", "image_url": {"url": "https://example.org/rose.png"}}
    parameters = {"type": "string", "pattern": "a+"}
    body = chat(
        chat_template_kwargs={"enable_thinking": False},
        messages=[{"role": "user", "content": [image]}],
        tools=[{"type": "function", "function": {"name": "n", "parameters": parameters}}],
    )
    assert orjson.loads(upstream_body(parse(body, limits=limits), "m")) == body
    assert refusal_of(body).param == "messages[0].content[0].image_url"
    audio = {"type": "input_audio", "input_audio": {}}
    refused = refusal_of(chat(messages=[{"role": "user", "content": [audio]}]), limits=limits)
    assert refused.param == "messages[0].content[0].input_audio"
    assert "serving.allow_fields: [messages.content.input_audio]" in refused.message


@pytest.mark.parametrize("name", ["cache_salt", "priority", "kv_transfer_params", "no.such.field"])
def test_what_cannot_be_allowed_is_an_error_at_the_start(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FieldLimits(allow_fields=(name,))


@pytest.mark.parametrize("route", sorted(MINIMAL))
def test_what_is_for_the_gateway_alone_is_not_forwarded(route: str) -> None:
    own = {
        "user": "ada",
        "safety_identifier": "ada",
        "prompt_cache_key": "k",
        "metadata": {"user_id": "ada", "regenerate_of": "chatcmpl-1"},
        "store": False,
        "service_tier": "auto",
    }
    request = parse({**MINIMAL[route], **own}, route)
    forwarded = orjson.loads(upstream_body(request, "m-v1"))
    assert not (NEVER_FORWARDED & forwarded.keys()) - ({"store"} if route == "responses" else set())
    assert (request.is_stored, request.regenerate_of) == (False, "chatcmpl-1")


@pytest.mark.parametrize(
    ("route", "wants_usage", "options"),
    [
        ("chat.completions", False, {"include_usage": True}),
        ("completions", False, {"include_usage": True}),
        ("responses", True, None),
        ("messages", True, None),
    ],
)
def test_streams_always_tell_their_usage(route: str, wants_usage: bool, options: object) -> None:
    request = parse({**MINIMAL[route], "stream": True}, route)
    assert (request.is_stream, request.wants_usage) == (True, wants_usage)
    assert orjson.loads(upstream_body(request, "m")).get("stream_options") == options


@pytest.mark.parametrize(
    ("route", "fields", "n_choices", "max_output_tokens"),
    [
        ("chat.completions", {}, 1, None),
        ("chat.completions", {"n": 3, "max_tokens": 5}, 3, 5),
        ("chat.completions", {"max_tokens": 5, "max_completion_tokens": 6}, 1, 6),
        ("completions", {}, 1, 16),
        ("completions", {"max_tokens": None}, 1, None),
        ("completions", {"prompt": ["a", "b"], "n": 2, "best_of": 3}, 6, 16),
        ("completions", {"prompt": [1, 2, 3]}, 1, 16),
        ("completions", {"prompt": [[1], [2]]}, 2, 16),
        ("responses", {"max_output_tokens": 5}, 1, 5),
        ("messages", {}, 1, 5),
        ("embeddings", {"input": ["a", "b"]}, 1, 0),
    ],
)
def test_what_a_request_may_cost(
    route: str, fields: dict[str, Any], n_choices: int, max_output_tokens: int | None
) -> None:
    request = parse({**MINIMAL[route], **fields}, route)
    assert (request.n_choices, request.max_output_tokens) == (n_choices, max_output_tokens)


@pytest.mark.parametrize(
    ("route", "name"),
    [("chat.completions", "max_completion_tokens"), ("completions", "max_tokens"), ("responses", "max_output_tokens")],
)
def test_the_operators_bound_on_answers(route: str, name: str) -> None:
    limits = FieldLimits(max_output_tokens=10)
    refusal = refusal_of({**MINIMAL[route], name: 11}, route, limits)
    assert (refusal.param, "serving.max_output_tokens" in refusal.message) == (name, True)
    named = parse({**MINIMAL[route], name: 4}, route, limits)
    assert (named.max_output_tokens, orjson.loads(upstream_body(named, "m"))[name]) == (4, 4)
    unnamed = parse({**MINIMAL[route], name: None}, route, limits)
    assert (unnamed.max_output_tokens, orjson.loads(upstream_body(unnamed, "m"))[name]) == (10, 10)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.sampled_from('ab\\"[]{},:\n \té\x00')),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.sampled_from('ab\\"[{: '), max_size=3), inner, max_size=4)
    ),
    max_leaves=25,
)


def depth_of(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth_of, children), default=0)


@given(
    body=st.dictionaries(st.text(st.sampled_from('ab\\"[{: '), max_size=3), NESTED, max_size=4),
    ascii_only=st.booleans(),
    indent=st.none() | st.just(1),
    limit=st.integers(1, 6),
)
def test_honest_json_is_read_as_it_is_and_its_depth_is_exact(
    body: dict[str, Any], ascii_only: bool, indent: int | None, limit: int
) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    assert nests_too_deep(raw, limit) == (depth_of(body) > limit)
    if depth_of(body) > limit:
        with pytest.raises(BadRequest, match="max_json_depth"):
            parse_object(raw, limit)
    else:
        assert parse_object(raw, limit) == body


@given(
    before=st.dictionaries(st.text(max_size=3), NESTED, max_size=2),
    key=st.text(st.sampled_from('ab\\": é'), max_size=3),
    values=st.tuples(NESTED, NESTED),
    within=st.sampled_from([b"%s", b'{"a": %s}', b'{"a": [1, %s]}']),
    ascii_only=st.booleans(),
    space=st.sampled_from(["", " ", "\n\t"]),
)
def test_a_key_that_appears_twice_is_found_wherever_it_is(
    before: dict[str, Any], key: str, values: tuple[Any, Any], within: bytes, ascii_only: bool, space: str
) -> None:
    pairs = [*before.items(), (key, values[0]), (key, values[1])]
    texts = (
        f"{json.dumps(k, ensure_ascii=ascii_only)}{space}:{space}{json.dumps(v, ensure_ascii=ascii_only)}"
        for k, v in pairs
    )
    raw = within.replace(b"%s", ("{" + f",{space}".join(texts) + "}").encode())
    with pytest.raises(BadRequest, match="twice"):
        parse_object(raw, 64)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' + b"[]," * 100 + b"}",
        b'{"a":[' + b"[]," * (MAX_CONTAINERS + 1) + b"[]]}",
        b'{"a":[' + b"1," * 500_001 + b"1]}",
        b'{"a":[' + b'"",' * 300_001 + b'""]}',
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        b'"' * 1_000_000,
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"\\ud800":1}',
        b'\xef\xbb\xbf{"a":1}',
        b"",
    ],
)
def test_hostile_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as refusal:
        parse_object(raw, 64)
    assert refusal.value.code == "invalid_json"


def test_brackets_and_quotes_in_long_texts_are_no_bombs() -> None:
    text = '{"a": [1, 2, {"b": "\\\\"}]},\n' * 30_000
    assert parse(chat(messages=[{"role": "user", "content": text}])).body["messages"][0]["content"] == text


def test_many_threads_can_check_at_once() -> None:
    bodies = [orjson.dumps(chat(messages=[{"role": "user", "content": f"{i}" * 5000}])) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda raw: parse_request(raw, "chat.completions", LIMITS), bodies))
    assert [orjson.dumps(request.body) for request in found] == bodies
