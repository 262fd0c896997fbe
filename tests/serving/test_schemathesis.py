"""Every route is asked what its description allows, by callers with and without the right key, and answers by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pawl.api_keys import Scope as ScopeName
from serving.openapi import EXAMPLES as REQUESTS
from serving.openapi import operations
from serving.routes import (
    ACCEPTED,
    CHAT_LIST,
    CHAT_MESSAGES,
    CHAT_ONE,
    HOT_PATHS,
    RESPONSE_ONE,
    ROUTES,
    RouteSpec,
    Scope,
)
from tests.serving.conftest import Served
from tests.serving.keyed import bearer, keyed_gateway

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
CASES = 4
"""For callers who may use the route; the others send one of them, since they are refused before it is looked at."""
CALLERS = ("nobody", *(scope.value for scope in ScopeName))
"""Each with a key that has this one scope and no other."""
DOCUMENTED = [spec for spec in ROUTES if spec.path not in ("/docs", "/openapi.json")]


class Described(NamedTuple):
    """A gateway, its document, and what each caller sends."""

    served: Served
    schema: schemathesis.schemas.BaseSchema
    headers: Mapping[str, Mapping[str, str]]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Described]:
    with keyed_gateway(tmp_path_factory.mktemp("described"), CALLERS[1:]) as (served, keys):
        document: dict[str, Any] = served.client.get("/openapi.json").json()
        assert len(list(operations(document))) == len(DOCUMENTED)
        headers = {"nobody": {}, **{name: bearer(key) for name, key in keys.items()}}
        yield Described(served, schemathesis.openapi.from_dict(document), headers)


def requests() -> Iterator[Any]:
    """Each route with requests as it describes them, and with others; a probe has nothing that could be wrong."""
    for spec in DOCUMENTED:
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or spec.scope is not Scope.OPEN:
                yield pytest.param(spec, mode, id=f"{spec.method} {spec.path}, {mode.value}")


@pytest.mark.parametrize(("spec", "mode"), list(requests()))
def test_a_route_answers_every_caller_by_its_description(
    described: Described, spec: RouteSpec, mode: GenerationMode
) -> None:
    operation = described.schema[spec.path.replace(":path}", "}")][spec.method]
    may = [name for name in CALLERS if spec.scope is Scope.OPEN or name in ACCEPTED.get(spec.scope, ())]
    seen: Counter[int] = Counter()

    def ask(case: schemathesis.Case[Any], caller: str) -> None:
        # The document's own security is not what is tested: each caller has the key that it has.
        headers = {"authorization": None, "x-api-key": None, **described.headers[caller]}
        response = case.call(base_url=described.served.url, headers=headers, timeout=20)
        case.validate_response(response, checks=CHECKS)
        seen[response.status_code] += 1
        assert caller in may or response.status_code >= 400

    def ask_all(case: schemathesis.Case[Any]) -> None:
        for caller in CALLERS if not seen else may:
            ask(case, caller)

    every_case(operation.as_strategy(generation_mode=mode), ask_all)
    print(dict(seen))


def every_case(cases: SearchStrategy[Any], ask: Callable[[schemathesis.Case[Any]], None]) -> None:
    """Ask with `CASES` cases, the same every time."""
    bounded = settings(
        max_examples=CASES,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @bounded
    @given(case=cases)
    def every(case: schemathesis.Case[Any]) -> None:
        ask(case)

    every()


def conforms(described: Described, method: Literal["GET", "POST", "DELETE"], path: str, **parts: Any) -> Any:
    """The JSON of a success, checked against the description of its route."""
    media_type = "application/json" if "body" in parts else None
    case = described.schema[path][method].Case(method=method, media_type=media_type, **parts)
    caller = "admin" if path.startswith("/admin") else "infer"
    response = case.call(base_url=described.served.url, headers=dict(described.headers[caller]), timeout=20)
    assert 200 <= response.status_code < 300, response.text
    case.validate_response(response, checks=CHECKS)
    return response.json()


@pytest.mark.parametrize("route", HOT_PATHS)
def test_a_good_request_is_answered_by_the_description(described: Described, route: str) -> None:
    conforms(described, "POST", HOT_PATHS[route], body=REQUESTS[route])


def test_what_is_kept_is_shown_by_the_description(described: Described) -> None:
    made = conforms(described, "POST", CHAT_LIST, body=REQUESTS["chat.completions"])["id"]
    described.served.stored(made)
    this = {"path_parameters": {"completion_id": made}}
    conforms(described, "GET", CHAT_LIST)
    conforms(described, "GET", CHAT_ONE, **this)
    conforms(described, "GET", CHAT_MESSAGES, **this)
    conforms(described, "POST", CHAT_ONE, **this, body={"metadata": {"page": "ferns"}})
    vote = {"completion_id": made, "type": "thumbs", "value": "up", "user": "ada"}
    for _ in range(2):
        given_id = conforms(described, "POST", "/v1/feedback", body=vote)["id"]
    conforms(described, "DELETE", "/v1/feedback/{feedback_id}", path_parameters={"feedback_id": given_id})
    conforms(described, "DELETE", CHAT_ONE, **this)
    answered = conforms(described, "POST", "/v1/responses", body=REQUESTS["responses"])["id"]
    described.served.stored(answered)
    conforms(described, "GET", RESPONSE_ONE, path_parameters={"response_id": answered})
    conforms(described, "DELETE", RESPONSE_ONE, path_parameters={"response_id": answered})
    conforms(described, "GET", "/v1/models/{alias}", path_parameters={"alias": "assistant"})


def test_administration_is_shown_by_the_description(described: Described) -> None:
    key = conforms(described, "POST", "/admin/v1/keys", body={"name": "app"})
    this = {"path_parameters": {"key_id": key["id"]}}
    conforms(described, "GET", "/admin/v1/keys/{key_id}", **this)
    conforms(described, "POST", "/admin/v1/keys/{key_id}/rotate", **this, body={})
    conforms(described, "DELETE", "/admin/v1/keys/{key_id}", **this)
    conforms(described, "GET", "/admin/v1/assignments", query={"user": "ada", "model": "assistant"})
