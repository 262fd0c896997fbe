"""Feedback: who may give it, what it answers, and that nothing accepted goes missing."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from feedback.signals import latest
from pawl import ids
from pawl.schema import feedback_events
from pawl.settings import Settings
from serving import feedback_standing
from tests.fake_vllm import FakeVLLM
from tests.feedback.whole_history import whole_history
from tests.servers import PostgreSQL
from tests.serving.conftest import Served, serving
from tests.serving.held_drain import hold
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
ADA = {"x-pawl-user": "ada"}
EVE = {"x-pawl-user": "eve"}


def ask(served: Served, headers: Mapping[str, str] = ADA) -> str:
    """A completion of Ada's that the database has."""
    completion_id = str(served.client.post(CHAT, json=QUESTION, headers=dict(headers)).json()["id"])
    served.stored(completion_id)
    return completion_id


def rate(
    client: httpx2.Client, completion_id: str, kind: str = "thumbs", value: Any = "up", **extra: Any
) -> httpx2.Response:
    headers = {**ADA, **extra.pop("headers", {})}
    body = {"completion_id": completion_id, "type": kind, "value": value, **extra}
    return client.post("/v1/feedback", json=body, headers=headers)


def events_on(served: Served, completion_id: str, n: int) -> list[Any]:
    """The `n` events on a completion that the database has, oldest first."""
    query = sa.select(feedback_events).where(feedback_events.c.completion_id == completion_id)

    def look() -> list[Any] | None:
        with served.gateway.database.read() as connection:
            found = connection.execute(query.order_by(feedback_events.c.created_at)).all()
        return list(found) if len(found) >= n else None

    return eventually(look)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("thumbs", "up"),
        ("thumbs", "down"),
        ("rating", 0.75),
        ("rating", 0),
        ("edit", "Water them \x00 at dawn 🌹"),
        ("report", "harmful"),
        ("report", "wrong"),
        ("report", "refused"),
        ("report", "other"),
        ("copy", True),
        ("comment", "thanks"),
    ],
)
def test_every_type_is_taken_once_and_then_replaced(served: Served, kind: str, value: Any) -> None:
    completion_id = ask(served)
    asked_at = int(time.time())
    first = rate(served.client, completion_id, kind, value, reason="r", comment="c", tags={"screen": "chat"})
    assert first.status_code == 201
    answer = first.json()
    assert asked_at <= answer.pop("created") <= time.time()
    assert answer == {
        "id": f"fb_{kind}_{ids.completion_suffix(completion_id)}",
        "object": "feedback",
        "completion_id": completion_id,
        "type": kind,
        "value": value,
    }
    assert rate(served.client, completion_id, kind, value).status_code == 200
    assert len(events_on(served, completion_id, 2)) == 2
    assert rate(served.client, completion_id, kind, value).status_code == 200


@pytest.mark.parametrize("kind", ["choice", "regenerate"])
def test_another_completion_as_the_value(served: Served, kind: str) -> None:
    rated, other, foreign = ask(served), ask(served), ask(served, EVE)
    assert rate(served.client, rated, kind, other).status_code == 201
    refused = rate(served.client, rated, kind, foreign)
    assert (refused.status_code, error_of(refused)["param"]) == (404, "value")
    assert rate(served.client, rated, kind, "chatcmpl-1").status_code == 400
    assert rate(served.client, rated, kind, rated).status_code == 400
    itself = rate(served.client, rated, kind, rated.replace("chatcmpl-", "cmpl-"))
    assert (itself.status_code, error_of(itself)["param"]) == (400, "value")


@pytest.mark.parametrize(
    ("kind", "value"),
    [("thumbs", "UP"), ("rating", 1.01), ("rating", True), ("copy", False), ("report", ""), ("edit", ""), ("like", 1)],
)
def test_values_that_are_wrong_leave_nothing_behind(served: Served, kind: str, value: Any) -> None:
    completion_id = ask(served)
    assert rate(served.client, completion_id, kind, value).status_code == 400
    rate(served.client, completion_id)
    assert len(events_on(served, completion_id, 1)) == 1


def test_the_last_value_counts_and_history_stays(served: Served) -> None:
    completion_id = ask(served)
    feedback_id = rate(served.client, completion_id).json()["id"]
    assert rate(served.client, completion_id, value="down").status_code == 200
    gone = served.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA)
    assert (gone.status_code, gone.json()["deleted"]) == (200, True)
    again = served.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA)
    assert (again.status_code, error_of(again)["code"]) == (404, "feedback_not_found")
    history = events_on(served, completion_id, 3)
    assert [event.value for event in history] == ['"up"', '"down"', "null"]
    _, events = whole_history(served.gateway.database, "assistant")
    assert feedback_id not in latest(events)
    assert rate(served.client, completion_id).status_code == 201


def test_only_the_owner_retracts(served: Served) -> None:
    feedback_id = rate(served.client, ask(served)).json()["id"]
    assert served.client.delete(f"/v1/feedback/{feedback_id}", headers=EVE).status_code == 404
    assert served.client.delete(f"/v1/feedback/{feedback_id}").status_code == 200


def test_forged_and_foreign_ids_look_alike(served: Served) -> None:
    foreign = ask(served, EVE)
    forged = foreign[:-1] + ("0" if foreign[-1] != "0" else "1")
    unmade = "chatcmpl-" + "0" * 48
    answers = [rate(served.client, completion_id) for completion_id in (foreign, forged, unmade)]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert len({answer.content for answer in answers}) == 1
    assert len({frozenset(answer.headers) for answer in answers}) == 1


def test_the_body_may_name_the_user(served: Served) -> None:
    completion_id = ask(served)
    body = {"completion_id": completion_id, "type": "thumbs", "value": "up"}
    assert served.client.post("/v1/feedback", json={**body, "user": "eve"}).status_code == 404
    assert served.client.post("/v1/feedback", json={**body, "user": "ada"}).status_code == 201
    assert served.client.post("/v1/feedback", json=body).status_code == 200  # Nobody named: the key's own caller.


def test_feedback_while_the_answer_still_streams(served: Served) -> None:
    served.engine.behaviour.gap_s = 1.0
    with served.client.stream("POST", CHAT, json=STREAM, headers=ADA) as response:
        chunks = response.iter_raw()
        next(chunks)
        completion_id = "chatcmpl-" + served.engine.seen_headers[-1]["x-request-id"]
        with httpx2.Client(base_url=served.url, timeout=20) as another:
            assert rate(another, completion_id).status_code == 202
        served.engine.behaviour.gap_s = 0.0
        assert b"[DONE]" in b"".join(chunks)
    served.stored(completion_id)
    assert len(events_on(served, completion_id, 1)) == 1
    assert rate(served.client, completion_id).status_code == 200


def test_feedback_on_what_another_gateway_has_not_drained_yet(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    with serving(make_settings(), engine) as here, serving(make_settings(), engine) as there:
        release = threading.Event()
        for served in (here, there):  # Either may be the one that drains the journals of both.
            hold_the_drain(served, release)
        completion_id = str(there.client.post(CHAT, json=QUESTION, headers=ADA).json()["id"])
        assert rate(here.client, completion_id).status_code == 202
        assert len(events_on(here, completion_id, 1)) == 1
        release.set()
        assert here.stored(completion_id).user_id == "ada"
        assert rate(here.client, completion_id, value="down").status_code == 200
        assert len(events_on(here, completion_id, 2)) == 2
        found, events = whole_history(here.gateway.database, "assistant")
        assert [interaction.completion_id for interaction in found] == [completion_id]
        assert [event.value for event in latest(events).values()] == ["down"]


def test_what_sqlite_knows_is_waited_for_while_its_disk_stalls(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_standing, "LOOK_UP_S", 0.05)
    with serving(make_settings(), engine) as here, serving(make_settings(), engine) as there:
        completion_id = ask(there)
        with here.gateway.database.engine.connect() as committing:
            committing.exec_driver_sql("ROLLBACK")
            committing.exec_driver_sql("BEGIN EXCLUSIVE")
            let_go = threading.Timer(0.5, committing.connection.rollback)
            let_go.start()
            assert rate(here.client, completion_id).status_code == 201
            let_go.join()


def hold_the_drain(served: Served, release: threading.Event) -> None:
    """From now on completions stay in the journals until `release`."""
    hold(served.gateway.journal_drain, release)


def test_an_old_completion_that_nobody_stores(served: Served) -> None:
    owner = ids.Principal(user="ada")
    unique = ids.uuid7(time.time() - 7200, bytes(10))
    completion_id = "chatcmpl-" + ids.make_completion_suffix(served.gateway.secret, unique, owner)
    response = rate(served.client, completion_id)
    assert (response.status_code, error_of(response)["code"]) == (404, "completion_not_found")


def test_a_feedback_token_stands_for_its_owner(served: Served) -> None:
    response = served.client.post(CHAT, json=QUESTION, headers=ADA)
    token = {"x-pawl-feedback-token": response.headers["x-pawl-feedback-token"], "x-pawl-user": ""}
    completion_id = response.json()["id"]
    served.stored(completion_id)
    taken = rate(served.client, completion_id, headers=token)
    assert taken.status_code == 201
    assert served.client.delete(f"/v1/feedback/{taken.json()['id']}", headers=token).status_code == 200
    other = rate(served.client, ask(served), headers=token)
    assert (other.status_code, error_of(other)["code"]) == (401, "invalid_token")


@pytest.mark.parametrize("token", ["", "x", "ffffffff.x.y", "zz", "1." + "0" * 48 + "." + "0" * 32])
def test_a_feedback_token_that_is_none(served: Served, token: str) -> None:
    assert rate(served.client, ask(served), headers={"x-pawl-feedback-token": token}).status_code == 401


def test_a_feedback_token_that_has_expired(served: Served) -> None:
    completion_id = ask(served)
    token = ids.make_feedback_token(served.gateway.secret, completion_id.partition("-")[2], int(time.time()) - 1)
    assert rate(served.client, completion_id, headers={"x-pawl-feedback-token": token}).status_code == 401


def test_an_idempotency_key_gets_the_first_answer_again(served: Served) -> None:
    completion_id, key = ask(served), {"Idempotency-Key": uuid.uuid4().hex}
    first = rate(served.client, completion_id, headers=key)
    again = rate(served.client, completion_id, headers=key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    other = rate(served.client, completion_id, value="down", headers=key)
    assert (other.status_code, error_of(other)["code"]) == (422, "idempotency_key_reused")
    eves = rate(served.client, ask(served, EVE), headers={**key, **EVE})
    assert eves.status_code == 201
    assert len(events_on(served, completion_id, 1)) == 1


def test_an_idempotency_key_that_is_still_running(served: Served) -> None:
    completion_id, key = ask(served), {"Idempotency-Key": uuid.uuid4().hex}
    release = threading.Event()
    served.gateway.spool.submit(lambda _: release.wait(60))
    answers: list[int] = []
    slow = threading.Thread(target=lambda: answers.append(rate(served.client, completion_id, headers=key).status_code))
    slow.start()
    eventually(lambda: served.gateway.desk._turns)
    second = rate(served.client, completion_id, headers=key)
    release.set()
    slow.join(30)
    assert (second.status_code, answers) == (409, [201])


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_idempotency_key_that_is_wrong(served: Served, key: str) -> None:
    response = rate(served.client, ask(served), headers={"Idempotency-Key": key})
    assert (response.status_code, error_of(response)["param"]) == (400, "Idempotency-Key")


def test_feedback_is_taken_while_the_database_is_down(
    make_settings: MakeSettings, engine: FakeVLLM, own_postgresql: PostgreSQL
) -> None:
    url = own_postgresql.create_database("down")
    with serving(make_settings(url), engine) as served:
        before = ask(served)
        own_postgresql.stop()
        during = served.client.post(CHAT, json=QUESTION, headers=ADA).json()["id"]
        owner = ids.Principal(user="ada")
        long_ago = ids.make_completion_suffix(served.gateway.secret, ids.uuid7(time.time() - 7200, bytes(10)), owner)
        for ours in (before, during):  # This process made it a moment ago, so it knows without the database.
            assert rate(served.client, ours).status_code == 201
        assert rate(served.client, f"chatcmpl-{long_ago}").status_code == 202
        assert served.client.get("/health/ready").status_code == 200
        assert rate(served.client, "chatcmpl-" + "0" * 48).status_code == 404
        own_postgresql.start()
        for completion_id in (before, during):
            assert len(events_on(served, completion_id, 1)) == 1
        assert served.stored(during).prompt == tuple(QUESTION["messages"])
