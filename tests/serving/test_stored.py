"""Stored completions: what a caller can read, list, annotate and delete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.lineage import trace_pair
from feedback.mining import mine_alias
from feedback.store import (
    StoredQuery,
    count_pairs,
    delete_texts,
    event_row,
    get_interaction,
    interaction_row,
    list_pairs,
    list_stored,
    load_pairs,
    mark_pairs_used,
    replace_metadata,
    save_records,
    unscored,
)
from pawl import ids
from pawl.database import Database, open_database, upgrade
from pawl.settings import DatabaseSettings
from serving import stored_api
from tests.pawl import records
from tests.serving.conftest import Served
from tests.serving.talk import CHAT, QUESTION, error_of

SECRET = b"0123456789abcdef"
LONG_AGO = 1_700_000_000.0
ALL = StoredQuery("chat.completions", "", "", None, {}, None, 100, is_newest_first=False)


def interaction(secret: bytes = SECRET, at: float = LONG_AGO, user: str = "", **changes: Any) -> Interaction:
    """A stored chat completion of the key without a name."""
    owner = ids.Principal(changes.get("key_id", ""), user)
    suffix = ids.make_completion_suffix(secret, ids.uuid7(at, os.urandom(10)), owner)
    facts: dict[str, Any] = {
        "created_at": at,
        "user_id": user or None,
        "unit_id": user or "nobody",
        "prompt_tokens": 7,
        "latency_ms": 1.0,
        "first_byte_ms": None,
    }
    return records.interaction(suffix, **(facts | changes))


def said(about: Interaction, kind: str, value: Any, at: float = LONG_AGO + 1, **texts: Any) -> FeedbackEvent:
    """Feedback on a completion."""
    facts: dict[str, Any] = {"id": ids.uuid7(at, os.urandom(10)), "user_id": about.user_id, "created_at": at}
    return records.feedback(about.id, kind, value, **(facts | texts))


def save(database: Database, *found: Interaction, events: tuple[FeedbackEvent, ...] = ()) -> None:
    save_records(database, [interaction_row(one) for one in found], [event_row(event) for event in events], [])


def ask(served: Served, **fields: Any) -> str:
    """A completion through the gateway; its id."""
    answer = served.client.post(CHAT, json={**QUESTION, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


# The store


def test_pages_hold_every_completion_once_in_order(database: Database) -> None:
    every = [interaction(at=LONG_AGO + n) for n in range(7)]
    save(database, *reversed(every))
    for is_newest_first in (False, True):
        seen: list[str] = []
        after, has_more = None, True
        while has_more:
            query = ALL._replace(after=after, limit=3, is_newest_first=is_newest_first)
            page, has_more = list_stored(database, query)
            seen += [one.id for one in page]
            after = seen[-1]
        ordered = [one.id for one in every]
        assert seen == (ordered[::-1] if is_newest_first else ordered)


def test_a_list_leaves_out_what_is_not_the_callers_or_has_no_text(database: Database) -> None:
    mine = interaction(user="ada")
    save(
        database,
        mine,
        interaction(user="eve"),
        interaction(user="ada", key_id="other"),
        interaction(user="ada", is_stored=False, prompt=None, completion=None),
        interaction(user="ada", completion=None, status=Status.UPSTREAM_ERROR),
        interaction(user="ada", route="completions"),
    )
    assert [one.id for one in list_stored(database, ALL._replace(user="ada"))[0]] == [mine.id]


def test_a_list_by_model_takes_the_alias_and_the_version(database: Database) -> None:
    plain, tuned = interaction(), interaction(at=LONG_AGO + 1, model="base-model--r0001")
    save(database, plain, tuned)
    found = {
        model: list_stored(database, ALL._replace(model=model))[0] for model in ("assistant", "base-model--r0001", "x")
    }
    assert [len(page) for page in found.values()] == [2, 1, 0]


NASTY = st.text(max_size=8) | st.sampled_from(["%", "_", '"', "\\", "\x00", 'a": "b', "\ud800", "/", "é"])


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    database = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/metadata.db"))
    upgrade(database)
    yield database
    database.close()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(kept=st.dictionaries(NASTY, NASTY, max_size=3), asked=st.dictionaries(NASTY, NASTY, min_size=1, max_size=2))
def test_metadata_finds_exactly_those_that_have_it(
    sqlite: Database, kept: dict[str, str], asked: dict[str, str]
) -> None:
    """Whatever the keys and values are made of."""
    one = interaction(parameters={"metadata": kept, "temperature": 1})
    save(sqlite, one)
    assert one.id in {found.id for found in list_stored(sqlite, ALL._replace(metadata=kept, limit=1000))[0]}
    is_there = one.id in {found.id for found in list_stored(sqlite, ALL._replace(metadata=asked, limit=1000))[0]}
    assert is_there == (asked.items() <= kept.items())


def test_metadata_is_replaced_as_a_whole_and_parameters_stay(database: Database) -> None:
    one = interaction(parameters={"temperature": 1, "metadata": {"a": "1", "b": "2"}})
    save(database, one)
    changed = replace_metadata(database, one.id, {"c": "3"})
    assert changed == get_interaction(database, one.id)
    assert changed is not None
    assert changed.parameters == {"temperature": 1, "metadata": {"c": "3"}}
    assert replace_metadata(database, "f" * 48, {}) is None


def test_deleting_leaves_numbers_and_no_text(database: Database) -> None:
    one, other = interaction(parameters={"metadata": {"name": "Ada"}}), interaction(at=LONG_AGO + 1)
    events = (
        said(one, "thumbs", "down", reason="it knows my name", comment="Ada", tags={"who": "Ada"}),
        said(one, "edit", "Ada waters at dawn."),
        said(one, "comment", "I am Ada."),
        said(other, "comment", "kept"),
    )
    save(database, one, other, events=events)
    assert delete_texts(database, one.id, interaction_row(one))
    left = get_interaction(database, one.id)
    assert left is not None
    assert (left.prompt, left.prompt_sha, left.completion, left.parameters) == (None, None, None, {})
    assert (left.is_stored, left.prompt_tokens, left.latency_ms) == (False, 7, 1.0)
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT type, value, reason, comment, tags FROM feedback_events").all()
    assert sorted(map(tuple, rows)) == [("comment", '"kept"', None, None, None), ("thumbs", '"down"', None, None, None)]
    assert not delete_texts(database, one.id, interaction_row(one))
    assert [found.id for found in unscored(database, 10)] == [other.id]


def test_what_is_deleted_teaches_nothing(database: Database) -> None:
    one = interaction(user="ada")
    better = {"role": "assistant", "content": "At noon."}
    two = interaction(at=LONG_AGO + 5, user="ada", completion=better, regenerate_of=one.id)
    save(database, one, two, events=(said(one, "edit", "At dawn."),))
    assert mine_alias(database, "assistant", LONG_AGO + 10).n_pairs == 2
    assert len(list_pairs(database, "assistant", 10)) == 2
    assert delete_texts(database, two.id, interaction_row(two))
    assert [pair.chosen["content"] for pair in load_pairs(database, "assistant")] == ["At dawn."]
    assert mine_alias(database, "assistant", LONG_AGO + 20).n_pairs == 1
    assert delete_texts(database, one.id, interaction_row(one))
    assert load_pairs(database, "assistant") == []
    assert mine_alias(database, "assistant", LONG_AGO + 30).n_pairs == 0


def test_a_pair_that_a_model_learned_from_stays_as_lineage_without_a_text(database: Database) -> None:
    one = interaction(user="ada")
    save(database, one, events=(said(one, "edit", "Ada waters at dawn."),))
    mine_alias(database, "assistant", LONG_AGO + 10)
    [before] = load_pairs(database, "assistant")
    mark_pairs_used(database, [before.id], "r0001")
    assert delete_texts(database, one.id, interaction_row(one))
    assert load_pairs(database, "assistant") == []
    [listed] = list_pairs(database, "assistant", 10)
    assert (listed.id, listed.first_run) == (before.id, "r0001")
    traced = trace_pair(database, before.id)
    assert traced is not None
    assert (traced["prompt"], traced["chosen"], traced["rejected"]) == ((), {}, {})
    assert traced["rejected_from"]["completion_id"] == one.completion_id
    assert "dawn" not in str(traced)
    assert mine_alias(database, "assistant", LONG_AGO + 20).n_withdrawn == 0
    assert count_pairs(database) == {"edit": 1}


def test_a_record_that_comes_after_its_deletion_stays_out(database: Database) -> None:
    one = interaction()
    assert delete_texts(database, one.id, interaction_row(interaction(id=one.id, completion_id=one.completion_id)))
    save(database, one)
    left = get_interaction(database, one.id)
    assert left is not None
    assert (left.is_stored, left.prompt, left.completion) == (False, None, None)


# Over HTTP


def test_a_completion_comes_back_as_it_was_answered(served: Served) -> None:
    answer = served.client.post(CHAT, json={**QUESTION, "metadata": {"page": "roses"}})
    made = answer.json()
    got = served.client.get(f"{CHAT}/{made['id']}")
    assert got.status_code == 200
    assert got.headers["x-pawl-model"] == answer.headers["x-pawl-model"]
    assert got.headers["x-pawl-variant"] == "control"
    found = got.json()
    assert found["choices"][0]["message"]["content"] == made["choices"][0]["message"]["content"]
    for name in ("id", "object", "model"):
        assert found[name] == made[name]
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["metadata"] == {"page": "roses"}


def test_a_streamed_completion_is_stored_too(served: Served) -> None:
    answer = served.client.post(CHAT, json={**QUESTION, "stream": True})
    completion_id = answer.text.split('"id":"')[1].split('"')[0]
    found = served.client.get(f"{CHAT}/{completion_id}").json()
    assert found["choices"][0]["message"]["content"] == served.engine.behaviour.text


def test_texts_that_are_no_text_come_back(served: Served) -> None:
    odd = interaction(
        served.gateway.secret,
        prompt=({"role": "user", "content": [{"type": "text", "text": "\ud800 \x00"}]},),
        completion={"role": "assistant", "content": "\udfff"},
    )
    save(served.gateway.database, odd)
    assert served.client.get(f"{CHAT}/{odd.completion_id}").json()["choices"][0]["message"]["content"] == "\udfff"
    [message] = served.client.get(f"{CHAT}/{odd.completion_id}/messages").json()["data"]
    assert message["content"] is None
    assert message["content_parts"] == [{"type": "text", "text": "\ud800 \x00"}]


def test_the_conversation_of_a_completion_comes_in_pages(served: Served) -> None:
    messages = [{"role": "system", "content": "Be short."}, *QUESTION["messages"]]
    completion_id = ask(served, messages=messages)
    served.stored(completion_id)
    url = f"{CHAT}/{completion_id}/messages"
    first = served.client.get(url, params={"limit": 1}).json()
    assert first["has_more"]
    assert first["data"][0]["content"] == "Be short."
    second = served.client.get(url, params={"limit": 1, "after": first["last_id"]}).json()
    assert not second["has_more"]
    assert second["data"][0]["id"] == f"{completion_id}-1"
    newest = served.client.get(url, params={"order": "desc"}).json()
    assert [message["role"] for message in newest["data"]] == ["user", "system"]


def test_a_list_is_of_one_users_completions(served: Served) -> None:
    user = f"lister-{os.urandom(4).hex()}"
    made = [ask(served, user=user, metadata={"n": str(n)}) for n in range(3)]
    for completion_id in made:
        served.stored(completion_id)
    headers = {"x-pawl-user": user}
    page = served.client.get(CHAT, params={"limit": 2}, headers=headers).json()
    assert [one["id"] for one in page["data"]] == made[:2]
    assert page["has_more"]
    assert (page["first_id"], page["last_id"]) == (made[0], made[1])
    rest = served.client.get(CHAT, params={"after": page["last_id"]}, headers=headers).json()
    assert [one["id"] for one in rest["data"]] == made[2:]
    newest = served.client.get(CHAT, params={"order": "desc", "limit": 1}, headers=headers).json()
    assert newest["data"][0]["id"] == made[2]
    found = served.client.get(CHAT, params={"metadata[n]": "1"}, headers=headers).json()
    assert [one["id"] for one in found["data"]] == [made[1]]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=x", "after=chatcmpl-1"])
def test_a_list_refuses_what_it_does_not_understand(served: Served, query: str) -> None:
    answer = served.client.get(f"{CHAT}?{query}")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == query.partition("=")[0]


def test_metadata_is_replaced(served: Served) -> None:
    url = f"{CHAT}/{ask(served, metadata={'a': '1'})}"
    assert served.client.post(url, json={"metadata": {"b": "2"}}).json()["metadata"] == {"b": "2"}
    assert served.client.get(url).json()["metadata"] == {"b": "2"}
    assert served.client.post(url, json={"metadata": None}).json()["metadata"] == {}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"metadata": 1}', b'{"metadata": {"a": 1}}', b'{"metadata": {}, "model": "x"}', b"{}",
     b'{"metadata": {"' + b"k" * 65 + b'": "v"}}', b'{"metadata": {"k": "' + b"v" * 513 + b'"}}'],
)  # fmt: skip
def test_metadata_is_checked(served: Served, body: bytes) -> None:
    answer = served.client.post(f"{CHAT}/{ask(served)}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)


def test_deleted_is_deleted(served: Served) -> None:
    completion_id = ask(served)
    url = f"{CHAT}/{completion_id}"
    assert served.client.delete(url).json() == {
        "object": "chat.completion.deleted",
        "id": completion_id,
        "deleted": True,
    }
    for method, path in (("GET", url), ("DELETE", url), ("GET", f"{url}/messages")):
        answer = served.client.request(method, path)
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "completion_not_found"
    left = served.stored(completion_id)
    assert (left.is_stored, left.prompt, left.completion) == (False, None, None)


def test_what_was_not_to_be_stored_is_not_there(served: Served) -> None:
    completion_id = ask(served, store=False)
    served.stored(completion_id)
    for method in ("GET", "DELETE"):
        assert served.client.request(method, f"{CHAT}/{completion_id}").status_code == 404


def test_an_old_id_that_nobody_knows_is_gone_for_good(served: Served) -> None:
    unknown = interaction(served.gateway.secret)
    answer = served.client.get(f"{CHAT}/{unknown.completion_id}")
    assert answer.status_code == 404
    assert "x-should-retry" not in answer.headers
    assert served.client.delete(f"{CHAT}/{unknown.completion_id}").status_code == 404
    assert get_interaction(served.gateway.database, unknown.id) is None


def test_a_young_id_may_still_be_on_its_way(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_api, "WAIT_S", 0.1)
    young = interaction(served.gateway.secret, at=served.gateway.clock())
    answer = served.client.get(f"{CHAT}/{young.completion_id}")
    assert answer.status_code == 404
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    assert served.client.delete(f"{CHAT}/{young.completion_id}").status_code == 200
    save(served.gateway.database, young)
    assert served.client.get(f"{CHAT}/{young.completion_id}").status_code == 404


@pytest.mark.parametrize("given_id", ["x", "chatcmpl-1", "chatcmpl-" + "0" * 48, "cmpl-" + "0" * 48, "%00", "é"])
def test_ids_that_are_none_are_not_found(served: Served, given_id: str) -> None:
    answer = served.client.get(f"{CHAT}/{given_id}")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "completion_not_found"


def test_an_id_is_good_on_its_own_route_only(served: Served) -> None:
    chat = interaction(served.gateway.secret)
    save(served.gateway.database, chat)
    assert served.client.get(f"/v1/responses/resp_{chat.id}").status_code == 404
    assert served.client.delete(f"/v1/responses/resp_{chat.id}").status_code == 404
    assert served.client.get(f"{CHAT}/cmpl-{chat.id}").status_code == 404


def test_a_stored_response(served: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "water", "arguments": "{}"}}
    one = interaction(served.gateway.secret, completion={"role": "assistant", "content": "Yes.", "tool_calls": [call]})
    one = interaction(
        served.gateway.secret,
        id=one.id,
        completion_id=f"resp_{one.id}",
        route="responses",
        completion=one.completion,
        finish_reason="length",
        is_complete=False,
    )
    save(served.gateway.database, one)
    found = served.client.get(f"/v1/responses/{one.completion_id}").json()
    assert found["object"] == "response"
    assert found["status"] == "incomplete"
    assert [item["type"] for item in found["output"]] == ["message", "function_call"]
    assert found["output"][0]["content"][0]["text"] == "Yes."
    assert found["usage"] == {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
    gone = served.client.delete(f"/v1/responses/{one.completion_id}").json()
    assert gone == {"object": "response", "id": one.completion_id, "deleted": True}
    assert served.client.get(f"/v1/responses/{one.completion_id}").status_code == 404
