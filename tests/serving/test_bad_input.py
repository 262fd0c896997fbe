"""Nothing a client sends gets anything but a clear error, and the gateway serves on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pawl.settings import Settings
from serving.request_fields import FIELDS_BY_ROUTE
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.talk import CHAT, QUESTION, error_of

MESSAGES = QUESTION["messages"]
IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
FEEDBACK = "/v1/feedback"
GENUINE_SHAPE = "chatcmpl-" + "0" * 48


def chat(**fields: Any) -> dict[str, Any]:
    return {**QUESTION, **fields}


def saying(content: object, **fields: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": content, **fields}]}


BODIES = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"\xff\xfe", 400, None),
    (b'{"model": NaN}', 400, None),
    (b"[]", 400, None),
    (b"null", 400, None),
    (b'"text"', 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}", 400, None),
    (b'{"model":"assistant","messages":[{"role":"user","content":"\\ud800"}]}', 400, None),
    (b'{"model":"nobody","model":"assistant","messages":[{"role":"user","content":"x"}]}', 400, None),
    (b'{"model":"assistant","messages":[{"role":"root","role" : "user","content":"\\n"}]}', 400, None),
    (b'{"model":"assistant","messages":[' + b"[]," * 60_000 + b"[]]}", 400, None),
    (b'{"model":1e999}', 400, None),
    (b'{"model":"\xed\xa0\x80"}', 400, None),
]

FIELDS = [
    ({}, 400, "model"),
    ({"model": "assistant"}, 400, "messages"),
    (chat(model=None), 400, "model"),
    (chat(model=""), 400, "model"),
    (chat(model=7), 400, "model"),
    (chat(model="nobody"), 404, "model"),
    (chat(model="x" * 100_000), 404, "model"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages="hello"), 400, "messages"),
    (chat(messages=["hello"]), 400, "messages[0]"),
    (chat(messages=[None]), 400, "messages[0]"),
    (chat(messages=[{"content": "x"}]), 400, "messages[0].role"),
    (chat(messages=[{"role": [], "content": "x"}]), 400, "messages[0].role"),
    (chat(messages=[{"role": {"a": 1}, "content": "x"}]), 400, "messages[0].role"),
    (chat(messages=[{"role": "root", "content": "x"}]), 400, "messages[0].role"),
    (saying(7), 400, "messages[0].content"),
    (saying([IMAGE]), 400, "messages[0].content[0].image_url"),
    (saying([{"type": "input_audio", "input_audio": {}}]), 400, "messages[0].content[0].input_audio"),
    (saying([{"type": ["text"]}]), 400, "messages[0].content[0].type"),
    (saying([{"image_url": {"url": "x"}}]), 400, "messages[0].content[0].type"),
    (saying(["text"]), 400, "messages[0].content[0]"),
    (chat(temperature="hot"), 400, "temperature"),
    (chat(temperature=3), 400, "temperature"),
    (chat(temperature=True), 400, "temperature"),
    (chat(max_tokens=0), 400, "max_tokens"),
    (chat(max_tokens=10**30), 400, "max_tokens"),
    (chat(stream="yes"), 400, "stream"),
    (chat(stream_options=[]), 400, "stream_options"),
    (chat(n=9), 400, "n"),
    (chat(n=10**6), 400, "n"),
    (chat(n=0), 400, "n"),
    (chat(user="a\x00b"), 400, "user"),
    (chat(user="a\nb"), 400, "user"),
    (chat(user="x" * 513), 400, "user"),
    (chat(user={}), 400, "user"),
    (chat(metadata={"user_id": "a\x1bb"}), 400, "user"),
    (chat(metadata={"user_id": 7}), 400, "metadata"),
    (chat(metadata={str(i): "x" for i in range(17)}), 400, "metadata"),
    (chat(stop=["x"] * 5), 400, "stop"),
    (chat(logit_bias={"a": 1}), 400, "logit_bias"),
    (chat(response_format={"type": ["text"]}), 400, "response_format.type"),
    (chat(frobnicate=1), 400, "frobnicate"),
    (chat(structured_outputs={}), 400, "structured_outputs.json"),
    (chat(structured_outputs={"regex": "(a+)+b"}), 400, "structured_outputs.regex"),
    (chat(tools=[{"type": "web_search"}]), 400, "tools[0].type"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0].function.name"),
    (chat(extra_body={"priority": 1}), 400, "extra_body"),
    (chat(**{"\x00\n" * 200: 1}), 400, "\x00\n" * 40),
    *(
        (chat(**{name: value}), 400, name)
        for name, value in {
            "chat_template": "{{ 1 }}",
            "chat_template_kwargs": {},
            "guided_regex": "(a+)+$",
            "guided_json": {},
            "prompt_embeds": "x",
            "priority": 0,
            "cache_salt": "x",
            "kv_transfer_params": {},
            "logits_processors": [],
            "truncate_prompt_tokens": 1,
            "mm_processor_kwargs": {},
            "add_generation_prompt": False,
        }.items()
    ),
]

FEEDBACK_BODIES = [
    (b"{", 400, None),
    (b"7", 400, None),
    (b"[" * 100_000, 400, None),
    (b"{}", 400, "completion_id"),
    (b'{"completion_id": 7, "type": "thumbs", "value": "up"}', 400, "completion_id"),
    (b'{"completion_id": "chatcmpl-1", "type": "thumbs", "value": "up"}', 400, "completion_id"),
    (b'{"completion_id": "' + GENUINE_SHAPE.encode() + b'", "type": [], "value": "up"}', 400, "type"),
    (b'{"completion_id": "' + GENUINE_SHAPE.encode() + b'", "type": "thumbs", "value": {}}', 400, "value"),
    (b'{"completion_id": "' + GENUINE_SHAPE.encode() + b'", "type": "thumbs", "value": "up", "x": 1}', 400, "x"),
    (b'{"completion_id": "' + GENUINE_SHAPE.encode() + b'", "type": "thumbs", "value": "up"}', 404, "completion_id"),
    (
        b'{"completion_id": "' + GENUINE_SHAPE.encode() + b'", "type": "thumbs", "value": "up", "user": "\\u0000"}',
        400,
        "user",
    ),
]

ROUTES = [
    ("GET", "/v1/nowhere", 404),
    ("GET", "/nowhere", 404),
    ("POST", "/v1/models", 405),
    ("PUT", CHAT, 405),
    ("GET", "/v1/completions", 405),
    ("GET", FEEDBACK, 405),
    ("POST", CHAT + "/", 404),
    ("PUT", FEEDBACK, 405),
    ("GET", "/v1/models/nobody", 404),
    ("GET", "/v1/models/no/body%00", 404),
    ("DELETE", "/v1/feedback/fb_1", 400),
    ("DELETE", "/v1/feedback/%00", 400),
    ("DELETE", "/v1/feedback/fb_shouting_" + "0" * 48, 400),
    ("DELETE", "/v1/feedback/fb_thumbs_" + "0" * 48, 404),
    ("DELETE", "/v1/feedback/fb_thumbs_" + "0" * 48 + "%0a", 400),
]


@pytest.mark.parametrize(("raw", "status", "param"), BODIES)
def test_bodies_that_are_no_request(served: Served, raw: bytes, status: int, param: str | None) -> None:
    response = served.client.post(CHAT, content=raw)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")


@pytest.mark.parametrize(("body", "status", "param"), FIELDS)
def test_fields_that_are_wrong(served: Served, body: dict[str, Any], status: int, param: str) -> None:
    response = served.client.post(CHAT, json=body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert (error["code"] == "model_not_found") == (status == 404)
    assert served.engine.seen == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "assistant"}, "prompt"),
        ({"model": "assistant", "prompt": []}, "prompt"),
        ({"model": "assistant", "prompt": ["a", 1]}, "prompt"),
        ({"model": "assistant", "prompt": ["a"] * 9}, "prompt"),
        ({"model": "assistant", "prompt": ["a"] * 5, "n": 2}, "n"),
        ({"model": "assistant", "prompt": "a", "best_of": 100}, "best_of"),
        ({"model": "assistant", "prompt": "a", "messages": []}, "messages"),
    ],
)
def test_fields_of_plain_completions_that_are_wrong(served: Served, body: dict[str, Any], param: str) -> None:
    response = served.client.post("/v1/completions", json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(("raw", "status", "param"), FEEDBACK_BODIES)
def test_feedback_that_is_wrong(served: Served, raw: bytes, status: int, param: str | None) -> None:
    response = served.client.post(FEEDBACK, content=raw)
    assert (response.status_code, error_of(response)["param"]) == (status, param)


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_routes_that_are_not_there(served: Served, method: str, path: str, status: int) -> None:
    response = served.client.request(method, path, json={} if method in ("POST", "PUT") else None)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["a\x01b", "x" * 513])
@pytest.mark.parametrize("path", [CHAT, FEEDBACK])
def test_a_user_header_that_is_wrong(served: Served, path: str, name: str) -> None:
    body = QUESTION if path == CHAT else {"completion_id": GENUINE_SHAPE, "type": "thumbs", "value": "up"}
    request = served.client.build_request("POST", path, json=body)
    request.headers["x-pawl-user"] = name
    if "\x01" in name:
        assert _status_of_raw(served.address, path, name) == 400
        return
    response = served.client.send(request)
    assert (response.status_code, error_of(response)["param"]) == (400, "user")


def _status_of_raw(address: tuple[str, int], path: str, user: str) -> int:
    with socket.create_connection(address, timeout=5) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-pawl-user: {user}\r\ncontent-length: 2\r\n\r\n{{}}"
        connection.sendall(head.encode("latin-1"))
        return int(connection.recv(4096).split(b" ")[1])


@pytest.mark.parametrize("path", [CHAT, FEEDBACK])
def test_a_body_that_is_too_large(served: Served, path: str) -> None:
    announced = served.client.post(path, content=b"x" * 200_001)
    chunked = served.client.post(path, content=(b"x" * 1000 for _ in range(201)))
    for response in (announced, chunked):
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_in_mid_request(served: Served) -> None:
    for path in (CHAT, FEEDBACK):
        with socket.create_connection(served.address, timeout=5) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{".encode())
    assert served.client.post(CHAT, json=QUESTION).status_code == 200


def test_a_body_that_never_comes(make_settings: Callable[..., Settings], engine: FakeVLLM) -> None:
    with serving(make_settings(timeouts={"request_body_s": 0.2}), engine) as served:
        for path in (CHAT, FEEDBACK):
            with socket.create_connection(served.address, timeout=5) as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{".encode())
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in answer


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KNOWN = st.sampled_from(sorted({name for fields in FIELDS_BY_ROUTE.values() for name in fields}))
MESSAGE = st.fixed_dictionaries({}, optional={"role": JSON | st.just("user"), "content": JSON, "tool_calls": JSON})
REQUESTS = st.dictionaries(KNOWN, JSON, max_size=3).flatmap(
    lambda fields: st.one_of(
        JSON,
        st.just({**QUESTION, **fields}),
        st.lists(MESSAGE, max_size=2).map(lambda messages: {**QUESTION, **fields, "messages": messages}),
    )
)


@settings(
    max_examples=150,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=REQUESTS, path=st.sampled_from([CHAT, "/v1/completions", FEEDBACK]))
def test_any_json_gets_an_answer_that_is_no_failure_of_ours(served: Served, body: object, path: str) -> None:
    response = served.client.post(path, json=body)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error_of(response)


def test_it_still_serves(served: Served) -> None:
    assert served.client.get("/health/ready").status_code == 200
    assert served.client.post(CHAT, json=QUESTION).status_code == 200
