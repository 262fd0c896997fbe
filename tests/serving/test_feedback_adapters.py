"""Applications written for TensorZero or Langfuse send their feedback here unchanged, but for the address."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pawl.settings import Settings
from serving.feedback_adapters import MOST_EVENTS
from tests.fake_vllm import FakeVLLM
from tests.servers import free_port, running
from tests.serving.conftest import Served, serving
from tests.serving.keyed import add_key, bearer
from tests.serving.talk import CHAT, QUESTION
from tests.serving.test_feedback import events_on

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


def tensorzero(client: httpx2.Client, inference_id: str, name: str, value: Any, **more: Any) -> httpx2.Response:
    return client.post("/feedback", json={"inference_id": inference_id, "metric_name": name, "value": value, **more})


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


def test_a_batch_that_comes_again_counts_once(place: tuple[Served, str], client: httpx2.Client) -> None:
    completion_id = ask(place).json()["id"]
    late = {"batch": [event({"traceId": completion_id, "name": "user-feedback", "value": 1})]}
    assert client.post("/api/public/ingestion", json=late).json()["errors"] == []
    assert tensorzero(client, completion_id, "draft_accepted", False).status_code == 200
    again = client.post("/api/public/ingestion", json=late).json()
    assert (len(again["successes"]), again["errors"]) == (1, [])
    assert kept(place, completion_id, 2) == [("thumbs", '"up"'), ("thumbs", '"down"')]


def test_a_batch_is_bounded(client: httpx2.Client) -> None:
    batches: list[Any] = [[event({})] * (MOST_EVENTS + 1), "x", None, {}]
    for batch in batches:
        refused = client.post("/api/public/ingestion", json={"batch": batch})
        assert (refused.status_code, set(refused.json())) == (400, {"message", "error"})
    assert client.post("/api/public/ingestion", json={"batch": []}).json() == {"successes": [], "errors": []}
