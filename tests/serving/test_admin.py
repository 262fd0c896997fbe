"""Administration over HTTP does what the command line does, and writes down who ordered it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import pytest
from pydantic import BaseModel

from ab_testing.rollout_store import DecisionRecord
from feedback.mining import mine_alias
from feedback.spool import SpoolSize
from feedback.store import PairListing
from pawl.audit import AuditEvent, latest_events
from pawl.registry import Model, ModelState, get_model, register_model
from serving.admin.models import ModelView
from serving.admin.pairs import PairView
from serving.admin.rollouts import DecisionView
from serving.admin.status import AuditLine, Waiting
from tests.serving.conftest import Served
from tests.serving.keyed import bearer, keyed_gateway
from tests.serving.talk import CHAT, QUESTION, error_of
from tests.serving.test_stored import LONG_AGO, interaction, said, save
from tests.serving.waiting import eventually

ADMIN = "/admin/v1"


class Office(NamedTuple):
    """A gateway and the key of its administrator."""

    served: Served
    key: str

    @property
    def actor(self) -> str:
        return f"key:{self.key.split('-')[1]}"

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> httpx2.Response:
        headers = bearer(self.key)
        return self.served.client.request(method, ADMIN + path, json=body, params=query, headers=headers)

    def told(self, method: str, path: str, body: Any = None, *, status: int = 200, **query: Any) -> Any:
        """The JSON of an answer of this status."""
        answer = self.ask(method, path, body, **query)
        assert answer.status_code == status, answer.text
        return answer.json()

    def refused(self, method: str, path: str, body: Any = None, *, status: int) -> dict[str, Any]:
        answer = self.ask(method, path, body)
        assert answer.status_code == status, answer.text
        return error_of(answer)

    def register(self, name: str, state: ModelState = ModelState.CANDIDATE) -> None:
        """A version that every engine serves already: it has no files to load."""
        model = Model(name, "assistant", "base-model", None, None, None, None, None, state, {}, LONG_AGO, LONG_AGO)
        register_model(self.served.gateway.database, model)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with keyed_gateway(tmp_path_factory.mktemp("office"), ["admin", "infer"]) as (served, keys):
        yield Office(served, keys["admin"])


def status_with(office: Office, key: str) -> int:
    return office.served.client.get("/v1/models", headers=bearer(key)).status_code


def test_a_key_lives_and_ends(office: Office) -> None:
    made = office.told("POST", "/keys", {"name": "app", "limits": {"concurrency": 2}, "expires_in_s": 60}, status=201)
    assert made["scopes"] == ["infer"]
    assert made["limits"] == {"concurrency": 2}
    assert made["created_by"] == office.actor
    assert status_with(office, made["key"]) == 200
    shown = office.told("GET", f"/keys/{made['id']}")
    assert shown["name"] == "app"
    assert made["key"] not in str(office.told("GET", "/keys"))
    assert not {"key", "digest", "previous_digest"} & shown.keys()
    rotated = office.told("POST", f"/keys/{made['id']}/rotate", {})
    assert rotated["id"] == made["id"]
    assert rotated["key"] != made["key"]
    assert status_with(office, rotated["key"]) == 200
    eventually(lambda: status_with(office, made["key"]) == 401, within_s=30)
    assert office.told("DELETE", f"/keys/{made['id']}")["revoked_at"] is not None
    eventually(lambda: status_with(office, rotated["key"]) == 401, within_s=30)
    actions = [line["action"] for line in office.told("GET", "/audit", subject=made["id"])["data"]]
    assert actions == ["key.revoke", "key.rotate", "key.create"]
    assert office.refused("POST", f"/keys/{made['id']}/rotate", {}, status=409)["code"] == "refused"


def test_an_old_secret_may_be_kept_for_a_while(office: Office) -> None:
    made = office.told("POST", "/keys", {"name": "app"}, status=201)
    rotated = office.told("POST", f"/keys/{made['id']}/rotate", {"keep_old_s": 3600})
    assert rotated["previous_expires_at"] > made["created_at"] + 3000
    assert [status_with(office, one["key"]) for one in (made, rotated)] == [200, 200]


@pytest.mark.parametrize(
    "body",
    [{}, {"name": ""}, {"name": "x", "scopes": []}, {"name": "x", "scopes": ["root"]}, {"name": "x", "priority": 10},
     {"name": "x", "limits": {"concurrency": -1}}, {"name": "x", "limits": {"speed": 1}}, {"name": "x", "more": 1},
     {"name": "x", "expires_in_s": 0}, [], "x"],
)  # fmt: skip
def test_a_key_that_cannot_be_is_refused(office: Office, body: Any) -> None:
    before = len(office.told("GET", "/keys")["data"])
    assert office.refused("POST", "/keys", body, status=400)["type"] == "invalid_request_error"
    assert len(office.told("GET", "/keys")["data"]) == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/keys/0", None),
        ("DELETE", "/keys/0", None),
        ("POST", "/keys/0/rotate", {}),
        ("GET", "/rollouts/ro_0", None),
        ("POST", "/rollouts/ro_0/hold", {"reason": "x"}),
        ("POST", "/rollouts", {"candidate": "nobody"}),
        ("GET", "/models/a/b", None),
        ("POST", "/models/promote", {"candidate": "nobody"}),
        ("POST", "/models/retire", {"name": "nobody"}),
        ("GET", "/pairs/0", None),
    ],
)
def test_what_is_not_there_is_not_found(office: Office, method: str, path: str, body: Any) -> None:
    assert office.refused(method, path, body, status=404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models/a%00b", None),
        ("GET", "/pairs/%00", None),
        ("GET", "/rollouts/%00", None),
        ("POST", "/rollouts", {"candidate": "a\x00b"}),
        ("POST", "/models/retire", {"name": "a\x00b"}),
    ],
)
def test_what_no_database_can_hold_is_not_looked_for(office: Office, method: str, path: str, body: Any) -> None:
    assert office.refused(method, path, body, status=400)["code"] == "invalid_request"
    assert office.ask("GET", "/models", model="a\x00b").status_code == 400


def test_a_rollout_is_led_by_hand(office: Office) -> None:
    office.register("base-model--r0001")
    started = office.told("POST", "/rollouts", {"candidate": "base-model--r0001"}, status=201)["rollout"]
    assert (
        office.refused("POST", "/models/promote", {"candidate": "base-model--r0001"}, status=409)["code"] == "refused"
    )
    assert office.refused("POST", "/models/retire", {"name": "base-model--r0001"}, status=409)
    for action, status in (("hold", "hold"), ("resume", "ramp"), ("advance", "ramp"), ("rollback", "rolled_back")):
        after = office.told("POST", f"/rollouts/{started}/{action}", {"reason": f"try {action}\x00"})
        assert after["status"] == status
    explained = office.told("GET", f"/rollouts/{started}")
    assert {decision["actor"] for decision in explained["decisions"]} == {office.actor}
    assert [found["id"] for found in office.told("GET", "/rollouts", model="assistant")["data"]] == [started]
    assert office.refused("POST", f"/rollouts/{started}/hold", {"reason": "late"}, status=409)["code"] == "refused"
    assert get_model(office.served.gateway.database, "base-model--r0001").state == ModelState.RETIRED
    noted = latest_events(office.served.gateway.database, subject=started)
    assert [event.action for event in noted] == [
        "rollout.roll_back", "rollout.advance", "rollout.resume", "rollout.hold", "rollout.start",
    ]  # fmt: skip
    assert {event.actor for event in noted} == {office.actor}


def test_the_verdict_is_a_number_for_programs_that_wait(office: Office) -> None:
    office.register("base-model--r0009")
    started = office.told("POST", "/rollouts", {"candidate": "base-model--r0009"}, status=201)["rollout"]
    told = office.told("GET", "/verdict", model="assistant")
    assert told == {
        "rollout": started, "candidate": "base-model--r0009", "status": "ramp", "weight": 0.01, "value": 0.0,
        "reason": "",
    }  # fmt: skip
    office.told("POST", f"/rollouts/{started}/rollback", {"reason": "rude"})
    told = office.told("GET", "/verdict", rollout=started)
    assert (told["status"], told["value"], told["reason"]) == ("rolled_back", -1.0, "rude")
    assert office.ask("GET", "/verdict", rollout="ro_404").status_code == 404
    assert office.ask("GET", "/verdict", model="nobody").status_code == 404


@pytest.mark.parametrize("body", [{}, {"reason": ""}, {"reason": 1}, {"reason": "x", "more": 1}])
def test_an_order_needs_a_reason(office: Office, body: Any) -> None:
    office.refused("POST", "/rollouts/ro_0/hold", body, status=400)


def test_an_order_nobody_knows_is_refused(office: Office) -> None:
    office.refused("POST", "/rollouts/ro_0/explode", {"reason": "x"}, status=400)


def test_models_are_listed_and_retired(office: Office) -> None:
    office.register("base-model--r0002")
    assert "base-model--r0002" in {found["name"] for found in office.told("GET", "/models")["data"]}
    assert office.told("GET", "/models/base-model--r0002")["lineage"] == ["base-model--r0002"]
    assert office.told("POST", "/models/retire", {"name": "base-model--r0002"})["state"] == "retired"
    line, _ = office.told("GET", "/audit", subject="base-model--r0002")["data"]
    assert (line["action"], line["actor"]) == ("model.retire", office.actor)


def test_the_champion_is_not_sent_out_again(office: Office) -> None:
    office.register("base-model", ModelState.CHAMPION)
    assert office.refused("POST", "/rollouts", {"candidate": "base-model"}, status=400)["code"] == "refused"


def test_pairs_are_counted_listed_and_traced(office: Office) -> None:
    database = office.served.gateway.database
    one = interaction(user="ada")
    save(database, one, events=(said(one, "edit", "At dawn \ud800."),))
    mine_alias(database, "assistant", LONG_AGO)
    counts = office.told("GET", "/pairs/counts")
    assert counts == {"by_source": {"edit": 1}, "total": 1}
    [listed] = office.told("GET", "/pairs", limit=10, model="assistant")["data"]
    traced = office.told("GET", f"/pairs/{listed['id']}")
    assert traced["chosen"]["content"] == "At dawn \ud800."
    assert traced["rejected_from"]["completion_id"] == one.completion_id


def test_an_assignment_is_the_one_that_requests_get(office: Office) -> None:
    shown = office.told("GET", "/assignments", user="ada", model="assistant")
    assert (shown["variant"], shown["alias"]) == ("control", "assistant")
    assert office.ask("GET", "/assignments", user="ada", model="nobody").status_code == 404
    assert office.ask("GET", "/assignments", user="", model="assistant").status_code == 400


def test_engines_and_spool_are_shown(office: Office) -> None:
    [engine] = office.told("GET", "/engines")["data"]
    assert engine["is_reachable"]
    assert "base-model" in engine["models"]
    assert (engine["share"], engine["n_running"]) == (1.0, 0)
    assert (engine["n_processes_in"], engine["n_processes_out"]) == (1, 0)
    spool = office.told("GET", "/spool")
    assert spool["is_healthy"]
    assert spool["feedback"] == {"rows": 0, "oldest_at": None}
    [shown] = office.told("GET", "/experiments")["data"]
    assert shown["champion"] == "base-model"


@pytest.mark.parametrize(
    ("view", "record"),
    [
        (ModelView, Model),
        (DecisionView, DecisionRecord),
        (PairView, PairListing),
        (AuditLine, AuditEvent),
        (Waiting, SpoolSize),
    ],
)
def test_the_description_names_what_is_answered(view: type[BaseModel], record: type[object]) -> None:
    """The answer is the record as it is; the view only describes it."""
    assert set(view.model_fields) == set(record.__annotations__)


def test_anybody_may_rule_where_no_keys_are_asked_for(served: Served) -> None:
    """As with every other route: `auth.required: false` is for a machine of one's own."""
    made = served.client.post(f"{ADMIN}/keys", json={"name": "first", "scopes": ["admin"]})
    assert made.status_code == 201
    assert made.json()["created_by"] == "anonymous"
    assert served.client.post(CHAT, json=QUESTION).status_code == 200
