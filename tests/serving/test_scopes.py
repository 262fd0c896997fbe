"""Every route asks for exactly what its line in the table says, and nobody reaches what another key owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx2
import pytest
from starlette.routing import Route

from pawl import ids
from pawl.api_keys import ALL_SCOPES
from serving.error_shapes import LANGFUSE_PATHS, TENSORZERO_PATH
from serving.routes import ACCEPTED, HOT_PATHS, ROUTES, RouteSpec, Scope, spec_of
from tests.serving.conftest import Served
from tests.serving.keyed import bearer, keyed_gateway
from tests.serving.talk import CHAT, QUESTION, error_of

WRONG_KEY = f"pawl-{'0' * 16}-{'0' * 64}"
SAMPLES = {
    "completion_id": "chatcmpl-" + "0" * 48,
    "response_id": "resp_" + "0" * 48,
    "feedback_id": "fb_thumbs_" + "0" * 48,
    "score_id": "fb_thumbs_" + "0" * 48,
    "alias:path": "assistant",
    "name:path": "base-model",
    "key_id": "0" * 16,
    "key": "tone",
    "rollout_id": "ro_0",
    "action": "hold",
    "pair_id": "0" * 32,
}
CLOSED = [spec for spec in ROUTES if spec.scope is not Scope.OPEN]
OPEN = [spec for spec in ROUTES if spec.scope is Scope.OPEN]


class Keyed(NamedTuple):
    """A gateway that asks for keys, and its keys by scope."""

    served: Served
    keys: Mapping[str, str]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    names = [*ALL_SCOPES, "infer+feedback"]
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), names) as (served, keys):
        yield Keyed(served, keys)


def call(keyed: Keyed, spec: RouteSpec, key: str | None) -> httpx2.Response:
    """Use a route, with a body that is good JSON."""
    path = spec.path
    for name, value in SAMPLES.items():
        path = path.replace(f"{{{name}}}", value)
    body: Any = {} if spec.method == "POST" else None
    return keyed.served.client.request(spec.method, path, json=body, headers=bearer(key) if key else {})


def named(spec: RouteSpec) -> str:
    return f"{spec.method} {spec.path}"


def test_the_table_has_every_route_and_no_other(keyed: Keyed) -> None:
    there = {
        (method, route.path)
        for route in keyed.served.gateway.app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert there == {(spec.method, spec.path) for spec in ROUTES}
    assert all(isinstance(route, Route) for route in keyed.served.gateway.app.routes)


def test_no_route_stands_twice_in_the_table() -> None:
    assert len({(spec.method, spec.path) for spec in ROUTES}) == len(ROUTES)
    assert {spec.path for spec in ROUTES if spec.is_hot} == set(HOT_PATHS.values())


def test_the_openness_of_a_route_is_a_decision() -> None:
    assert {spec.path for spec in OPEN} == {"/health/live", "/health/ready", "/docs", "/openapi.json"}


def test_head_asks_for_what_get_asks_for() -> None:
    assert spec_of("HEAD", "/metrics") == spec_of("GET", "/metrics")


@pytest.mark.parametrize("spec", OPEN, ids=named)
def test_open_routes_need_no_key(keyed: Keyed, spec: RouteSpec) -> None:
    assert call(keyed, spec, None).status_code == 200


@pytest.mark.parametrize("spec", CLOSED, ids=named)
def test_without_a_good_key_a_route_is_shut(keyed: Keyed, spec: RouteSpec) -> None:
    for key in (None, WRONG_KEY, "sk-not-ours"):
        answer = call(keyed, spec, key)
        assert answer.status_code == 401
        assert code_of(spec, answer) == "invalid_api_key"
        assert answer.headers["x-request-id"]


def code_of(spec: RouteSpec, answer: httpx2.Response) -> str | None:
    """What a refusal is called; TensorZero's have a text alone."""
    told = answer.json()
    if spec.path == TENSORZERO_PATH:
        assert set(told) == {"error"}
        return {401: "invalid_api_key", 403: "insufficient_scope"}[answer.status_code] if told["error"] else None
    if spec.path.startswith(LANGFUSE_PATHS):
        assert set(told) == {"message", "error"}
        return str(told["error"])
    return str(told["error"]["code"])


@pytest.mark.parametrize("spec", CLOSED, ids=named)
def test_a_key_opens_what_its_scope_says_and_nothing_else(keyed: Keyed, spec: RouteSpec) -> None:
    for scope in sorted(ALL_SCOPES):
        answer = call(keyed, spec, keyed.keys[scope])
        if scope in ACCEPTED[spec.scope]:
            assert answer.status_code not in (401, 403), scope
        else:
            assert answer.status_code == 403, scope
            assert code_of(spec, answer) == "insufficient_scope"


def test_the_other_header_carries_a_key_too(keyed: Keyed) -> None:
    answer = keyed.served.client.get("/v1/models", headers={"x-api-key": keyed.keys["infer"]})
    assert answer.status_code == 200


def test_a_path_that_is_no_route_is_not_found_whoever_asks(keyed: Keyed) -> None:
    assert error_of(keyed.served.client.get("/v1/nothing"))["code"] == "not_found"
    assert error_of(keyed.served.client.put("/v1/models"))["code"] == "method_not_allowed"


def test_a_stranger_is_told_so_before_its_body_is_read(keyed: Keyed) -> None:
    answer = keyed.served.client.post("/admin/v1/keys", content=b"{" * 10_000)
    assert answer.status_code == 401


def test_a_body_is_bounded_before_the_framework_sees_it(keyed: Keyed) -> None:
    limit = keyed.served.gateway.settings.serving.max_body_bytes
    headers = bearer(keyed.keys["admin"])
    answer = keyed.served.client.post("/admin/v1/keys", content=b" " * (limit + 1), headers=headers)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


def ask(keyed: Keyed, key: str, **fields: Any) -> httpx2.Response:
    answer = keyed.served.client.post(CHAT, json={**QUESTION, **fields}, headers=bearer(keyed.keys[key]))
    assert answer.status_code == 200, answer.text
    return answer


def test_what_one_key_made_does_not_exist_for_another(keyed: Keyed) -> None:
    completion_id = ask(keyed, "infer").json()["id"]
    keyed.served.stored(completion_id)
    own, foreign = bearer(keyed.keys["infer"]), bearer(keyed.keys["infer+feedback"])
    vote = {"completion_id": completion_id, "type": "thumbs", "value": "up"}
    client = keyed.served.client
    given = client.post("/v1/feedback", json=vote, headers=own)
    assert given.status_code == 201
    attempts: list[tuple[str, str, Any]] = [
        ("GET", f"{CHAT}/{completion_id}", None),
        ("GET", f"{CHAT}/{completion_id}/messages", None),
        ("POST", f"{CHAT}/{completion_id}", {"metadata": {}}),
        ("DELETE", f"{CHAT}/{completion_id}", None),
        ("POST", "/v1/feedback", vote),
        ("DELETE", f"/v1/feedback/{given.json()['id']}", None),
        ("POST", CHAT, {**QUESTION, "metadata": {"regenerate_of": completion_id}}),
    ]
    for method, path, body in attempts:
        answer = client.request(method, path, json=body, headers=foreign)
        assert answer.status_code == 404, (method, path)
        assert error_of(answer)["code"] == "completion_not_found"
    listed = client.get(CHAT, headers=foreign).json()["data"]
    assert completion_id not in {one["id"] for one in listed}
    assert client.get(f"{CHAT}/{completion_id}", headers=own).status_code == 200


def test_a_record_belongs_to_the_key_that_paid(keyed: Keyed) -> None:
    stored = keyed.served.stored(ask(keyed, "infer", user="ada").json()["id"])
    assert stored.key_id == keyed.keys["infer"].split("-")[1]
    assert stored.unit_id == f"{stored.key_id}/ada"


def test_a_feedback_token_needs_no_key(keyed: Keyed) -> None:
    answer = ask(keyed, "infer")
    vote = {"completion_id": answer.json()["id"], "type": "thumbs", "value": "down"}
    keyed.served.stored(vote["completion_id"])
    token = {"x-pawl-feedback-token": answer.headers["x-pawl-feedback-token"]}
    assert keyed.served.client.post("/v1/feedback", json=vote, headers=token).status_code == 201
    bad = keyed.served.client.post("/v1/feedback", json=vote, headers={"x-pawl-feedback-token": "1.2"})
    assert bad.status_code == 401
    assert error_of(bad)["code"] == "invalid_token"


def test_a_token_opens_nothing_but_feedback(keyed: Keyed) -> None:
    token = {"x-pawl-feedback-token": ask(keyed, "infer").headers["x-pawl-feedback-token"]}
    assert keyed.served.client.get(CHAT, headers=token).status_code == 401


def test_a_user_within_a_key_is_not_another_user(keyed: Keyed) -> None:
    completion_id = ask(keyed, "infer", user="ada").json()["id"]
    keyed.served.stored(completion_id)
    headers = bearer(keyed.keys["infer"])
    eve = keyed.served.client.get(f"{CHAT}/{completion_id}", headers={**headers, "x-pawl-user": "eve"})
    assert eve.status_code == 404
    ada = keyed.served.client.get(f"{CHAT}/{completion_id}", headers={**headers, "x-pawl-user": "ada"})
    assert ada.status_code == 200
    suffix = ids.completion_suffix(completion_id)
    assert suffix is not None
    forged = f"chatcmpl-{suffix[:40]}{'0' * 8}"
    assert keyed.served.client.get(f"{CHAT}/{forged}", headers={**headers, "x-pawl-user": "ada"}).status_code == 404
