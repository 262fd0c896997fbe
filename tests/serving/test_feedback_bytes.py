"""Whatever a client can put into feedback is stored and comes back the same, on both databases; or is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.signals import MAX_TEXT_CHARS
from feedback.spool import SpoolRecord
from monitoring.metrics import DEAD_LETTERS
from pawl import ids
from pawl.clock import now
from pawl.schema import dead_letters, feedback_events
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.feedback.test_recording import ANY_TEXT
from tests.serving.conftest import Served, serving
from tests.serving.held_drain import hold
from tests.serving.talk import error_of
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
JSON = {"content-type": "application/json", "x-pawl-user": "ada"}
WORDS = ANY_TEXT.filter(str.strip)
TAGS = st.dictionaries(
    st.text(st.characters(codec=None, categories=None), min_size=1, max_size=20), ANY_TEXT, max_size=3
)


@pytest.fixture
def served_on(make_settings: MakeSettings, engine: FakeVLLM, database_url: str) -> Iterator[Served]:
    """A gateway on each kind of database."""
    with serving(make_settings(database_url), engine) as served:
        yield served


def own_completion(served: Served) -> str:
    """A genuine id of Ada's; nobody has served it, and nobody knows that."""
    unique = ids.uuid7(now(), os.urandom(10))
    return "chatcmpl-" + ids.make_completion_suffix(served.gateway.secret, unique, ids.Principal(user="ada"))


def send(served: Served, body: Mapping[str, Any]) -> httpx2.Response:
    """As a browser would: what UTF-8 cannot carry is escaped."""
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return served.client.post("/v1/feedback", content=raw, headers=JSON)


def stored(served: Served, completion_id: str) -> Mapping[str, Any]:
    """The one event on a completion, as the database has it."""
    query = sa.select(feedback_events).where(feedback_events.c.completion_id == completion_id)

    def look() -> Mapping[str, Any] | None:
        with served.gateway.database.read() as connection:
            found = connection.execute(query).mappings().first()
        return {str(name): value for name, value in found.items()} if found else None

    return eventually(look, within_s=60)


def text_in(row: Mapping[str, Any], name: str) -> Any:
    return json.loads(row[name])


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(["edit", "comment"]), value=WORDS, reason=WORDS, comment=WORDS, tags=TAGS)
def test_any_text_comes_back_as_it_was(
    served_on: Served, kind: str, value: str, reason: str, comment: str, tags: dict[str, str]
) -> None:
    completion_id = own_completion(served_on)
    body = {"type": kind, "value": value, "reason": reason, "comment": comment, "tags": tags}
    taken = send(served_on, {"completion_id": completion_id, **body})
    assert taken.status_code == 202, taken.text
    assert json.loads(taken.content)["value"] == value
    row = stored(served_on, completion_id)
    assert {name: text_in(row, name) for name in ("value", "reason", "comment", "tags")} == {
        name: body[name] for name in ("value", "reason", "comment", "tags")
    }


@pytest.mark.parametrize(
    "text",
    [
        "x" * MAX_TEXT_CHARS,
        "é" * 500_000,
        "\x00" * 200_000,
        "\ud800" * 200_000,
        "'; DROP TABLE pairs; --",
        "%s %(a)s :a",
    ],
    ids=["1 MB", "1 MB of two bytes each", "NUL", "lone surrogates", "SQL", "placeholders"],
)
def test_long_and_hard_texts_come_back_as_they_were(served_on: Served, text: str) -> None:
    completion_id = own_completion(served_on)
    taken = send(served_on, {"completion_id": completion_id, "type": "edit", "value": text})
    assert taken.status_code == 202, taken.text
    assert json.loads(taken.content)["value"] == text
    assert text_in(stored(served_on, completion_id), "value") == text


def test_an_idempotent_repetition_of_a_hard_text_is_answered_alike(served: Served) -> None:
    body = json.dumps({"completion_id": own_completion(served), "type": "edit", "value": "\ud800\x00"}).encode()
    headers = {**JSON, "Idempotency-Key": os.urandom(8).hex()}
    first, again = (served.client.post("/v1/feedback", content=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.content == again.content


@pytest.mark.parametrize(
    "value",
    [
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        b"1" + b"0" * 400,
        b"18446744073709551616",
        b"-0.1",
        b"1.5",
    ],
)
def test_numbers_that_are_no_ratings_are_refused(served: Served, value: bytes) -> None:
    completion_id = own_completion(served).encode()
    raw = b'{"completion_id": "%s", "type": "rating", "value": %s}' % (completion_id, value)
    refused = served.client.post("/v1/feedback", content=raw, headers=JSON)
    assert refused.status_code == 400
    assert error_of(refused)["code"] in ("invalid_json", "invalid_feedback")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"value": "\xed\xa0\x80"}',
        b'{"value": "\xff"}',
        b"\x00",
        b'{"value": "\\ud800", "type": NaN}',
        b'{"value": "\\ud800"' + b"[" * 100_000,
        b'{"value": "\\ud800", "n": ' + b"9" * 5_000 + b"}",
        b'{"type": "edit", "type": "thumbs"}',
    ],
)
def test_bytes_that_are_no_feedback_are_refused(served: Served, raw: bytes) -> None:
    refused = served.client.post("/v1/feedback", content=raw, headers=JSON)
    assert refused.status_code == 400
    assert error_of(refused)["message"]


@pytest.mark.parametrize("text", [" \n\t", ""])
def test_texts_that_say_nothing_are_refused(served: Served, text: str) -> None:
    for name, body in (("value", {"value": text}), ("comment", {"value": "fine", "comment": text})):
        refused = send(served, {"completion_id": own_completion(served), "type": "edit", **body})
        assert (refused.status_code, error_of(refused)["param"]) == (400, name)


def bad_record(name: str, meta: bytes) -> SpoolRecord:
    return SpoolRecord(0, "feedback", name, name, 1.0, meta, None, None)


def test_one_bad_record_is_put_aside_and_its_batch_commits(served_on: Served) -> None:
    gateway, release, dead_before = served_on.gateway, threading.Event(), DEAD_LETTERS._value.get()
    hold(gateway.drain, release)
    good = [own_completion(served_on) for _ in range(10)]
    for number, completion_id in enumerate(good):
        body = {"completion_id": completion_id, "type": "edit", "value": f"\x00\ud800 {number}"}
        assert send(served_on, body).status_code == 202
        if number == 4:
            gateway.spool.append(bad_record("unreadable", b"\xff\x00{")).result(10)
            gateway.spool.append(bad_record("unfit", json.dumps({"id": "x", "nobody": 1}).encode())).result(10)
    release.set()
    for number, completion_id in enumerate(good):
        assert text_in(stored(served_on, completion_id), "value") == f"\x00\ud800 {number}"

    def letters() -> list[Any] | None:
        with gateway.database.read() as connection:
            found = connection.execute(sa.select(dead_letters).order_by(dead_letters.c.id)).all()
        return list(found) if len(found) == 2 else None

    unfit, unreadable = eventually(letters, within_s=60)
    assert (unfit.id, unfit.reason) == ("feedback-unfit", "TypeError")
    assert (unreadable.id, unreadable.kind) == ("feedback-unreadable", "feedback")
    assert unreadable.payload.startswith("\\xff\\x00{")
    eventually(lambda: DEAD_LETTERS._value.get() == dead_before + 2)
    assert gateway.spool.size().result(10).rows == 0
