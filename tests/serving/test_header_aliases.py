"""`x_pawl_user` is not `x-pawl-user`: proxies that fold one into the other let strangers forge what only they may set.

A header whose name has an underscore is like any that nobody knows: it changes nothing and goes no further.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.conftest import Served
from tests.serving.keyed import bearer, keyed_gateway
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of
from tests.serving.test_scopes import Keyed
from tests.serving.test_stored import ask

ALIASES = {
    "x_pawl_user": "eve",
    "X_Pawl_User": "eve",
    "x-pawl_user": "eve",
    "x_pawl-user": "eve",
    "x_pawl_regenerate_of": "chatcmpl-" + "0" * 48,
    "x_request_id": "forged",
    "idempotency_key": "forged",
    "content_length": "1",
    "transfer_encoding": "chunked",
}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), ["infer", "admin"]) as (served, keys):
        yield Keyed(served, keys)


@pytest.mark.parametrize("body", [QUESTION, STREAM], ids=["whole", "stream"])
def test_they_change_nothing_and_are_not_forwarded(served: Served, body: dict[str, object]) -> None:
    answer = served.client.post(CHAT, json=body, headers={**ALIASES, "x-pawl-user": "ada"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] != "forged"
    [seen] = served.engine.seen_headers
    assert not {name for name in seen if "_" in name}
    assert not {"eve", "forged"} & set(seen.values())
    kept = served.last_stored()
    assert (kept.user_id, kept.unit_id, kept.regenerate_of) == ("ada", "ada", None)


def test_they_name_no_user(served: Served) -> None:
    assert served.client.post(CHAT, json=QUESTION, headers=ALIASES).status_code == 200
    assert served.last_stored().user_id is None


def test_they_open_no_other_users_completions(served: Served) -> None:
    completion_id = ask(served, user="ada")
    served.stored(completion_id)
    url = f"{CHAT}/{completion_id}"
    assert served.client.get(url, headers={"x-pawl-user": "eve", "x_pawl_user": "ada"}).status_code == 404
    assert served.client.get(url, headers={"x-pawl-user": "ada", "x_pawl_user": "eve"}).status_code == 200


def test_they_carry_no_credential(keyed: Keyed) -> None:
    client, key = keyed.served.client, keyed.keys["infer"]
    for path in ("/v1/models", "/admin/v1/keys"):
        answer = client.get(path, headers={"x_api_key": keyed.keys["admin"], "x-api_key": keyed.keys["admin"]})
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert client.post(CHAT, json=QUESTION, headers={"x_api_key": key}).status_code == 401
    made = client.post(CHAT, json=QUESTION, headers=bearer(key))
    vote = {"completion_id": made.json()["id"], "type": "thumbs", "value": "up"}
    token = {"x_pawl_feedback_token": made.headers["x-pawl-feedback-token"]}
    assert client.post("/v1/feedback", json=vote, headers=token).status_code == 401
