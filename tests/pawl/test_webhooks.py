"""Decisions told to others: signed as the convention says, at least once, and only what is theirs to know."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route as Path_

from ab_testing.canary import Decision
from ab_testing.controller import Action, Controller, start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_store import Rollout, save_progress
from pawl import registry
from pawl.cli.notifying import WebhookKeeper
from pawl.database import Database
from pawl.errors import ConfigurationError, StaleWrite
from pawl.registry import RunStatus
from pawl.schema import webhook_deliveries, webhook_events
from pawl.settings import RolloutSettings, Settings, WebhookSettings
from pawl.webhook_addresses import why_not_an_address
from pawl.webhook_events import TYPES, announce
from pawl.webhook_outbox import Standing, forget_before, revive, standing
from pawl.webhook_signing import key_of
from pawl.webhooks import AT_ONCE, Endpoint, WebhookDuty, endpoint_of, endpoints_of, next_wait_s
from tests.pawl.conftest import Cli
from tests.servers import running

SECRET = "whsec_" + base64.b64encode(b"a key of twenty-four by.").decode()
START = 1_700_000_000.0
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Of what is no matter of the database."""


@dataclass
class Receiver:
    """A real server that takes what is posted to it, as it is told to."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    followed: int = 0
    url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Path_("/hook", self.take, methods=["POST"]),
                Path_("/moved", self.moved, methods=["POST"]),
                Path_("/elsewhere", self.elsewhere, methods=["POST", "GET"]),
            ]
        )

    async def take(self, request: Request) -> Response:
        self.got.append((dict(request.headers), await request.body()))
        return PlainTextResponse("", self.status, headers=self.headers)

    async def moved(self, _: Request) -> Response:
        return RedirectResponse("/elsewhere", 307)

    async def elsewhere(self, _: Request) -> Response:
        self.followed += 1
        return PlainTextResponse("")

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@dataclass
class World:
    """Endpoints, and a clock that only tests move."""

    database: Database
    endpoints: Sequence[Endpoint]
    now: float = START

    def __post_init__(self) -> None:
        self.duty = WebhookDuty(self.database, self.endpoints, clock=lambda: self.now, draw=lambda: 0.5)
        self.look()  # From now on they are known.

    def look(self) -> dict[str, int]:
        return dict(self.duty.look())

    def happen(self, n: int = 1, kind: str = "rollout.promote") -> None:
        with self.database.write() as connection:
            for number in range(n):
                announce(connection, kind, {"number": number}, self.now + number / 1000)
        self.now += 1

    def standing(self) -> Standing:
        return standing(self.database, self.endpoints[0].id)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with running(receiver.app()) as url:
        receiver.url = url
        yield receiver


def endpoint(url: str, **changes: Any) -> Endpoint:
    settings = WebhookSettings.model_validate({"url": url, "secret_env": "HOOK", **changes})
    return endpoint_of(settings, {"HOOK": SECRET})


def verify(headers: dict[str, str], body: bytes, secret: str, now: float) -> dict[str, Any]:
    """As docs/webhooks.md tells receivers to."""
    moment = headers["webhook-timestamp"]
    assert abs(now - int(moment)) < 300
    signed = f"{headers['webhook-id']}.{moment}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    given = [one.removeprefix("v1,") for one in headers["webhook-signature"].split()]
    assert any(hmac.compare_digest(expected, one) for one in given)
    found: dict[str, Any] = json.loads(body)
    return found


def test_an_event_comes_signed_and_once(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen()
    assert world.look() == {"sent": 1}
    assert world.look() == {}
    (headers, body) = receiver.got[0]
    assert verify(headers, body, SECRET, world.now) == {
        "type": "rollout.promote",
        "timestamp": "2023-11-14T22:13:20+00:00",
        "data": {"number": 0},
    }
    assert headers["content-type"] == "application/json"
    with pytest.raises(AssertionError):
        verify(headers, body + b" ", SECRET, world.now)
    assert world.standing() == Standing(0, 1, 0, None)


@ON_SQLITE
def test_what_is_not_taken_is_sent_again_under_the_same_id(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen()
    receiver.status = 500
    assert world.look() == {"failed": 1}
    assert world.look() == {}  # Not before its time.
    world.now += 5.1
    receiver.status = 204
    assert world.look() == {"sent": 1}
    ids = {headers["webhook-id"] for headers, _ in receiver.got}
    assert (len(receiver.got), len(ids)) == (2, 1)
    assert receiver.got[0][1] == receiver.got[1][1]


def test_it_is_given_up_in_the_end_and_can_be_revived(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook", attempts=3)])
    world.happen()
    receiver.status = 503
    outcomes = []
    for _ in range(5):
        outcomes.append(world.look())
        world.now += 13 * 3600.0
    assert outcomes == [{"failed": 1}, {"failed": 1}, {"dead": 1}, {}, {}]
    assert world.standing() == Standing(0, 0, 1, "answered 503")
    receiver.status = 200
    assert revive(database, world.endpoints[0].id, world.now) == 1
    assert world.look() == {"sent": 1}


@ON_SQLITE
def test_gone_means_no_more_of_it(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen()
    receiver.status = 410
    assert world.look() == {"dead": 1}


@ON_SQLITE
def test_a_receiver_may_ask_for_patience(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen()
    receiver.status, receiver.headers = 429, {"retry-after": "600"}
    world.look()
    world.now += 599
    assert world.look() == {}
    world.now += 2
    assert world.look() == {"failed": 1}


@ON_SQLITE
def test_a_redirect_is_not_followed(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/moved")])
    world.happen()
    assert world.look() == {"failed": 1}
    assert receiver.followed == 0


@ON_SQLITE
def test_one_that_is_away_holds_up_nobody_else(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint("http://127.0.0.1:9/hook"), endpoint(f"{receiver.url}/hook")])
    world.happen(3)
    assert world.look() == {"failed": 1, "sent": 3}
    assert [body["data"]["number"] for body in receiver.bodies] == [0, 1, 2]
    assert world.standing() == Standing(3, 0, 0, "ConnectError")


@ON_SQLITE
def test_one_that_is_slow_leaves_the_rest_for_the_next_look(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen(3)
    monkeypatch.setattr("pawl.webhooks.PATIENCE_S", -1.0)
    assert [world.look() for _ in range(4)] == [{"sent": 1}, {"sent": 1}, {"sent": 1}, {}]
    assert [body["data"]["number"] for body in receiver.bodies] == [0, 1, 2]


def test_one_address_is_one_endpoint() -> None:
    twice = [
        WebhookSettings(url="https://hooks.example.com/T0", secret_env="HOOK", events=[events])
        for events in ("rollout.*", "retrain.*")
    ]
    with pytest.raises(ConfigurationError, match="same url"):
        endpoints_of(twice, {"HOOK": SECRET})


def test_only_what_was_asked_for_and_nothing_from_before(database: Database, receiver: Receiver) -> None:
    with database.write() as connection:
        announce(connection, "retrain.failed", {}, START - 1)
    world = World(database, [endpoint(f"{receiver.url}/hook", events=["retrain.*", "rollout.hold"])])
    for kind in ("rollout.promote", "rollout.hold", "retrain.passed", "shadow.failed"):
        world.happen(kind=kind)
    world.look()
    assert [body["type"] for body in receiver.bodies] == ["rollout.hold", "retrain.passed"]


@ON_SQLITE
def test_many_at_once_are_sent_in_their_order(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen(AT_ONCE + 5)
    assert world.look() == {"sent": AT_ONCE}
    assert world.look() == {"sent": 5}


@ON_SQLITE
def test_every_secret_signs_while_one_takes_over(database: Database, receiver: Receiver, tmp_path: Path) -> None:
    older = "whsec_" + base64.b64encode(b"the key before that one.").decode()
    (tmp_path / "secret").write_text(f"{SECRET}\n{older}\n")
    settings = WebhookSettings(url=f"{receiver.url}/hook", secret_file=tmp_path / "secret")
    world = World(database, [endpoint_of(settings, {})])
    world.happen()
    world.look()
    headers, body = receiver.got[0]
    for secret in (SECRET, older):
        verify(headers, body, secret, world.now)


def test_old_events_are_forgotten_and_not_sent_late(database: Database, receiver: Receiver) -> None:
    world = World(database, [endpoint(f"{receiver.url}/hook")])
    world.happen(2)
    world.look()
    assert forget_before(database, world.now) == 2
    with database.read() as connection:
        assert connection.execute(sa.select(webhook_deliveries)).all() == []
    assert world.look() == {}


# What is told


def told(database: Database) -> list[dict[str, Any]]:
    with database.read() as connection:
        events = connection.execute(sa.select(webhook_events).order_by(webhook_events.c.at, webhook_events.c.id))
        return [json.loads(row.payload) for row in events]


def roll_out(database: Database) -> Rollout:
    route = Route("assistant", 0, "base-model")
    return start_rollout(database, RolloutSettings(), route, "candidate", now=START, epoch=0)


def test_orders_are_told_without_the_persons_name_and_words(database: Database) -> None:
    rollout = roll_out(database)
    orders: tuple[Action, ...] = ("hold", "resume", "roll_back")
    clock = iter((START + 1, START + 2, START + 3))
    for action in orders:
        controller = Controller(database, clock=lambda: next(clock))
        controller.act("assistant", action, "eve saw ann's answer", actor="operator:eve", epoch=0)
    found = told(database)
    assert [one["type"] for one in found] == ["rollout.start", "rollout.hold", "rollout.resume", "rollout.roll_back"]
    assert found[0]["data"]["ordered_by"] == "pawl"
    assert {one["data"]["ordered_by"] for one in found[1:]} == {"person"}
    assert found[3]["data"] | {"rollout": rollout.id, "status": "rolled_back", "weight": 0.0} == found[3]["data"]
    assert "eve" not in json.dumps(found)


def test_what_was_not_decided_is_not_told(database: Database) -> None:
    rollout = roll_out(database)
    over = replace(rollout, state=replace(rollout.state, status="rolled_back"), updated_at=START + 1)
    decision = Decision("roll_back", 0.0, "toxic", "harm", "toxicity")
    save_progress(database, rollout, over, decision, None, actor="controller", epoch=0)
    with pytest.raises(StaleWrite):
        save_progress(database, rollout, over, decision, None, actor="controller", epoch=0)
    (start, end) = told(database)
    assert (start["type"], end["type"]) == ("rollout.start", "rollout.roll_back")
    assert (end["data"]["metric"], end["data"]["reason"]) == ("toxicity", "toxic")


def test_a_hold_is_told_when_it_begins(database: Database) -> None:
    rollout = roll_out(database)
    held = replace(rollout, state=replace(rollout.state, status="hold"), updated_at=START + 1)
    still = replace(held, updated_at=START + 2)
    decision = Decision("hold", 0.01, "no scores", "missing_data", None)
    save_progress(database, rollout, held, decision, None, actor="controller", epoch=0)
    save_progress(database, held, still, decision, None, actor="controller", epoch=0)
    assert [one["type"] for one in told(database)] == ["rollout.start", "rollout.hold"]


def test_the_end_of_a_round_is_told(database: Database) -> None:
    run = registry.create_run(database, "assistant", "2026-W01", epoch=1, now=START)
    run = registry.update_run(database, run, now=START, step="mine", status=RunStatus.RUNNING, detail={})
    detail = {"reason": "ann wrote it"}
    registry.update_run(database, run, now=START + 1, step="gate", status=RunStatus.FAILED, detail=detail)
    assert told(database) == [
        {
            "type": "retrain.failed",
            "timestamp": "2023-11-14T22:13:21+00:00",
            "data": {"run": run.id, "model": "assistant", "cycle": "2026-W01", "step": "gate", "status": "failed"},
        }
    ]


def test_every_outcome_of_a_round_can_be_asked_for() -> None:
    outcomes = {f"retrain.{status}" for status in RunStatus if status is not RunStatus.RUNNING}
    assert outcomes == {kind for kind in TYPES if kind.startswith("retrain.")}


# What is configured


@pytest.mark.parametrize(
    ("url", "is_fine"),
    [
        ("https://hooks.example.com/x", True),
        ("http://localhost:9/x", True),
        ("http://127.0.0.9/x", True),
        ("http://hooks.example.com/x", False),
        ("http://10.0.0.1/x", False),
        ("ftp://hooks.example.com", False),
        ("https://ann:secret@hooks.example.com", False),
        ("https://", False),
        ("https://[::1", False),
        ("https://hooks.example.com/\nx", False),
    ],
)
def test_where_events_may_go(url: str, is_fine: bool) -> None:
    assert (why_not_an_address(url, allow_http=False) is None) == is_fine


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://hooks.example.com", "secret_env": "HOOK"},
        {"url": "https://hooks.example.com"},
        {"url": "https://hooks.example.com", "secret_env": "HOOK", "secret_file": "x"},
        {"url": "https://hooks.example.com", "secret_env": "HOOK", "events": ["rollout.paused"]},
        {"url": "https://hooks.example.com", "secret": SECRET},
    ],
)
def test_wrong_settings_stop_the_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="webhooks"):
        Settings.model_validate({"webhooks": [wrong]})


@ON_SQLITE
@pytest.mark.parametrize("secret", ["short", "whsec_!!!!", "whsec_c2hvcnQ=", ""])
def test_a_weak_secret_stops_the_start(secret: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", secret)
    settings = Settings.model_validate({"webhooks": [{"url": "https://hooks.example.com/T0", "secret_env": "HOOK"}]})
    with pytest.raises(ConfigurationError, match=r"https://hooks\.example\.com") as caught:
        WebhookKeeper(settings, database, "worker")
    assert "T0" not in str(caught.value)


@given(st.integers(1, 40), st.floats(0, 1e9), st.floats(0, 1))
def test_waits_grow_within_bounds(attempts: int, asked_for_s: float, chance: float) -> None:
    wait_s = next_wait_s(attempts, asked_for_s, chance)
    assert 4.0 <= wait_s <= 12 * 3600 * 1.2
    assert next_wait_s(attempts + 1, 0.0, chance) >= next_wait_s(attempts, 0.0, chance)


def test_a_plain_secret_is_its_own_key() -> None:
    assert key_of("sixteen letters.", "x") == b"sixteen letters."


# At the command line


def configure(tmp_path: Path, url: str) -> None:
    config = tmp_path / "pawl.yaml"
    config.write_text(config.read_text() + f'webhooks: [{{url: "{url}", secret_env: HOOK}}]\n')


@pytest.mark.usefixtures("shared")
def test_a_test_event_shows_whether_it_works(
    cli: Cli, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, f"{receiver.url}/hook?token=secret")
    monkeypatch.setenv("HOOK", SECRET)
    said = cli("webhooks", "test", "--json")
    assert (said.code, said.json()[0]["status"]) == (0, 200)
    assert "token" not in said.out
    headers, body = receiver.got[0]
    assert verify(headers, body, SECRET, time.time())["type"] == "webhook.test"
    receiver.status = 401
    said = cli("webhooks", "test")
    assert (said.code, "1 of 1 endpoints" in said.err) == (1, True)
    listed = cli("webhooks", "list", "--json").json()
    assert listed == [
        {"endpoint": receiver.url, "events": ["*"], "waiting": 0, "sent": 0, "dead": 0, "last_error": None}
    ]
    assert cli("webhooks", "retry", "--json").json() == [{"endpoint": receiver.url, "revived": 0}]


@pytest.mark.usefixtures("shared")
def test_without_endpoints_there_is_nothing_to_test(cli: Cli) -> None:
    assert cli("webhooks", "test").code == 2
    assert cli("webhooks", "list", "--json").json() == []
