"""Who sees which variant, over the wire, on several gateways, with and without the database."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from ab_testing.assignment import assign
from ab_testing.experiment import CONTROL, TREATMENT, Experiment, Route, Variant
from ab_testing.route_store import write_route
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings, Settings
from serving.routing import configured_route
from tests.fake_vllm import FakeVLLM
from tests.servers import PostgreSQL
from tests.serving.conftest import Served, serving
from tests.serving.talk import CHAT, QUESTION
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
CANDIDATE = "base-model--r0001-1a2b3c4d"
SPLIT = {
    "experiment": {
        "key": "tone",
        "variants": [
            {"name": "control", "model": "base-model", "weight": 0.5},
            {"name": "treatment", "model": CANDIDATE, "weight": 0.5},
        ],
    }
}


@pytest.fixture(autouse=True)
def _candidate(engine: FakeVLLM) -> None:
    engine.adapters[CANDIDATE] = "somewhere"


def variant_of(client: httpx2.Client, headers: dict[str, str] | None = None, **fields: Any) -> str:
    response = client.post(CHAT, json={**QUESTION, **fields}, headers=headers)
    assert response.status_code == 200
    return response.headers["x-pawl-variant"]


def everything_to(model: str) -> Route:
    """The route that shows every user `model`."""
    variants = (Variant(CONTROL, "base-model", 0.0), Variant(TREATMENT, model, 1.0))
    return Route("assistant", 0, "base-model", Experiment("rollout-1", "salt", variants))


def write(database: Database, route: Route) -> Route:
    with database.write() as connection:
        return write_route(connection, route, epoch=1, at=time.time())


def test_a_fixed_split_is_the_same_on_every_gateway(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    settings = make_settings(model=SPLIT)
    route = configured_route("assistant", settings.serving.models["assistant"])
    users = [f"user {number}" for number in range(24)]
    with serving(settings, engine) as here, serving(make_settings(model=SPLIT), engine) as there:
        for user in users:
            expected = assign(route, user).variant
            assert variant_of(here.client, user=user) == variant_of(there.client, user=user) == expected
        kept = here.last_stored()
        assert (kept.experiment, kept.is_analysed, kept.probability) == ("tone", True, 0.5)
    assert {assign(route, user).variant for user in users} == {CONTROL, TREATMENT}


def test_who_the_user_is(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    """Header, then `safety_identifier`, then `user`, then `metadata.user_id`."""
    with serving(make_settings(model=SPLIT), engine) as served:
        names = {"metadata": {"user_id": "by metadata"}}
        for field, name in (("", "by metadata"), ("user", "by user"), ("safety_identifier", "by identifier")):
            names |= {field: name} if field else {}  # type: ignore[dict-item]
            variant_of(served.client, **names)
            assert served.last_stored().unit_id == name
        variant_of(served.client, {"x-pawl-user": "by header"}, **names)
        assert served.last_stored().unit_id == "by header"


def test_a_user_is_the_same_by_header_and_by_body(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    with serving(make_settings(model=SPLIT), engine) as served:
        for header in ("ädä 🌹".encode(), "ädä".encode("latin-1")):
            response = served.client.post(CHAT, json=QUESTION, headers=[(b"x-pawl-user", header)])
            assert response.status_code == 200
            assert served.last_stored().user_id in ("ädä 🌹", "ädä")


def test_nobody_is_served_but_never_analysed(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    with serving(make_settings(model=SPLIT), engine) as served:
        seen = {variant_of(served.client) for _ in range(24)}
        kept = served.last_stored()
        assert seen == {CONTROL, TREATMENT}
        assert (kept.is_analysed, kept.user_id) == (False, None)


def test_a_write_reaches_every_running_gateway_within_a_second(
    make_settings: MakeSettings, engine: FakeVLLM, database: Database, database_url: str
) -> None:
    def running_settings() -> Settings:
        return make_settings(database_url, route_poll_s=0.5)

    with serving(running_settings(), engine) as here, serving(running_settings(), engine) as there:
        assert variant_of(here.client, user="ada") == variant_of(there.client, user="ada") == CONTROL
        written = write(database, everything_to(CANDIDATE))
        _wait_for(here, there, TREATMENT)
        write(database, Route("assistant", written.version, "base-model"))
        _wait_for(here, there, CONTROL)


def _wait_for(here: Served, there: Served, variant: str) -> None:
    until = time.monotonic() + 30.0
    for served in (here, there):
        left_s = until - time.monotonic()
        eventually(lambda at=served: variant_of(at.client, user="ada") == variant, within_s=left_s)  # type: ignore[misc]


def test_a_route_that_cannot_be_read_is_passed_over(
    make_settings: MakeSettings, engine: FakeVLLM, database: Database, database_url: str
) -> None:
    with serving(make_settings(database_url), engine) as served:
        write(database, everything_to(CANDIDATE))
        eventually(lambda: variant_of(served.client, user="ada") == TREATMENT)
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE routes SET route = '{\"champion\": 1}', version = 2")
        time.sleep(0.3)
        assert variant_of(served.client, user="ada") == TREATMENT
        with database.write() as connection:
            connection.exec_driver_sql("DELETE FROM routes")
        eventually(lambda: variant_of(served.client, user="ada") == CONTROL)


def test_the_last_routes_hold_while_the_database_is_down_and_after_a_restart(
    make_settings: MakeSettings, engine: FakeVLLM, own_postgresql: PostgreSQL
) -> None:
    url = own_postgresql.create_database("routes")
    settings = make_settings(url)
    with serving(settings, engine) as served:
        database = open_database(DatabaseSettings(url=url))
        write(database, everything_to(CANDIDATE))
        database.close()
        eventually(lambda: variant_of(served.client, user="ada") == TREATMENT)
        own_postgresql.stop()
        eventually(lambda: not served.gateway.routes.is_database_up)
        assert variant_of(served.client, user="ada") == TREATMENT
    with serving(settings, engine) as restarted:
        assert variant_of(restarted.client, user="ada") == TREATMENT
        assert restarted.client.get("/health/ready").status_code == 200
