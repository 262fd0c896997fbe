"""The OpenAPI document says what is there: every route, its errors, its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from serving.fields.table import FIELDS_BY_ROUTE
from serving.openapi import ERRORS, EXAMPLES, error_schema_of, operations, statuses_of
from serving.request_fields import FieldLimits, parse_request
from serving.routes import HOT_PATHS, ROUTES, RouteSpec, Scope
from tests.serving.conftest import Served

UNDOCUMENTED = {"/docs", "/openapi.json"}
"""They show the document itself."""


@pytest.fixture(scope="module")
def document(shared: Served) -> dict[str, Any]:
    answer = shared.client.get("/openapi.json")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


def test_every_route_is_described_and_nothing_else(document: dict[str, Any]) -> None:
    described = {spec for spec, _ in operations(document)}
    assert described == {spec for spec in ROUTES if spec.path not in UNDOCUMENTED}
    n_operations = sum(len(item) for item in document["paths"].values())
    assert n_operations == len(described)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(_references(document))
    assert references
    for reference in references:
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in document["components"][kind]


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def test_every_error_has_the_shape_of_its_family(document: dict[str, Any]) -> None:
    for spec, operation in operations(document):
        errors = {status: told for status, told in operation["responses"].items() if int(status) >= 400}
        assert set(errors) == {str(status) for status in statuses_of(spec)}, spec
        for told in errors.values():
            schema = {"$ref": f"#/components/schemas/{error_schema_of(spec.path)}"}
            assert told["content"]["application/json"]["schema"] == schema
        ours = spec.path.startswith(("/v1/", "/admin/", "/health/", "/metrics"))
        assert (error_schema_of(spec.path) == "Error") == ours
    assert "HTTPValidationError" not in json.dumps(document)


def test_completion_routes_may_answer_every_error() -> None:
    hot = next(spec for spec in ROUTES if spec.is_hot)
    assert set(statuses_of(hot)) == set(ERRORS) == {400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504}


def test_every_operation_says_which_key_it_takes(document: dict[str, Any]) -> None:
    schemes = set(document["components"]["securitySchemes"])
    for spec, operation in operations(document):
        named = {name for choice in operation["security"] for name in choice}
        assert named <= schemes
        assert bool(named) == (spec.scope is not Scope.OPEN)
        assert ("feedbackToken" in named) == (spec.scope is Scope.FEEDBACK)
        assert operation["x-pawl-scope"] == spec.scope


def test_every_operation_has_a_known_tag_and_a_name_of_its_own(document: dict[str, Any]) -> None:
    known = {tag["name"] for tag in document["tags"]}
    found = [operation for _, operation in operations(document)]
    assert all(set(operation["tags"]) <= known for operation in found)
    names = [operation["operationId"] for operation in found]
    assert len(set(names)) == len(names)


def test_success_has_a_schema_and_headers(document: dict[str, Any]) -> None:
    for spec, operation in operations(document):
        succeeded = {status: told for status, told in operation["responses"].items() if status.startswith("2")}
        assert succeeded, spec
        for told in succeeded.values():
            assert "x-request-id" in told["headers"]
            assert all("schema" in content for content in told["content"].values())


@pytest.mark.parametrize(("route", "path"), HOT_PATHS.items())
def test_completion_routes_name_every_field_they_take(document: dict[str, Any], route: str, path: str) -> None:
    operation = document["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == set(FIELDS_BY_ROUTE[route])
    assert {"x-pawl-variant", "x-ratelimit-remaining-tokens"} <= set(operation["responses"]["200"]["headers"])


@pytest.mark.parametrize("route", EXAMPLES)
def test_the_examples_are_good_requests(route: str) -> None:
    raw = json.dumps(EXAMPLES[route]).encode()
    assert parse_request(raw, route, FieldLimits()).alias == "assistant"


def test_the_docs_page_shows_it(served: Served) -> None:
    page = served.client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text


def test_a_route_spec_is_plain() -> None:
    assert RouteSpec("GET", "/x", Scope.INFER) == ("GET", "/x", "infer", False)
