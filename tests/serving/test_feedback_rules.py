"""Feedback's finer rules: tokens and whose vote they are, what comes twice, what comes early, what is not kept."""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.mining import mine_alias
from feedback.standing import Last
from feedback.store import load_pairs
from pawl import ids
from pawl.settings import Settings
from serving.feedback_api import TICK_S, _after
from tests.fake_vllm import FakeVLLM
from tests.servers import PostgreSQL
from tests.serving.conftest import Served, serving
from tests.serving.held_drain import hold
from tests.serving.keyed import bearer, keyed_gateway
from tests.serving.talk import CHAT, QUESTION, error_of
from tests.serving.test_feedback import ADA, EVE, ask, events_on, rate
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
SECRET_WORDS = "words that nobody may keep"


@pytest.fixture
def served(served_once: Served) -> Served:
    """Feedback comes to the same code through both lanes, as `test_feedback` shows."""
    return served_once


def ask_for_token(served: Served, headers: Mapping[str, str] = ADA) -> tuple[str, str]:
    """A stored completion and the token to rate it."""
    response = served.client.post(CHAT, json=QUESTION, headers=dict(headers))
    completion_id = str(response.json()["id"])
    served.stored(completion_id)
    return completion_id, response.headers["x-pawl-feedback-token"]


def by_token(client: httpx2.Client, token: str, **body: Any) -> httpx2.Response:
    return client.post("/v1/feedback", json=body, headers={"x-pawl-feedback-token": token})


# ---- tokens ----


def test_a_token_alone_says_which_completion(served: Served) -> None:
    completion_id, token = ask_for_token(served)
    taken = by_token(served.client, token, type="thumbs", value="up")
    assert (taken.status_code, taken.json()["completion_id"]) == (201, completion_id)
    nameless = served.client.post("/v1/feedback", json={"type": "thumbs", "value": "up"}, headers=ADA)
    assert (nameless.status_code, error_of(nameless)["param"]) == (400, "completion_id")


def test_a_choice_by_tokens_takes_one_for_each_side(served: Served) -> None:
    (rated, first), (other, second) = ask_for_token(served), ask_for_token(served)
    choice = {"completion_id": rated, "type": "choice", "value": other}
    assert by_token(served.client, first, **choice).status_code == 401
    assert by_token(served.client, f"{first}, {second}", **choice).status_code == 201
    _, foreign = ask_for_token(served, EVE)
    assert by_token(served.client, f"{first},{foreign}", **choice).status_code == 401


def test_a_token_in_the_place_of_a_key(served: Served) -> None:
    completion_id, token = ask_for_token(served)
    vote = {"completion_id": completion_id, "type": "thumbs", "value": "up"}
    assert served.client.post("/v1/feedback", json=vote, headers=bearer(token)).status_code == 201


def test_whoever_shows_a_token_votes_as_the_completions_owner(served: Served) -> None:
    completion_id, token = ask_for_token(served)
    headers = {"x-pawl-feedback-token": token, **EVE}
    body = {"completion_id": completion_id, "type": "thumbs", "value": "up", "user": "eve"}
    assert served.client.post("/v1/feedback", json=body, headers=headers).status_code == 201
    assert served.client.delete(f"/v1/feedback/fb_thumbs_{completion_id[9:]}", headers=headers).status_code == 200
    assert [event.user_id for event in events_on(served, completion_id, 2)] == ["ada", "ada"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, str]]]:
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), ["infer", "infer+feedback"]) as (served, keys):
        yield served, keys


def test_a_token_needs_no_key_and_counts_for_the_key_it_was_made_for(keyed: tuple[Served, dict[str, str]]) -> None:
    served, keys = keyed
    completion_id, token = ask_for_token(served, {**bearer(keys["infer"]), **ADA})
    assert by_token(served.client, token, type="thumbs", value="up").status_code == 201
    (event,) = events_on(served, completion_id, 1)
    assert (event.key_id, event.user_id) == (keys["infer"].split("-")[1], "ada")


# ---- who may ----


def test_foreign_and_forged_ids_are_told_without_looking_anything_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, own = ask(served, EVE), ask(served)
    forged = own[:-1] + ("0" if own[-1] != "0" else "1")

    def look_up(*_: object) -> None:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(served.gateway.desk._standings, "of", look_up)
    monkeypatch.setattr(served.gateway.spool, "submit", look_up)
    for completion_id in (foreign, forged):
        assert rate(served.client, completion_id, headers={"Idempotency-Key": "k"}).status_code == 404
        gone = served.client.delete(f"/v1/feedback/fb_thumbs_{completion_id[9:]}", headers=ADA)
        assert gone.status_code == 404
    assert rate(served.client, own, "choice", foreign).status_code == 404


# ---- what comes twice ----


def test_a_retraction_with_a_key_gets_the_first_answer_again(served: Served) -> None:
    completion_id, key = ask(served), {"Idempotency-Key": uuid.uuid4().hex, **ADA}
    feedback_id = rate(served.client, completion_id).json()["id"]
    first, again = (served.client.delete(f"/v1/feedback/{feedback_id}", headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.content == again.content
    assert served.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA).status_code == 404
    reused = rate(served.client, completion_id, headers=key)
    assert (reused.status_code, error_of(reused)["code"]) == (422, "idempotency_key_reused")


def test_a_key_is_honoured_across_a_restart(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    settings, key = make_settings(), {"Idempotency-Key": uuid.uuid4().hex}
    with serving(settings, engine) as served:
        completion_id = ask(served)
        first = rate(served.client, completion_id, headers=key)
        assert first.status_code == 201
    with serving(settings, engine) as served:
        again = rate(served.client, completion_id, headers=key)
        assert (again.status_code, again.content) == (201, first.content)
        assert rate(served.client, completion_id, value="down", headers=key).status_code == 422
        assert len(events_on(served, completion_id, 1)) == 1


def test_an_sdk_that_tries_again_votes_once(served: Served) -> None:
    completion_id = ask(served)
    first = rate(served.client, completion_id, headers={"x-stainless-retry-count": "0"})
    assert rate(served.client, completion_id, value="down", headers={"x-stainless-retry-count": "0"}).status_code == 200
    late = rate(served.client, completion_id, headers={"x-stainless-retry-count": "1"})
    assert (late.status_code, late.content) == (201, first.content)
    assert [event.value for event in events_on(served, completion_id, 2)] == ['"up"', '"down"']


def test_the_same_again_in_earnest_counts_again(served: Served) -> None:
    completion_id = ask(served)
    first = {"x-stainless-retry-count": "0"}
    for value, status in (("up", 201), ("down", 200), ("up", 200)):
        assert rate(served.client, completion_id, value=value, headers=first).status_code == status
    assert events_on(served, completion_id, 3)[-1].value == '"up"'


def test_a_retry_whose_first_attempt_never_arrived_is_taken(served: Served) -> None:
    assert rate(served.client, ask(served), headers={"x-stainless-retry-count": "2"}).status_code == 201


DELIVERIES = st.lists(
    st.tuples(st.sampled_from(["thumbs", "rating", "gone"]), st.integers(1, 5)), min_size=1, max_size=4
).flatmap(
    lambda calls: st.permutations([(number, kind) for number, (kind, times) in enumerate(calls) for _ in range(times)])
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(DELIVERIES)
def test_calls_that_come_many_times_in_any_order_count_once(served: Served, deliveries: list[tuple[int, str]]) -> None:
    """The state is that of the model: each call counts when it first comes."""
    completion_id, run = ask(served), uuid.uuid4().hex
    model: dict[str, Any] = {}
    seen: dict[int, tuple[int, bytes]] = {}
    for number, kind in deliveries:
        value = {"thumbs": "down" if number % 2 else "up", "rating": number / 8}.get(kind)
        headers = {**ADA, "Idempotency-Key": f"{run}-{number}"}
        if kind == "gone":
            answer = served.client.delete(f"/v1/feedback/fb_thumbs_{completion_id[9:]}", headers=headers)
        else:
            answer = rate(served.client, completion_id, kind, value, headers=headers)
        if number not in seen and answer.status_code < 300:
            model[kind if kind != "gone" else "thumbs"] = value
        if answer.status_code < 300:
            assert seen.setdefault(number, (answer.status_code, answer.content)) == (answer.status_code, answer.content)
    events = events_on(served, completion_id, len(seen))
    assert len(events) == len(seen)
    last = {event.type: event.value for event in sorted(events, key=lambda e: (e.created_at, e.id))}
    assert {kind: value for kind, value in last.items() if value != "null"} == {
        kind: f'"{value}"' if kind == "thumbs" else str(float(value))
        for kind, value in model.items()
        if value is not None
    }


def test_many_at_once_with_one_key_keep_one_event(served: Served) -> None:
    completion_id, key = ask(served), {"Idempotency-Key": uuid.uuid4().hex}
    answers: list[httpx2.Response] = []

    def send() -> None:
        with httpx2.Client(base_url=served.url, timeout=20) as client:
            answers.append(rate(client, completion_id, headers=key))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
    assert rate(served.client, completion_id, value="down").status_code == 200
    assert len(events_on(served, completion_id, 2)) == 2


def test_a_later_vote_is_later_whatever_the_clock_says() -> None:
    assert _after(None, 5.0) == 5.0
    assert _after(Last(4.0, is_retraction=False), 5.0) == 5.0
    now = time.time()
    ahead = Last(now + 3600.0, is_retraction=True)
    assert ahead.at < _after(ahead, now) <= ahead.at + 2 * TICK_S


def test_a_vote_after_one_by_a_gateway_whose_clock_is_ahead_counts(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion_id, desk = ask(served), served.gateway.desk
    monkeypatch.setattr(desk, "_clock", lambda: time.time() + 600.0)
    assert rate(served.client, completion_id).status_code == 201
    monkeypatch.undo()
    assert rate(served.client, completion_id, value="down").status_code == 200
    assert [event.value for event in events_on(served, completion_id, 2)] == ['"up"', '"down"']


# ---- what is not visible yet ----


def test_a_vote_that_another_gateway_has_just_taken_can_be_taken_back(
    make_settings: MakeSettings, engine: FakeVLLM
) -> None:
    with serving(make_settings(), engine) as here, serving(make_settings(), engine) as there:
        completion_id = ask(here)
        release = threading.Event()
        hold(there.gateway.drain, release)
        feedback_id = rate(there.client, completion_id).json()["id"]
        gone = here.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA)
        assert (gone.status_code, gone.json()["deleted"]) == (202, True)
        release.set()
        events = events_on(here, completion_id, 2)
        assert [event.is_retraction for event in events] == [False, True]
        assert here.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA).status_code == 404


def test_an_early_vote_by_token_is_that_of_whoever_got_the_answer(
    make_settings: MakeSettings, engine: FakeVLLM, database_url: str
) -> None:
    with serving(make_settings(database_url), engine) as served:
        release = threading.Event()
        hold(served.gateway.journal_drain, release)
        rated = []
        for owner, value in ((ADA, "up"), (EVE, "down")):
            engine.behaviour.text = f"An answer that somebody gives a thumb {value}."
            asked = served.client.post(CHAT, json=QUESTION, headers=owner)
            completion_id, token = str(asked.json()["id"]), asked.headers["x-pawl-feedback-token"]
            rated.append(completion_id)
            assert by_token(served.client, token, type="thumbs", value=value).status_code in (201, 202)
            (event,) = events_on(served, completion_id, 1)
            assert event.user_id is None, "nobody could be looked up"
        release.set()
        for completion_id in rated:
            served.stored(completion_id)
        assert mine_alias(served.gateway.database, "assistant", time.time()).by_source == {"thumbs": 1}
        (pair,) = load_pairs(served.gateway.database, "assistant")
        assert pair.principals == ("/ada", "/eve")


def test_feedback_is_taken_back_while_the_database_is_down(
    make_settings: MakeSettings, engine: FakeVLLM, own_postgresql: PostgreSQL
) -> None:
    with serving(make_settings(own_postgresql.create_database("down")), engine) as served:
        completion_id = ask(served)
        feedback_id = rate(served.client, completion_id).json()["id"]
        events_on(served, completion_id, 1)
        own_postgresql.stop()
        served.gateway.desk._standings._here.clear()  # As in a gateway that has started since.
        assert served.client.delete(f"/v1/feedback/{feedback_id}", headers=ADA).status_code == 202
        own_postgresql.start()
        assert events_on(served, completion_id, 2)[-1].is_retraction


# ---- what is not kept ----


def spoken(client: httpx2.Client, completion_id: str, kind: str) -> httpx2.Response:
    value = SECRET_WORDS if kind in ("edit", "comment") else "down"
    tags = {"note": SECRET_WORDS}
    return rate(client, completion_id, kind, value, reason=SECRET_WORDS, comment=SECRET_WORDS, tags=tags)


def is_silent(served: Served, completion_id: str) -> bool:
    return not any(event.comment for event in events_on(served, completion_id, 1))


def assert_silent(event: Any, kind: str) -> None:
    assert (event.type, event.reason, event.comment, event.tags) == (kind, None, None, None)
    assert event.value == ('""' if kind in ("edit", "comment") else '"down"')


@pytest.mark.parametrize("kind", ["edit", "comment", "thumbs"])
def test_on_a_completion_of_which_nothing_is_stored_only_the_signal_is(served: Served, kind: str) -> None:
    asked = served.client.post(CHAT, json={**QUESTION, "store": False}, headers=ADA)
    completion_id = str(asked.json()["id"])
    assert not served.stored(completion_id).is_stored
    taken = spoken(served.client, completion_id, kind)
    assert taken.status_code == 201
    (event,) = events_on(served, completion_id, 1)
    assert_silent(event, kind)


def test_words_that_come_before_such_a_completion_go_when_it_arrives(
    make_settings: MakeSettings, engine: FakeVLLM, database_url: str
) -> None:
    with serving(make_settings(database_url), engine) as served:
        for kind, drain in (
            ("edit", served.gateway.journal_drain),  # The completion is late.
            ("comment", served.gateway.drain),  # The words are.
        ):
            release = threading.Event()
            hold(drain, release)
            asked = served.client.post(CHAT, json={**QUESTION, "store": False}, headers=ADA)
            completion_id = str(asked.json()["id"])
            assert spoken(served.client, completion_id, kind).status_code == 201
            if kind == "edit":
                events_on(served, completion_id, 1)
            release.set()
            served.stored(completion_id)
            events_on(served, completion_id, 1)
            eventually(partial(is_silent, served, completion_id))
            assert_silent(events_on(served, completion_id, 1)[0], kind)


def test_words_and_names_leave_this_machines_disk(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.drain.TIDY_EVERY_S", 0.2)
    with serving(make_settings(), engine) as served:
        completion_id = ask(served)
        key = {"Idempotency-Key": "k", "x-pawl-user": "ada"}
        assert rate(served.client, completion_id, "edit", SECRET_WORDS, headers=key).status_code == 201
        (event,) = events_on(served, completion_id, 1)
        assert SECRET_WORDS in event.value
        spool = served.gateway.spool
        rows = spool.submit(lambda c: c.execute("SELECT * FROM repeats").fetchall()).result(10)
        assert len(rows) == 1
        eventually(lambda: not found_in_files(served, SECRET_WORDS.encode()), within_s=60)


def found_in_files(served: Served, words: bytes) -> bool:
    path = served.gateway.spool.path
    return any(words in file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def test_expired_answers_are_forgotten(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    completion_id, key = ask(served), {"Idempotency-Key": uuid.uuid4().hex}
    assert rate(served.client, completion_id, headers=key).status_code == 201
    day = 24 * 3600.0
    monkeypatch.setattr(served.gateway.desk, "_clock", lambda: time.time() + day + 60)
    monkeypatch.setattr(served.gateway.desk, "_join_window_s", 2 * day)
    assert rate(served.client, completion_id, value="down", headers=key).status_code == 200

    def count(connection: sqlite3.Connection) -> int:
        return int(
            connection.execute("SELECT count(*) FROM repeats WHERE until < ?", (time.time() + day,)).fetchone()[0]
        )

    assert served.gateway.spool.submit(count).result(10) == 0


def test_what_stands_is_read_from_history(served: Served) -> None:
    completion_id = ask(served)
    for value in ("up", "down"):
        rate(served.client, completion_id, value=value)
    served.gateway.desk._standings._here.clear()
    assert len(events_on(served, completion_id, 2)) == 2
    assert rate(served.client, completion_id, value="up").status_code == 200
    suffix = ids.completion_suffix(completion_id)
    events = events_on(served, completion_id, 3)
    assert {event.interaction_id for event in events} == {suffix}
    assert events[-1].value == '"up"'
