"""Whatever a client or a model can say is stored and comes back the same, on both databases; or is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response

from feedback.interactions import Interaction
from feedback.signals import MAX_TEXT_CHARS
from feedback.spool import SpoolRecord
from monitoring.metrics import DEAD_LETTERS
from pawl import ids
from pawl.clock import now
from pawl.schema import dead_letters, feedback_events
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.feedback.test_recording import ANY_TEXT, stream_of, whole
from tests.gateway_configuration import configuration_of
from tests.servers import PostgreSQL, running
from tests.serving.conftest import Served, serving
from tests.serving.held_drain import hold
from tests.serving.talk import CHAT, error_of
from tests.serving.waiting import eventually

JSON = {"content-type": "application/json", "x-pawl-user": "ada"}
WORDS = ANY_TEXT.filter(str.strip)
TAGS = st.dictionaries(
    st.text(st.characters(codec=None, categories=None), min_size=1, max_size=20), ANY_TEXT, max_size=3
)


class Blurting(FakeVLLM):
    """An engine that says the very bytes it is given."""

    def __init__(self) -> None:
        super().__init__("base-model")
        self.said = b""
        self.suffix = ""
        """Of the id of the completion that was asked for last."""

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.suffix = request.headers["x-request-id"]
        return Response(self.said, media_type="text/event-stream" if body.get("stream") else "application/json")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served_on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway on each kind of database."""
    directory, engine = tmp_path_factory.mktemp("bytes"), Blurting()
    with running(engine.app) as engine_url:
        configuration = configuration_of(directory, engine_url)
        if request.param == "postgresql":
            server: PostgreSQL = request.getfixturevalue("postgresql")
            configuration["database"]["url"] = server.create_database(f"bytes_{os.urandom(8).hex()}")
        with serving(Settings.model_validate(configuration), engine) as served:
            yield served


@pytest.fixture
def served(served_once: Served) -> Served:
    """What is refused is so before any database is asked."""
    return served_once


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


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
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


def answered(served: Served, question: str, said: bytes, *, is_stream: bool = False) -> Interaction:
    """What is stored of a question and of what the model said to it."""
    engine = served.engine
    assert isinstance(engine, Blurting)
    engine.said = said
    body = {"model": "assistant", "messages": [{"role": "user", "content": question}], "stream": is_stream}
    relayed = served.client.post(CHAT, json=body, headers={"x-pawl-user": "ada"})
    assert relayed.status_code == 200, relayed.text
    return served.stored(f"chatcmpl-{engine.suffix}")


def is_sound(text: str) -> bool:
    """Whether UTF-8 can carry it. Of a client's completions lone surrogates are refused; a model's are relayed."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(asked=ANY_TEXT.filter(is_sound), said=ANY_TEXT, is_stream=st.booleans())
def test_any_question_and_answer_come_back_as_they_were(
    served_on: Served, asked: str, said: str, is_stream: bool
) -> None:
    raw = stream_of([{"role": "assistant", "content": ""}, {"content": said}]) if is_stream else whole(said)
    found = answered(served_on, asked, raw, is_stream=is_stream)
    assert found.prompt == ({"role": "user", "content": asked},)
    assert found.completion == {"role": "assistant", "content": said}
    assert found.is_complete


@pytest.mark.parametrize("text", ["\x00" * 150_000, "é\x00x" * 350_000], ids=["NUL", "1 MB"])
def test_long_and_hard_answers_come_back_as_they_were(served_on: Served, text: str) -> None:
    found = answered(served_on, text, whole(text))
    assert found.prompt == ({"role": "user", "content": text},)
    assert found.completion == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "said",
    [
        whole("ok").replace(b'"prompt_tokens": 3', b'"prompt_tokens": NaN'),
        whole("ok").replace(b'"index": 0', b'"index": 1e999, "logprobs": {"content": [{"logprob": -Infinity}]}'),
        whole("ok").replace(b"ok", b"\xff\xc0\x00"),
        b"\xff\x00 no JSON at all",
        b"",
    ],
    ids=["NaN", "infinities", "no UTF-8", "no JSON", "nothing"],
)
def test_whatever_bytes_a_model_says_its_neighbours_are_stored(served_on: Served, said: bytes) -> None:
    """The odd one has a row too; none of it is NaN, and nothing becomes a dead letter."""
    engine, before = served_on.engine, DEAD_LETTERS._value.get()
    assert isinstance(engine, Blurting)
    engine.said = said
    body = {"model": "assistant", "messages": [{"role": "user", "content": "q"}]}
    status = served_on.client.post(CHAT, json=body, headers={"x-pawl-user": "ada"}).status_code
    odd, fine = f"chatcmpl-{engine.suffix}", answered(served_on, "and now?", whole("fine"))
    assert status in (200, 502)
    assert fine.completion == {"role": "assistant", "content": "fine"}
    stored = served_on.stored(odd)
    assert stored.prompt == ({"role": "user", "content": "q"},)
    assert "nan" not in repr((stored.prompt_tokens, stored.completion_tokens)).lower()
    assert DEAD_LETTERS._value.get() == before


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
    drain_once = gateway.drain.drain_once
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
    gateway.drain.drain_once = drain_once  # type: ignore[method-assign]
