"""Completions through the gateway: what the client gets, what the engine sees, what is kept."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from feedback.interactions import Status
from monitoring.metrics import REGISTRY
from pawl import ids
from pawl.settings import Settings
from serving.relay import Relay
from tests.fake_vllm import Behaviour, FakeVLLM
from tests.servers import free_port, running
from tests.serving.conftest import Served, serving
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of, events_of, raw_request, text_of
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]

SLACK_S = 9.0
"""Of a machine that is busy with something else; without the gateway's doing, the engine would work on for longer."""
WORKS_ON_S = 60.0


def from_engine(served: Served, completion_id: str, body: dict[str, Any]) -> bytes:
    """What the engine itself answers to the same request."""
    url = served.gateway.settings.serving.models["assistant"].engines[0]
    suffix = completion_id.partition("-")[2]
    request = {**body, "model": "base-model"}
    return httpx2.post(url + CHAT, json=request, headers={"x-request-id": suffix}).content


def test_a_whole_answer_is_the_engines_bytes(served: Served) -> None:
    response = served.client.post(CHAT, json=QUESTION)
    assert response.status_code == 200
    answer = response.json()
    assert answer["unknown_field"] == {"kept": True}
    assert answer["model"] == "base-model"
    same = from_engine(served, answer["id"], dict(QUESTION))
    assert re.sub(rb'"created":\d+', b"", response.content) == re.sub(rb'"created":\d+', b"", same)


def test_a_stream_is_the_engines_bytes(served: Served) -> None:
    body = {**STREAM, "stream_options": {"include_usage": True}}
    response = served.client.post(CHAT, json=body)
    events = events_of(response.content)
    assert events[-1] == b"[DONE]"
    assert text_of(events[:-2]) == served.engine.behaviour.text
    assert b'"usage"' in events[-2]
    assert b'"choices":[]' in events[-2]
    completion_id = str(re.search(r"chatcmpl-[0-9a-f]+", response.text)[0])  # type: ignore[index]
    assert response.content == from_engine(served, completion_id, body)


def test_the_usage_chunk_nobody_asked_for_is_dropped_but_counted(served: Served) -> None:
    response = served.client.post(CHAT, json=STREAM)
    events = events_of(response.content)
    assert events[-1] == b"[DONE]"
    assert not any(b'"choices":[]' in event for event in events)
    assert served.engine.seen[-1]["stream_options"] == {"include_usage": True}
    kept = served.last_stored()
    assert (kept.prompt_tokens, kept.completion_tokens) == (7, 5)


def test_the_first_chunk_comes_before_the_engine_has_finished(served: Served) -> None:
    served.engine.behaviour.gap_s = 1.0
    with served.client.stream("POST", CHAT, json=STREAM) as response:
        chunks = response.iter_raw()
        assert b'"role":"assistant"' in next(chunks)
        assert served.engine.n_running == 1
        served.engine.behaviour.gap_s = 0.0
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_one_id_everywhere(served: Served) -> None:
    response = served.client.post(CHAT, json=QUESTION)
    completion_id = response.json()["id"]
    suffix = ids.completion_suffix(completion_id)
    assert completion_id == f"chatcmpl-{suffix}"
    assert served.engine.seen_headers[-1]["x-request-id"] == suffix
    assert response.headers["x-request-id"] == str(suffix)[:32]
    assert served.stored(completion_id).completion_id == completion_id


@pytest.mark.parametrize("inbound", ["trace 42/ü", "x" * 129, "", "a\tb"])
def test_an_insane_request_id_is_replaced(served: Served, inbound: str) -> None:
    headers = [(b"x-request-id", inbound.encode("latin-1"))]
    for response in (
        served.client.post(CHAT, json=QUESTION, headers=headers),
        served.client.get("/health/live", headers=headers),
    ):
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("path", [CHAT, "/v1/feedback", "/v1/nowhere", "/health/live"])
def test_a_sane_request_id_is_echoed(served: Served, path: str) -> None:
    sane = "trace-" + "~" * 122
    response = served.client.request("POST", path, json=QUESTION, headers={"x-request-id": sane})
    assert response.headers.get_list("x-request-id") == [sane]


def test_headers_of_an_answer(served: Served) -> None:
    response = served.client.post(CHAT, json=QUESTION)
    assert response.headers["x-pawl-variant"] == "control"
    assert response.headers["x-pawl-model"] == "base-model"
    token = response.headers["x-pawl-feedback-token"]
    suffix = str(ids.completion_suffix(response.json()["id"]))
    assert ids.check_feedback_token(served.gateway.secret, token, suffix, time.time())
    stream = served.client.post(CHAT, json=STREAM)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-cache"
    assert stream.headers["x-accel-buffering"] == "no"


def test_what_is_the_gateways_never_reaches_the_engine(served: Served) -> None:
    body = {**QUESTION, "metadata": {"user_id": "m"}, "user": "u", "safety_identifier": "s", "store": True, "seed": 3}
    headers = {"authorization": "Bearer hush", "cookie": "session=hush", "x-pawl-user": "ada", "x-forwarded-for": "1"}
    assert served.client.post(CHAT, json=body, headers=headers).status_code == 200
    seen = served.engine.seen[-1]
    assert seen == {"model": "base-model", "messages": QUESTION["messages"], "seed": 3}
    allowed = {"host", "content-type", "content-length", "accept", "accept-encoding", "user-agent", "x-request-id"}
    assert set(served.engine.seen_headers[-1]) <= allowed
    assert "hush" not in str(served.engine.seen_headers)


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_kept(served: Served, is_stream: bool) -> None:
    body = {**QUESTION, "stream": is_stream, "user": "ada", "temperature": 0.5}
    assert served.client.post(CHAT, json=body).status_code == 200
    kept = served.last_stored()
    assert kept.prompt == tuple(QUESTION["messages"])
    assert kept.completion == {"role": "assistant", "content": served.engine.behaviour.text}
    assert (kept.assigned_variant, kept.served_variant, kept.model) == ("control", "control", "base-model")
    assert (kept.alias, kept.user_id, kept.unit_id) == ("assistant", "ada", "ada")
    assert (kept.prompt_tokens, kept.completion_tokens, kept.finish_reason) == (7, 5, "stop")
    assert (kept.status, kept.http_status, kept.is_complete, kept.is_stored) == (Status.OK, 200, True, True)
    assert 0 < kept.latency_ms < 10_000
    assert (kept.first_byte_ms is not None) == is_stream
    assert kept.parameters["temperature"] == 0.5


@pytest.mark.parametrize("is_stream", [False, True])
def test_without_consent_no_text_is_kept(served: Served, is_stream: bool) -> None:
    asked, answered = f"q{secrets.token_hex(8)}", f"a{secrets.token_hex(8)}"
    served.engine.behaviour.text = answered
    body = {"model": "assistant", "messages": [{"role": "user", "content": asked}], "stream": is_stream, "store": False}
    assert served.client.post(CHAT, json=body).status_code == 200
    kept = served.last_stored()
    assert (kept.prompt, kept.completion, kept.prompt_sha, kept.is_stored) == (None, None, None, False)
    assert (kept.prompt_tokens, kept.completion_tokens, kept.finish_reason) == (7, 5, "stop")
    state = served.gateway.settings.state_dir
    files = [path for path in [*state.rglob("*"), *state.parent.glob("*.db*")] if path.is_file()]
    assert len(files) >= 3
    for path in files:
        content = content_of(path)
        assert asked.encode() not in content, path
        assert answered.encode() not in content, path


def content_of(path: Path) -> bytes:
    """Of a file that the gateway may remove or rename at any moment."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("by_header", [False, True])
def test_regeneration(served: Served, by_header: bool) -> None:
    first = served.client.post(CHAT, json=QUESTION).json()["id"]
    metadata = {} if by_header else {"metadata": {"regenerate_of": first}}
    headers = {"x-pawl-regenerate-of": first} if by_header else {}
    assert served.client.post(CHAT, json={**QUESTION, **metadata}, headers=headers).status_code == 200
    assert served.last_stored().regenerate_of == ids.completion_suffix(first)
    assert "metadata" not in served.engine.seen[-1]


@pytest.mark.parametrize(
    ("named", "status"), [("chatcmpl-1", 400), ("chatcmpl-" + "a" * 48, 404), ("the users own", 404)]
)
def test_a_regeneration_of_what_is_not_the_callers(served: Served, named: str, status: int) -> None:
    if named == "the users own":
        named = served.client.post(CHAT, json={**QUESTION, "user": "ada"}).json()["id"]
    body = {**QUESTION, "user": "eve", "metadata": {"regenerate_of": named}}
    response = served.client.post(CHAT, json=body)
    assert response.status_code == status
    assert error_of(response)["param"] == "metadata.regenerate_of"


def test_a_client_that_leaves_before_the_first_byte_stops_the_engine(served: Served) -> None:
    served.engine.behaviour.delay_s = WORKS_ON_S
    with raw_request(served.url, QUESTION):
        eventually(lambda: served.engine.seen)
        left_at = time.monotonic()
    eventually(lambda: served.engine.n_aborted)
    assert time.monotonic() - left_at <= 1.0 + SLACK_S
    kept = served.last_stored()
    assert (kept.status, kept.is_complete) == (Status.CLIENT_DISCONNECTED, False)


def test_a_client_that_leaves_in_mid_stream_stops_the_engine(served: Served) -> None:
    served.engine.behaviour.gap_s = WORKS_ON_S
    with raw_request(served.url, STREAM) as connection:
        while b"data: " not in connection.recv(4096):
            pass
        left_at = time.monotonic()
    eventually(lambda: served.engine.n_aborted)
    assert time.monotonic() - left_at <= 1.0 + SLACK_S
    kept = served.last_stored()
    assert (kept.status, kept.is_complete) == (Status.CLIENT_DISCONNECTED, False)
    eventually(lambda: not served.gateway.relay.calls)


def test_an_engine_that_breaks_off_in_mid_stream(served: Served) -> None:
    served.engine.behaviour.break_after = 2
    events = events_of(served.client.post(CHAT, json=STREAM).content)
    assert b"[DONE]" not in events
    assert events[-1].startswith(b'{"error":{"message":')
    assert len(events) == 3
    kept = served.last_stored()
    assert (kept.status, kept.is_complete) == (Status.UPSTREAM_ERROR, False)


def test_an_engine_that_fails_in_mid_stream(served: Served) -> None:
    served.client.post(CHAT, json=STREAM)
    served.engine.behaviour.fail_after = 2
    failures = upstream_errors("stream_error")
    events = events_of(served.client.post(CHAT, json=STREAM).content)
    assert [b'"error"' in event for event in events] == [False, False, True]
    assert orjson.loads(events[-1])["error"]["code"] == "engine_error"
    kept = served.last_stored()
    assert (kept.status, kept.http_status, kept.is_complete) == (Status.UPSTREAM_ERROR, 502, False)
    assert upstream_errors("stream_error") - failures == 1
    assert failures_in_a_row(served) == 1
    served.engine.behaviour.fail_after = None
    served.client.post(CHAT, json=STREAM)
    assert failures_in_a_row(served) == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_of_the_gateways_own_is_recorded_as_one(
    served: Served, is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Relay, "_lines", lambda *_: 1 / 0)
    before = counts(served)
    response = served.client.post(CHAT, json={**QUESTION, "stream": is_stream})
    assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
    kept = served.last_stored()
    assert (kept.status, kept.http_status, kept.is_complete) == (Status.UPSTREAM_ERROR, 500, False)
    assert counts(served) == (before[0] + 1, before[1])


def counts(served: Served) -> tuple[float, float]:
    """Failures and successes up to now; a scrape brings the counters up to date."""
    served.client.get("/metrics")
    return n_requests("server_error"), n_requests("ok")


def n_requests(outcome: str, variant: str = "control") -> float:
    labels = {"route": "chat.completions", "model": "assistant", "variant": variant, "outcome": outcome}
    return REGISTRY.get_sample_value("pawl_requests_total", labels) or 0.0


def upstream_errors(reason: str) -> float:
    return REGISTRY.get_sample_value("pawl_upstream_errors_total", {"reason": reason}) or 0.0


def failures_in_a_row(served: Served) -> int:
    return served.gateway.replicas["assistant"].replicas[0].health._n_in_a_row


def test_a_failed_attempt_is_counted_once(served: Served) -> None:
    served.engine.behaviour.status = 500
    before = upstream_errors("http_500"), upstream_errors("broken_off")
    served.client.post(CHAT, json=QUESTION)
    assert (upstream_errors("http_500") - before[0], upstream_errors("broken_off") - before[1]) == (1, 0)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error", "expected", "code"),
    [
        (500, None, 502, "engine_error"),
        (401, None, 502, "engine_error"),
        (503, None, 503, "engine_overloaded"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 64 tokens."}},
            400,
            "context_length_exceeded",
        ),
        (400, {"error": {"message": "no such option", "param": "top_k"}}, 400, None),
        (422, {"detail": "odd"}, 422, None),
    ],
)
def test_an_engine_that_refuses(
    served: Served, is_stream: bool, status: int, error: dict[str, Any] | None, expected: int, code: str | None
) -> None:
    served.engine.behaviour.status, served.engine.behaviour.error = status, error
    response = served.client.post(CHAT, json={**QUESTION, "stream": is_stream})
    assert response.status_code == expected
    assert error_of(response)["code"] == code
    assert ("retry-after" in response.headers) == (expected == 503)
    kept = served.last_stored()
    assert kept.status == (Status.REJECTED if expected < 500 else Status.UPSTREAM_ERROR)
    assert (kept.http_status, kept.is_complete) == (expected, False)


def test_an_engine_that_is_down(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    settings = make_settings(model={"engines": [f"http://127.0.0.1:{free_port()}"]})
    with serving(settings, engine) as served:
        client = served.client
        response = client.post(CHAT, json=QUESTION)
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_unavailable"
        assert 1 <= int(response.headers["retry-after"]) <= 60


def test_a_dead_replica_is_passed_over(make_settings: MakeSettings, engine: FakeVLLM, engine_url: str) -> None:
    settings = make_settings(model={"engines": [engine_url, f"http://127.0.0.1:{free_port()}"]})
    with serving(settings, engine) as served:
        client = served.client
        for user in range(12):
            assert client.post(CHAT, json={**QUESTION, "user": f"user {user}"}).status_code == 200


def test_an_engine_that_hangs(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    settings = make_settings(timeouts={"total_s": 3.0, "between_chunks_s": 1.0})
    with serving(settings, engine) as served:
        client = served.client
        before = upstream_errors("timeout")
        engine.behaviour.delay_s = WORKS_ON_S
        response = client.post(CHAT, json=QUESTION)
        assert (response.status_code, error_of(response)["type"]) == (504, "server_error")
        assert (upstream_errors("timeout") - before, failures_in_a_row(served)) == (1, 1)
        engine.behaviour.delay_s, engine.behaviour.gap_s = 0.0, WORKS_ON_S
        events = events_of(client.post(CHAT, json=STREAM).content)
        assert events[-1].startswith(b'{"error":')
        assert (upstream_errors("timeout") - before, failures_in_a_row(served)) == (2, 2)


def test_a_missing_adapter_is_replaced_by_the_control(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    variants = [
        {"name": "control", "model": "base-model", "weight": 0},
        {"name": "treatment", "model": "base-model--r0001-1a2b3c4d", "weight": 1},
    ]
    settings = make_settings(model={"experiment": {"key": "tone", "variants": variants}})
    with serving(settings, engine) as served:
        client = served.client
        response = client.post(CHAT, json={**QUESTION, "user": "ada"})
        assert response.headers["x-pawl-variant"] == "control"
        assert response.headers["x-pawl-model"] == response.json()["model"] == "base-model"
        engine.adapters["base-model--r0001-1a2b3c4d"] = "somewhere"

        def treated() -> bool:
            later = client.post(CHAT, json={**QUESTION, "user": "ada"})
            return later.headers["x-pawl-variant"] == "treatment"

        eventually(treated)  # As soon as a probe has seen that the engine has it now.
        kept = served.stored(response.json()["id"])
    assert (kept.assigned_variant, kept.served_variant, kept.model) == ("treatment", "control", "base-model")


ADAPTER = "base-model--r0001-1a2b3c4d"
ALL_TREATED = {
    "key": "tone",
    "variants": [
        {"name": "control", "model": "base-model", "weight": 0},
        {"name": "treatment", "model": ADAPTER, "weight": 1},
    ],
}


def asking(subject: int, *more: dict[str, str]) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": f"roses, {subject}?"}, *more]}


@pytest.fixture
def two_engines(make_settings: MakeSettings, engine: FakeVLLM, engine_url: str) -> Iterator[tuple[Served, FakeVLLM]]:
    """A gateway before two replicas; all users are assigned an adapter that neither has yet. No probe comes between."""
    other = FakeVLLM("base-model")
    with running(other.app) as other_url:
        model = {"engines": [engine_url, other_url], "experiment": ALL_TREATED}
        settings = make_settings(model=model, replicas={"probe_every_s": 3600})
        with serving(settings, engine) as served:
            yield served, other


def test_a_replica_that_lost_its_adapter_is_passed_over(two_engines: tuple[Served, FakeVLLM]) -> None:
    served, other = two_engines
    other.adapters[ADAPTER] = "somewhere"
    for subject in range(20):
        response = served.client.post(CHAT, json=asking(subject))
        assert (response.headers["x-pawl-variant"], response.json()["model"]) == ("treatment", ADAPTER)
    assert served.engine.seen, "some conversations ask first where the adapter is missing"


def test_the_control_answers_where_the_replica_with_the_adapter_fails(two_engines: tuple[Served, FakeVLLM]) -> None:
    served, other = two_engines
    other.adapters[ADAPTER] = "somewhere"
    other.behaviour.status = 500
    for subject in range(8):
        response = served.client.post(CHAT, json=asking(subject))
        assert (response.status_code, response.headers["x-pawl-variant"]) == (200, "control")


def test_nobody_is_asked_for_ever(two_engines: tuple[Served, FakeVLLM]) -> None:
    served, other = two_engines
    served.engine.behaviour.status = other.behaviour.status = 500
    assert served.client.post(CHAT, json=asking(0)).status_code == 502
    assert len(served.engine.seen) + len(other.seen) == 4


def test_a_nameless_conversation_stays_on_its_replica(two_engines: tuple[Served, FakeVLLM]) -> None:
    served, other = two_engines
    served.engine.adapters[ADAPTER] = other.adapters[ADAPTER] = "somewhere"
    turns = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And ferns?"}]
    for subject in range(20):
        for more in ([], turns, turns * 2):
            served.client.post(CHAT, json=asking(subject, *more))
    here, there = ({body["messages"][0]["content"] for body in engine.seen} for engine in (served.engine, other))
    assert here
    assert there
    assert not here & there


def test_a_route_that_the_engine_lacks_says_nothing_about_the_model(served: Served) -> None:
    served.engine.behaviour.status, served.engine.behaviour.error = 404, {"detail": "Not Found"}
    response = served.client.post("/v1/embeddings", json={"model": "assistant", "input": "roses"})
    assert (response.status_code, error_of(response)["type"]) == (404, "invalid_request_error")
    served.engine.behaviour = Behaviour()
    assert served.client.post(CHAT, json=QUESTION).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_plain_completions(served: Served, is_stream: bool) -> None:
    response = served.client.post(
        "/v1/completions", json={"model": "assistant", "prompt": "Roses", "stream": is_stream}
    )
    assert response.status_code == 200
    completion_id = "cmpl-" + served.engine.seen_headers[-1]["x-request-id"]
    assert completion_id in response.text
    kept = served.stored(completion_id)
    assert kept.completion_id == completion_id
    assert kept.prompt == ({"role": "user", "content": "Roses"},)
    assert kept.completion is not None
    assert kept.completion["content"] == served.engine.behaviour.text


def test_an_engine_with_ids_of_its_own_loses_no_row(served: Served) -> None:
    served.engine.behaviour.constant_id = "chatcmpl-always-the-same"
    for _ in range(2):
        served.client.post(CHAT, json=QUESTION)
    seen = {headers["x-request-id"] for headers in served.engine.seen_headers}
    assert len({served.stored(f"chatcmpl-{suffix}").id for suffix in seen}) == 2


def test_too_many_at_once(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    with serving(make_settings(max_in_flight=1, queue={"max_waiting": 0}), engine) as served:
        client = served.client
        client.get("/metrics")
        before = n_requests("overloaded", variant="none")
        engine.behaviour.gap_s = 1.0
        with client.stream("POST", CHAT, json=STREAM) as first:
            chunks = first.iter_raw()
            next(chunks)
            refused = client.post(CHAT, json=QUESTION)
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert b"[DONE]" in b"".join(chunks)
        client.get("/metrics")
        assert n_requests("overloaded", variant="none") - before == 1


def test_a_client_that_stops_reading_frees_the_engine(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    """A slow reader is not the engine's failure: it must not count against the variant that served it."""
    with serving(make_settings(timeouts={"stalled_reader_s": 0.3}), engine) as served:
        engine.behaviour.text, engine.behaviour.n_chunks = "x" * 20_000_000, 200
        engine.behaviour.gap_s = 0.03  # Or it may be done before anybody stops it: systems buffer tens of megabytes.
        with raw_request(served.url, STREAM) as connection:
            connection.recv(100)
            eventually(lambda: engine.n_aborted)
            kept = served.last_stored()
        assert (kept.status, kept.is_complete) == (Status.CLIENT_DISCONNECTED, False)
