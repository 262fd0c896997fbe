"""The table of fields against all that the engine's own schema knows: a new version's new field is found by name."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from serving.errors import BadRequest
from serving.fields.table import NEVER_FORWARDED, ROUTES
from serving.request_fields import FieldLimits, parse_request, upstream_body
from tests.serving.engine_schema import (
    DATA,
    ENGINE,
    MINIMAL,
    Carrier,
    carriers,
    engine_paths,
    paths_of,
    table_paths,
    without_indices,
)

LIMITS = FieldLimits()
ROOT = Path(__file__).parents[2]
ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"


def ancestors(path: str) -> Iterator[str]:
    """The path and everything it lies in: `a[].b` lies in `a[]` and `a`."""
    while path:
        yield path
        path = path[:-2] if path.endswith("[]") else path.rpartition(".")[0]


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_every_field_of_the_engine_is_listed_or_refused_for_a_reason(route: str) -> None:
    table = table_paths(route)
    decided = table.listed | table.refused.keys()
    closed = table.refused.keys() | table.closed
    undecided = {
        path for path in engine_paths(route) if path not in decided and not closed.intersection(ancestors(path))
    }
    assert undecided == set()


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_what_the_engine_does_not_know_is_not_forwarded_by_mistake(route: str) -> None:
    """Fields that we list and no engine has: OpenAI's own, which engines ignore, or a name that changed."""
    ours = {path for path in table_paths(route).listed if "." not in path} - NEVER_FORWARDED
    unknown = ours - engine_paths(route)
    assert unknown <= {"best_of", "modalities", "stream", "stream_options"}, unknown


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_each_field_passes_as_listed_or_is_refused_by_its_name(route: str) -> None:
    table = table_paths(route)
    free = {path for path in table.closed if path.rpartition(".")[2] in ("metadata", "input", "logit_bias")}
    schemas = {
        path for path in table.closed if path.rpartition(".")[2] in ("schema", "parameters", "input_schema", "json")
    }
    outcomes = {"passed": 0, "refused": 0}
    for carrier in carriers(route):
        try:
            request = parse_request(orjson.dumps(carrier.body), route, LIMITS)
        except BadRequest as refusal:
            outcomes["refused"] += 1
            _assert_names(refusal, carrier)
            continue
        outcomes["passed"] += 1
        forwarded = set(paths_of(orjson.loads(upstream_body(request, "m-v1", None))))
        extra = {p for p in forwarded - table.listed if not (free | schemas).intersection(ancestors(p))}
        assert extra == set(), carrier
        assert not forwarded & (NEVER_FORWARDED - ({"store"} if route == "responses" else set())), carrier
    assert min(outcomes.values()) > 10, outcomes


def _assert_names(refusal: BadRequest, carrier: Carrier) -> None:
    """The field, an object it lies in, or a field beside one of those: what stands there is refused before it."""
    assert refusal.status == 400
    assert refusal.param, carrier
    named = without_indices(refusal.param)
    within = set(ancestors(carrier.path)) | {""}
    assert named in within or named.rpartition(".")[0] in within, (refusal.param, carrier)


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_what_is_refused_at_the_top_is_named_with_the_way_out(route: str) -> None:
    refused = {path: no for path, no in table_paths(route).refused.items() if path in ROUTES[route].refused}
    for name, no in refused.items():
        with pytest.raises(BadRequest) as refusal:
            parse_request(orjson.dumps({**MINIMAL[route], name: None}), route, LIMITS)
        assert (refusal.value.param, refusal.value.code) == (name, "unsupported_parameter")
        assert no.reason in refusal.value.message
        assert (f"serving.allow_fields: [{name}]" in refusal.value.message) == no.may_allow


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_what_a_client_calls_extra_body_has_no_meaning_on_the_wire(route: str) -> None:
    for name in {path for path in engine_paths(route) if "." not in path}:
        body = {**MINIMAL[route], "extra_body": {name: 1}}
        with pytest.raises(BadRequest) as refusal:
            parse_request(orjson.dumps(body), route, LIMITS)
        assert refusal.value.param == "extra_body"


def test_the_engines_schema_is_the_installed_engines() -> None:
    if not ENGINE_PYTHON.exists():
        pytest.skip("the engine is not installed in .venv-engine; its schema is as committed")
    command = [str(ENGINE_PYTHON), str(ROOT / "scripts" / "dump_engine_schema.py"), "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode != 0:
        pytest.skip(f"the engine's models cannot be imported here: {done.stderr.strip().splitlines()[-1:]}")
    found = orjson.loads(done.stdout[done.stdout.index("{") :])
    assert found["engine"] == ENGINE["engine"], f"run scripts/dump_engine_schema.py {DATA.relative_to(ROOT)}"
    assert found == ENGINE
