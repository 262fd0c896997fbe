"""Applications written for TensorZero or Langfuse send their feedback here unchanged, but for the address."""

from __future__ import annotations

import base64
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pawl.settings import Settings
from serving import feedback_standing, feedback_uuids
from serving.feedback_adapters import MOST_EVENTS
from serving.routes import FEEDBACK_BODY_BYTES
from tests.fake_vllm import FakeVLLM
from tests.servers import free_port, running
from tests.serving.conftest import Served, serving
from tests.serving.keyed import add_key, bearer
from tests.serving.raw_server import request, said
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.test_feedback import events_on, hold_the_drain

ADA = {"x-pawl-user": "ada"}
EVE = {"x-pawl-user": "eve"}
NAMES = {"draft_accepted": {"signal": "thumbs"}, "stars": {"signal": "rating", "low": 1, "high": 5}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    directory: Path = tmp_path_factory.mktemp("adapters")
    engine = FakeVLLM("base-model")
    with running(engine.app) as engine_url:
        settings = Settings.model_validate(
            {
                "database": {"url": f"sqlite:///{directory}/shared.db"},
                "state_dir": str(directory / "state"),
                "auth": {"required": True},
                "serving": {
                    "port": free_port(),
                    "models": {"assistant": {"engines": [engine_url], "champion": "base-model"}},
                    "feedback_names": NAMES,
                },
            }
        )
        key = add_key(settings, "infer", "feedback")
        with serving(settings, engine) as served:
            yield served, key


@pytest.fixture
def client(place: tuple[Served, str]) -> Iterator[httpx2.Client]:
    served, key = place
    with httpx2.Client(base_url=served.url, headers={**bearer(key), **ADA}, timeout=30) as client:
        yield client


def ask(place: tuple[Served, str], user: dict[str, str] = ADA) -> httpx2.Response:
    """A stored completion."""
    served, key = place
    response = served.client.post(CHAT, json=QUESTION, headers={**bearer(key), **user})
    served.stored(response.json()["id"])
    return response


def tensorzero(
    client: httpx2.Client,
    inference_id: str,
    name: str,
    value: Any,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> httpx2.Response:
    body = {"inference_id": inference_id, "metric_name": name, "value": value, **more}
    return client.post("/feedback", json=body, headers=headers)


def kept(place: tuple[Served, str], completion_id: str, n: int) -> list[tuple[str, str]]:
    return [(event.type, event.value) for event in events_on(place[0], completion_id, n)]


# ---- TensorZero ----


def test_a_metric_of_an_inference_is_kept(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    taken = tensorzero(client, completion_id, "draft_accepted", True, tags={"author": "Alice"})
    assert taken.status_code == 200
    assert uuid.UUID(taken.json()["feedback_id"])
    again = tensorzero(client, completion_id, "draft_accepted", False)
    assert again.json() == taken.json()
    assert tensorzero(client, completion_id, "demonstration", "Like this.").status_code == 200
    assert kept(place, completion_id, 3) == [("thumbs", '"up"'), ("thumbs", '"down"'), ("edit", '"Like this."')]
    assert client.delete(f"/v1/feedback/{taken.json()['id']}").status_code == 200


def test_the_clients_uuid_of_an_inference_names_it(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    inference_id = str(uuid.UUID(completion_id.removeprefix("chatcmpl-")[:32]))
    assert tensorzero(client, inference_id, "stars", 5).status_code == 200
    assert kept(place, completion_id, 1) == [("rating", "1.0")]
    foreign = ask(place, EVE).json()["id"]
    answers = [
        tensorzero(client, str(uuid.UUID(foreign.removeprefix("chatcmpl-")[:32])), "stars", 5),
        tensorzero(client, str(uuid.uuid4()), "stars", 5),
        tensorzero(client, foreign, "stars", 5),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert len({answer.content for answer in answers}) == 1


def test_a_dry_run_says_what_would_be_and_keeps_nothing(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    dry = tensorzero(client, completion_id, "draft_accepted", True, dryrun=True)
    assert dry.status_code == 200
    assert tensorzero(client, "chatcmpl-1", "draft_accepted", True, dryrun=True).status_code == 400
    assert tensorzero(client, completion_id, "stars", 1).status_code == 200
    assert kept(place, completion_id, 1) == [("rating", "0.0")]
    wet = tensorzero(client, completion_id, "draft_accepted", True, dryrun=False)
    assert wet.json() == dry.json()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"metric_name": "draft_accepted", "value": true}',
        b'{"inference_id": "chatcmpl-1", "metric_name": "draft_accepted", "value": true}',
        b'{"inference_id": "chatcmpl-1", "metric_name": "unheard_of", "value": true}',
    ],
)
def test_tensorzeros_clients_can_read_why_not(client: httpx2.Client, body: bytes) -> None:
    refused = client.post("/feedback", content=body)
    assert refused.status_code == 400
    assert set(refused.json()) == {"error"}
    assert isinstance(refused.json()["error"], str)


def uuid_of(completion_id: str) -> str:
    return str(uuid.UUID(completion_id.removeprefix("chatcmpl-")[:32]))


def no_look_up(*_: Any) -> None:
    raise AssertionError("the database was asked")


def test_who_shows_a_token_is_answered_without_the_database(
    place: tuple[Served, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, _ = place
    asked, other = ask(place), ask(place)
    monkeypatch.setattr(feedback_uuids, "completion_of_uuid", no_look_up)
    tokens = [one.headers["x-pawl-feedback-token"] for one in (asked, other)]
    body = {"inference_id": uuid_of(asked.json()["id"]), "metric_name": "stars", "value": 5}
    stranger = {**body, "inference_id": str(uuid.uuid4())}
    forged = f"ffffffff.{asked.json()['id'].removeprefix('chatcmpl-')}.{'0' * 32}"
    for token, sent, status in (
        (tokens[0], body, 200),
        (f"{tokens[1]}, {tokens[0]}", body, 200),
        (tokens[1], body, 401),
        (forged, body, 401),
        ("garbage", body, 401),
        ("garbage", stranger, 401),
        ("", stranger, 401),
    ):
        answer = served.client.post("/feedback", json=sent, headers={"x-pawl-feedback-token": token})
        assert answer.status_code == status, (token, answer.text)
    assert kept(place, asked.json()["id"], 2) == [("rating", "1.0")] * 2


def test_a_uuid_of_what_is_not_stored_yet(place: tuple[Served, str], client: httpx2.Client) -> None:
    served, _ = place
    release = threading.Event()
    hold_the_drain(served, release)
    try:
        answered = client.post(CHAT, json=QUESTION).json()["id"]
        assert tensorzero(client, uuid_of(answered), "stars", 5).status_code == 200
        foreign = tensorzero(client, uuid_of(answered), "stars", 5, headers=EVE)
        assert foreign.status_code == 404
    finally:
        release.set()
    served.stored(answered)
    assert kept(place, answered, 1) == [("rating", "1.0")]


def test_a_uuid_of_what_is_being_answered(place: tuple[Served, str], client: httpx2.Client) -> None:
    served, _ = place
    served.engine.behaviour.gap_s = 1.0
    try:
        with client.stream("POST", CHAT, json=STREAM) as response:
            chunks = response.iter_raw()
            next(chunks)
            completion_id = "chatcmpl-" + served.engine.seen_headers[-1]["x-request-id"]
            with httpx2.Client(base_url=served.url, headers=client.headers, timeout=30) as another:
                assert tensorzero(another, uuid_of(completion_id), "stars", 5).status_code == 200
                assert tensorzero(another, uuid_of(completion_id), "stars", 5, headers=EVE).status_code == 404
            served.engine.behaviour.gap_s = 0.0
            assert b"[DONE]" in b"".join(chunks)
    finally:
        served.engine.behaviour.gap_s = 0.0
    served.stored(completion_id)
    assert kept(place, completion_id, 1) == [("rating", "1.0")]


def test_a_database_that_hangs_is_not_waited_for(client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(feedback_uuids, "completion_of_uuid", lambda *_: release.wait(60) and None)
    monkeypatch.setattr(feedback_standing, "LOOK_UP_ON_OWN_DISK_S", 0.1)
    try:
        answers = [tensorzero(client, str(uuid.uuid4()), "stars", 5) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [503, 503, 503]
        assert client.post(CHAT, json=QUESTION).status_code == 200
    finally:
        release.set()


# ---- Langfuse ----


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_a_score_is_kept_and_removed(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    score = {"id": "my-own", "traceId": completion_id, "name": "user-feedback", "value": 1, "comment": "good"}
    taken = client.post("/api/public/scores", json=score)
    assert taken.status_code == 200
    score_id = taken.json()["id"]
    assert client.delete(f"/api/public/scores/{score_id}").status_code == 200
    again = client.delete(f"/api/public/scores/{score_id}")
    assert (again.status_code, set(again.json())) == (404, {"message", "error"})
    events = events_on(place[0], completion_id, 2)
    assert [(event.value, event.comment, event.is_retraction) for event in events] == [
        ('"up"', '"good"', False),
        ("null", None, True),
    ]


def test_langfuses_clients_show_the_key_as_a_password(place: tuple[Served, str]) -> None:
    served, key = place
    completion_id = ask(place).json()["id"]
    score = {"traceId": completion_id, "name": "stars", "value": 3}
    for headers, status in (
        (basic("pk-lf-1", key), 200),
        (basic(key, "pk-lf-1"), 401),
        (basic("", ""), 401),
        ({"authorization": "Basic ???"}, 401),
        ({}, 401),
    ):
        answer = served.client.post("/api/public/scores", json=score, headers={**headers, **ADA})
        assert answer.status_code == status, headers
        assert status == 200 or set(answer.json()) == {"message", "error"}
    assert served.client.get("/v1/models", headers=basic("pk-lf-1", key)).status_code == 401


def test_a_browser_shows_a_token_as_its_key(place: tuple[Served, str]) -> None:
    served, _ = place
    asked = ask(place)
    score = {"traceId": asked.json()["id"], "name": "user-feedback", "value": 0}
    token = asked.headers["x-pawl-feedback-token"]
    assert served.client.post("/api/public/scores", json=score, headers=bearer(token)).status_code == 200
    assert kept(place, asked.json()["id"], 1) == [("thumbs", '"down"')]


def event(score: Any, kind: str = "score-create", event_id: Any = None) -> dict[str, Any]:
    return {"id": event_id or uuid.uuid4().hex, "timestamp": "2026-01-01T00:00:00Z", "type": kind, "body": score}


def test_of_a_batch_each_event_is_judged_by_itself(place: tuple[Served, str], client: httpx2.Client) -> None:
    own, foreign = ask(place).json()["id"], ask(place, EVE).json()["id"]
    batch: list[Any] = [
        event({"traceId": own, "name": "stars", "value": 5}),
        event({"traceId": foreign, "name": "stars", "value": 5}),
        event({"traceId": own, "name": "unheard_of", "value": 5}),
        event({"id": "t", "name": "chat"}, "trace-create"),
        event({"traceId": own, "name": "comment", "value": "fine", "dataType": "TEXT"}),
        {"id": "e"},
        "nothing",
    ]
    answer = client.post("/api/public/ingestion", json={"batch": batch, "metadata": {"sdk_name": "x"}})
    assert answer.status_code == 207
    told = answer.json()
    assert [(one["id"], one["status"]) for one in told["successes"]] == [(batch[0]["id"], 201), (batch[4]["id"], 201)]
    assert [one["status"] for one in told["errors"]] == [404, 400, 400, 400, 400]
    assert all(one["message"] for one in told["errors"])
    assert sorted(kept(place, own, 2)) == [("comment", '"fine"'), ("rating", "1.0")]


def test_a_batch_with_no_good_token_is_refused_as_a_whole(place: tuple[Served, str]) -> None:
    served, _ = place
    asked = ask(place)
    good = asked.headers["x-pawl-feedback-token"]
    batch = {"batch": [event({"traceId": asked.json()["id"], "name": "stars", "value": 5}), event({}, "trace-create")]}
    told = []
    for shown in ("NaN", f"{good[:-1]}x", f"NaN, {good}"):
        answer = served.client.post("/api/public/ingestion", json=batch, headers={"x-pawl-feedback-token": shown})
        told.append((answer.status_code, len(answer.json().get("successes", []))))
    assert told == [(401, 0), (401, 0), (207, 1)]


def test_a_batch_that_comes_again_counts_once(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    late = {"batch": [event({"traceId": completion_id, "name": "user-feedback", "value": 1})]}
    assert client.post("/api/public/ingestion", json=late).json()["errors"] == []
    assert tensorzero(client, completion_id, "draft_accepted", False).status_code == 200
    again = client.post("/api/public/ingestion", json=late).json()
    assert (len(again["successes"]), again["errors"]) == (1, [])
    assert kept(place, completion_id, 2) == [("thumbs", '"up"'), ("thumbs", '"down"')]


def test_an_id_may_hold_half_a_character(place: tuple[Served, str], client: httpx2.Client) -> None:
    own = ask(place).json()["id"]
    good = event({"traceId": own, "name": "stars", "value": 5}, event_id="\ud83d")
    wrong = event({"traceId": own, "name": "unheard_of \ud83d", "value": 5}, event_id="\ude00")
    answer = client.post("/api/public/ingestion", content=json.dumps({"batch": [good, wrong]}))
    assert answer.status_code == 207
    told = answer.json()
    assert [one["id"] for one in (*told["successes"], *told["errors"])] == ["\ud83d", "\ude00"]
    assert kept(place, own, 1) == [("rating", "1.0")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", {"a": 1}),
        ("dataType", ["TEXT"]),
        ("traceId", 7),
        ("comment", {"a": 1}),
        ("value", [1]),
        ("value", {"type": "text"}),
        ("metadata", {str(number): "x" for number in range(17)}),
        ("metadata", {"a": "x" * 513}),
        ("metadata", {"a": [[0] * 300] * 2}),
    ],
)
def test_a_score_of_trees_is_refused(client: httpx2.Client, field: str, value: Any) -> None:
    score = {"traceId": "chatcmpl-1", "name": "stars", "value": 5, field: value}
    refused = client.post("/api/public/ingestion", json={"batch": [event(score)]}).json()["errors"]
    assert [one["status"] for one in refused] == [400]
    assert f"'{field}'" in refused[0]["message"]
    assert client.post("/api/public/scores", json=score).status_code == 400


def test_tags_may_hold_small_trees(place: tuple[Served, str], client: httpx2.Client) -> None:
    own = ask(place).json()["id"]
    score = {"traceId": own, "name": "stars", "value": 5, "metadata": {"a": {"b": [1, 2]}, "c": "x" * 512}}
    assert client.post("/api/public/scores", json=score).status_code == 200
    assert kept(place, own, 1) == [("rating", "1.0")]


@pytest.mark.parametrize("path", ["/feedback", "/api/public/scores", "/api/public/ingestion"])
def test_a_body_is_as_long_as_feedback_may_be(place: tuple[Served, str], path: str) -> None:
    garbage = "x-pawl-feedback-token: garbage"
    longest = b"{" + b" " * (FEEDBACK_BODY_BYTES - 2) + b"}"
    announced = f"content-length: {FEEDBACK_BODY_BYTES + 1}"
    for sent, status in (
        (request(path, longest, garbage, "connection: close"), b"400"),
        (request(path, b"", garbage, "connection: close", announced), b"413"),
    ):
        assert said(place[0].address, sent).startswith(b"HTTP/1.1 " + status)


def test_a_batch_is_bounded(client: httpx2.Client) -> None:
    batches: list[Any] = [[event({})] * (MOST_EVENTS + 1), "x", None, {}]
    for batch in batches:
        refused = client.post("/api/public/ingestion", json={"batch": batch})
        assert (refused.status_code, set(refused.json())) == (400, {"message", "error"})
    assert client.post("/api/public/ingestion", json={"batch": []}).json() == {"successes": [], "errors": []}
