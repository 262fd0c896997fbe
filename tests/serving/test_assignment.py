"""Who sees which variant, over the wire, on several gateways, with and without the database."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from ab_testing.assignment import assign
from ab_testing.experiment import CONTROL, TREATMENT, Experiment, Holdout, LayerRange, Route, Variant
from ab_testing.route_store import write_route
from feedback.spool import Spool
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings, Settings
from serving.routing import KEPT_NAME, RouteTable, configured_route, traffic_shares
from tests.fake_vllm import FakeVLLM
from tests.servers import PostgreSQL
from tests.serving.conftest import Served, serving
from tests.serving.keyed import add_key, bearer
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


def test_a_gateway_starts_from_what_an_older_version_kept_whose_split_is_called_holdout(tmp_path: Path) -> None:
    """That name is the hold-out's in the records by now: nobody is split, and everybody is answered."""
    split = {"key": "holdout", "salt": "salt", "variants": [{"name": "control", "model": "another", "weight": 1.0}]}
    kept = {"assistant": {"alias": "assistant", "version": 3, "champion": "another", "experiment": split}}
    models = {"assistant": {"champion": "base-model", "engines": ["http://127.0.0.1:9"]}}
    settings = Settings.model_validate({"serving": {"models": models}})
    database = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/empty.db"))
    spool = Spool(tmp_path / "spool.db")
    spool.keep(KEPT_NAME, orjson.dumps(kept)).result()
    table = RouteTable(settings.serving.models, database, spool, poll_s=60.0)
    try:
        table.start()
        assert table.get("assistant") == Route("assistant", 3, "another")
    finally:
        table.stop()
        spool.close()
        database.close()


def layered(key: str, start: float, end: float) -> dict[str, Any]:
    """A split of the configuration that has part of a layer."""
    return {**SPLIT["experiment"], "key": key, "layer": {"name": "checkout", "start": start, "end": end}}


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


def test_splits_of_one_alias_share_a_layer_and_the_rest_sees_the_champion(
    make_settings: MakeSettings, engine: FakeVLLM
) -> None:
    model: dict[str, Any] = {"experiment": layered("tone", 0.0, 0.4), "experiments": [layered("length", 0.4, 0.7)]}
    settings = make_settings(model=model)
    route = configured_route("assistant", settings.serving.models["assistant"])
    with serving(settings, engine) as served:
        for user in [f"user {number}" for number in range(16)]:
            expected = assign(route, user)
            assert variant_of(served.client, user=user) == expected.variant
            kept = served.last_stored()
            assert (kept.experiment, kept.is_analysed) == (expected.experiment, expected.is_analysed)
    assert {assign(route, f"user {number}").experiment for number in range(16)} == {"tone", "length", None}


def test_who_is_held_out_is_touched_by_nothing_and_recorded_as_such(
    make_settings: MakeSettings, engine: FakeVLLM, database: Database, database_url: str
) -> None:
    """Not by a split of the configuration, and not by what the routing table says, whatever that says of a hold-out."""
    holdout = {"share": 0.999, "salt": "now"}
    with serving(make_settings(database_url, holdout=holdout), engine) as served:
        write(database, replace(everything_to(CANDIDATE), holdout=Holdout(0.001, "before")))
        eventually(lambda: variant_of(served.client) == TREATMENT)
        assert variant_of(served.client, user="ada") == "holdout"
        kept = served.last_stored()
        assert (kept.experiment, kept.assigned_variant, kept.model) == ("holdout", "holdout", "base-model")
        assert not kept.is_analysed


@pytest.mark.parametrize("fast_lane", [True, False])
def test_a_variant_can_be_asked_for_by_those_who_may(
    make_settings: MakeSettings, engine: FakeVLLM, fast_lane: bool
) -> None:
    settings = make_settings(model=SPLIT, forced_variants={"users": ["qa"]}, fast_lane=fast_lane)
    with serving(settings, engine) as served:
        for variant in (CONTROL, TREATMENT):
            assert variant_of(served.client, {"x-pawl-variant": variant}, user="qa") == variant
            kept = served.last_stored()
            assert (kept.experiment, kept.assigned_variant, kept.is_analysed) == ("tone", variant, False)
        for user, wanted, status, code in (
            ("qa", "nobody", 400, "variant_not_found"),
            ("ada", TREATMENT, 403, "variant_not_allowed"),
        ):
            refused = served.client.post(CHAT, json={**QUESTION, "user": user}, headers={"x-pawl-variant": wanted})
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)


def test_a_variant_is_asked_for_by_a_name_of_any_letters(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    variants = [{"name": name, "model": CANDIDATE, "weight": 1} for name in ("wärm", "küßt 🌹")]
    split = {"experiment": {"key": "tone", "variants": variants}}
    with serving(make_settings(model=split, forced_variants={"users": ["qa"]}), engine) as served:
        for name, sent in (("wärm", "wärm".encode()), ("wärm", b"w\xe4rm"), ("küßt 🌹", "küßt 🌹".encode())):
            headers = [(b"x-pawl-user", b"qa"), (b"x-pawl-variant", sent)]
            assert served.client.post(CHAT, json=QUESTION, headers=headers).status_code == 200
            assert served.last_stored().assigned_variant == name


def test_nobody_may_ask_for_a_variant_unless_it_is_set(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    """Not even where no keys are required, and everybody has every scope."""
    choices: tuple[dict[str, Any], ...] = ({}, {"admin_keys": True})
    for allowed in choices:
        with serving(make_settings(model=SPLIT, forced_variants=allowed), engine) as served:
            refused = served.client.post(CHAT, json=QUESTION, headers={"x-pawl-variant": TREATMENT})
            assert refused.status_code == 403


def test_a_key_may_ask_for_a_variant_by_its_id_or_its_scope(make_settings: MakeSettings, engine: FakeVLLM) -> None:
    settings = make_settings(model=SPLIT)
    admin, named, other = (add_key(settings, *scopes) for scopes in (("infer", "admin"), ("infer",), ("infer",)))
    allowed = {"admin_keys": True, "keys": [named.split("-")[1]]}
    with serving(keyed(make_settings(model=SPLIT, forced_variants=allowed)), engine) as served:
        for key, status in ((admin, 200), (named, 200), (other, 403)):
            headers = bearer(key) | {"x-pawl-variant": TREATMENT}
            assert served.client.post(CHAT, json=QUESTION, headers=headers).status_code == status
    with serving(keyed(make_settings(model=SPLIT)), engine) as served:
        headers = bearer(admin) | {"x-pawl-variant": TREATMENT}
        assert served.client.post(CHAT, json=QUESTION, headers=headers).status_code == 403


def keyed(settings: Settings) -> Settings:
    """The same, asking for keys."""
    return settings.model_copy(update={"auth": settings.auth.model_copy(update={"required": True})})


def test_a_ramp_in_the_configuration_moves_from_the_donor_alone(make_settings: MakeSettings) -> None:
    def route_of(**weights: list[float]) -> Route:
        variants = [
            {"name": name, "model": "base-model", "weight": last, "before": before}
            for name, (*before, last) in weights.items()
        ]
        split = {"key": "ramp", "allocation": "slots", "variants": variants}
        return configured_route("assistant", make_settings(model={"experiment": split}).serving.models["assistant"])

    before = route_of(a=[50], b=[50], c=[0]).experiment
    after = route_of(a=[50, 40], b=[50, 50], c=[0, 10]).experiment
    assert before is not None
    assert after is not None
    assert (before.slots, before.phase) == ((("a", 5000), ("b", 10000)), 0)
    assert (after.slots, after.phase) == ((("a", 4000), ("c", 5000), ("b", 10000)), 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"experiment": layered("tone", 0.0, 0.5), "experiments": [layered("length", 0.4, 0.7)]}, "same users"),
        ({"experiments": [layered("tone", 0.0, 0.5), SPLIT["experiment"]]}, "share a layer"),
        ({"experiment": layered("tone", 0.0, 0.5), "experiments": [layered("tone", 0.5, 0.7)]}, "same key"),
        ({"experiment": layered("holdout", 0.0, 0.5)}, "holdout"),
        ({"experiment": layered("tone", 0.5, 0.5)}, "start < end"),
        ({"experiment": layered("tone", 0.0, 0.12345)}, "steps of 0.0001"),
    ],
)
def test_a_configuration_in_which_a_user_could_be_in_two_splits_is_refused(
    make_settings: MakeSettings, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(model=model)


def test_shares_of_traffic_count_parts_and_hold_outs() -> None:
    half = Experiment("tone", "s", (Variant(CONTROL, "m0", 1), Variant(TREATMENT, "m1", 3)))
    part = replace(half, layer=LayerRange("checkout", 0, 5000))
    assert traffic_shares(Route("assistant", 0, "m0", half)) == {CONTROL: 0.25, TREATMENT: 0.75}
    assert traffic_shares(Route("assistant", 0, "m0", part)) == {CONTROL: 0.625, TREATMENT: 0.375}
    held = traffic_shares(Route("assistant", 0, "m0", part, holdout=Holdout(0.2, "s")))
    assert held == pytest.approx({"holdout": 0.2, CONTROL: 0.5, TREATMENT: 0.3})
    assert traffic_shares(Route("assistant", 0, "m0")) == {CONTROL: 1.0}
