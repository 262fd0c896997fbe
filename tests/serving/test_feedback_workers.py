"""A key is honoured wherever the call comes again: another process of this machine, another machine, after a kill."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.spool import Spool
from feedback.standing import Earlier
from pawl.settings import Settings
from serving.feedback_neighbours import Neighbours, Turns
from serving.feedback_repeats import (
    KEY_TTL_S,
    First,
    Stamp,
    beginnings,
    event_id_for,
    found_in,
    remember,
    stamp_of,
)
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of
from tests.servers import running
from tests.serving.conftest import Served, serving
from tests.serving.held_drain import hold
from tests.serving.talk import error_of
from tests.serving.test_feedback import ADA, ask, events_on, rate
from tests.serving.waiting import eventually

DAY_S = 24 * 3600.0
SECRET = "a secret that both machines have"


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


class Installation(NamedTuple):
    """Two processes of one machine, another machine, and the database of all three."""

    here: Served
    there: Served
    elsewhere: Served


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    directory, engine = tmp_path_factory.mktemp("workers"), FakeVLLM("base-model")
    with running(engine.app) as engine_url:
        configuration = configuration_of(directory, engine_url, route_poll_s=0.1)
        configuration["auth"] = {"secret": SECRET}
        if request.param == "postgresql":
            server = request.getfixturevalue("postgresql")
            configuration["database"]["url"] = server.create_database(f"workers_{uuid.uuid4().hex}")
        one = Settings.model_validate(configuration)
        other = Settings.model_validate({**configuration, "state_dir": str(directory / "elsewhere")})
        with serving(one, engine) as here, serving(one, engine) as there, serving(other, engine) as elsewhere:
            yield Installation(here, there, elsewhere)


def in_the_database(served: Served, completion_id: str, n: int) -> list[Any]:
    """The events on a completion, once there are `n`."""
    found = events_on(served, completion_id, n)
    assert len(found) == n
    return found


def is_drained(served: Served) -> bool:
    return served.gateway.spool.size().result(30).rows == 0


def assert_answered_alike(first: httpx2.Response, again: httpx2.Response) -> None:
    assert first.status_code in (200, 201, 202), first.text
    assert (again.status_code, again.content) == (first.status_code, first.content)


def assert_refused(reused: httpx2.Response) -> None:
    assert (reused.status_code, error_of(reused)["code"]) == (422, "idempotency_key_reused")


def test_another_process_knows_before_the_database_does(installation: Installation) -> None:
    here, there, _ = installation
    completion_id, key, release = ask(here), new_key(), threading.Event()
    drain, drain_once = here.gateway.drain, here.gateway.drain.drain_once
    hold(drain, release)
    first = rate(here.client, completion_id, headers=key)
    assert_answered_alike(first, rate(there.client, completion_id, headers=key))
    assert_refused(rate(there.client, completion_id, value="down", headers=key))
    feedback_id, other = first.json()["id"], {**ADA, **new_key()}
    gone = here.client.delete(f"/v1/feedback/{feedback_id}", headers=other)
    assert_answered_alike(gone, there.client.delete(f"/v1/feedback/{feedback_id}", headers=other))
    release.set()
    assert [event.is_retraction for event in in_the_database(here, completion_id, 2)] == [False, True]
    drain.drain_once = drain_once  # type: ignore[method-assign]


def test_an_sdks_own_retry_is_known_to_another_process(installation: Installation) -> None:
    here, there, _ = installation
    completion_id = ask(here)
    first = rate(here.client, completion_id, headers={"x-stainless-retry-count": "0"})
    assert rate(here.client, completion_id, value="down").status_code == 200
    assert_answered_alike(first, rate(there.client, completion_id, headers={"x-stainless-retry-count": "1"}))
    assert [event.value for event in in_the_database(here, completion_id, 2)] == ['"up"', '"down"']


def test_another_machine_knows_what_the_database_has(installation: Installation) -> None:
    here, _, elsewhere = installation
    completion_id, keys = ask(here), [new_key() for _ in range(3)]
    feedback_id = f"fb_thumbs_{completion_id[9:]}"
    calls: list[Callable[[Served], httpx2.Response]] = [
        lambda served: rate(served.client, completion_id, headers=keys[0]),
        lambda served: rate(served.client, completion_id, value="down", headers=keys[1]),
        lambda served: served.client.delete(f"/v1/feedback/{feedback_id}", headers={**ADA, **keys[2]}),
    ]
    firsts = []
    for number, call in enumerate(calls, start=1):
        firsts.append(call(here))
        in_the_database(here, completion_id, number)
    assert [first.status_code for first in firsts] == [201, 200, 200]
    for first, call in zip(firsts, calls, strict=True):
        assert_answered_alike(first, call(elsewhere))
    for key in keys:
        assert_refused(rate(elsewhere.client, completion_id, "rating", 0.5, headers=key))
    in_the_database(here, completion_id, 3)


def test_what_two_machines_take_at_once_is_one_event(installation: Installation) -> None:
    """The database has not heard of it when the second one is asked."""
    here, _, elsewhere = installation
    completion_id, key, release = ask(here), new_key(), threading.Event()
    drains = [(served.gateway.drain, served.gateway.drain.drain_once) for served in (here, elsewhere)]
    for drain, _ in drains:
        hold(drain, release)
    assert [rate(served.client, completion_id, headers=key).status_code for served in (here, elsewhere)] == [201, 201]
    later = rate(elsewhere.client, completion_id, value="down")
    assert later.status_code == 200
    release.set()
    for served in (here, elsewhere):
        eventually(partial(is_drained, served), within_s=60)
    assert sorted(event.value for event in in_the_database(here, completion_id, 2)) == ['"down"', '"up"']
    for drain, drain_once in drains:
        drain.drain_once = drain_once  # type: ignore[method-assign]


def test_after_a_day_a_key_is_a_new_one_everywhere(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there, elsewhere = installation
    completion_id, key = ask(here), new_key()
    assert rate(here.client, completion_id, headers=key).status_code == 201
    in_the_database(here, completion_id, 1)
    for served, n_before in ((there, 1), (elsewhere, 2)):
        with monkeypatch.context() as patch:
            later = time.time() + n_before * (DAY_S + 60)
            patch.setattr(served.gateway.desk, "_clock", lambda later=later: later)
            patch.setattr(served.gateway.desk, "_join_window_s", 4 * DAY_S)
            assert rate(served.client, completion_id, headers=key).status_code == 200
            in_the_database(here, completion_id, n_before + 1)


# ---- one machine ----


def stamp(key: str = "k", body: bytes = b"{}") -> Stamp:
    made = stamp_of({"idempotency-key": key}, "key/ada", body)
    assert made is not None
    return made


HOLDER = """
import sys, pathlib
from serving.feedback_neighbours import Turns
from serving.feedback_repeats import stamp_of

turns = Turns(pathlib.Path(sys.argv[1]))
print(turns.take(stamp_of({"idempotency-key": "k"}, "key/ada", b"{}")), flush=True)
sys.stdin.read()
"""


def test_a_key_has_one_turn_at_a_time_on_a_machine_and_a_kill_ends_it(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not turns.take(stamp())
        assert turns.take(stamp("another"))
        holder.kill()
        holder.wait(60)
    assert turns.take(stamp())
    assert not turns.take(stamp())
    turns.give_back(stamp())
    assert turns.take(stamp())
    turns.close()


ANSWERER = """
import os, sys, pathlib
from feedback.spool import Spool
from serving.feedback_repeats import First, remember, stamp_of

spool = Spool(pathlib.Path(sys.argv[1]))
answered = [(stamp_of({"idempotency-key": "k"}, "key/ada", b"{}"), First(201, 5.0))]
spool.submit(lambda connection: remember(connection, answered)).result()
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_answered_is_known(tmp_path: Path) -> None:
    """From its file as the kill left it, which nobody has put in order yet; and once another one has taken it over."""
    killed, own = tmp_path / "gateway-1-0.db", tmp_path / "gateway-1-1.db"
    subprocess.run([sys.executable, "-c", ANSWERER, str(killed)], check=False, timeout=60)
    (tmp_path / "gateway-1-2.db").write_bytes(b"no spool " * 1000)
    (tmp_path / "gateway-1-3.db").touch()
    known = stamp().body_sha, First(201, 5.0)
    asked = [stamp("unknown"), stamp(), stamp(body=b"other")]
    spool, neighbours = Spool(own), Neighbours(own)

    def answers(now: float) -> list[Any]:
        return list(spool.submit(lambda connection: neighbours.first_answers(connection, asked, now)).result(30))

    assert answers(6.0) == [None, known, known]
    assert answers(5.0 + KEY_TTL_S) == [None, None, None]
    taking_over = Spool(tmp_path / "gateway-1-4.db", orphans=[killed])
    assert answers(6.0) == [None, known, known]
    spool.submit(lambda _: neighbours.close()).result(30)
    for each in (spool, taking_over):
        each.close()


def test_answers_in_ones_own_spool_need_no_neighbours(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "gateway-1-0.db")
    neighbours = Neighbours(spool.path)

    def look(connection: Any) -> Any:
        remember(connection, [(stamp(), First(200, 1.0))])
        neighbours._others = None  # type: ignore[method-assign, assignment]
        return neighbours.first_answers(connection, [stamp()], 2.0)

    assert spool.submit(look).result(30) == [(stamp().body_sha, First(200, 1.0))]
    spool.close()


# ---- ids ----

MOMENTS = st.floats(0.0, 5e9)


@given(at=MOMENTS, later_s=st.floats(0.0, 3 * KEY_TTL_S), body=st.binary(max_size=5))
def test_an_event_is_found_by_its_key_for_a_day_and_never_stands_in_the_way_later(
    at: float, later_s: float, body: bytes
) -> None:
    made, now = event_id_for(b"s", stamp(), at), at + later_s
    assert len(made) == 32
    assert int(made, 16) >= 0
    if now < at + KEY_TTL_S:
        assert made.startswith(beginnings(b"s", stamp(body=body), now))
    else:
        assert event_id_for(b"s", stamp(), now) != made
    found = found_in(stamp(body=body), Earlier(made, at, is_retraction=False, follows_retraction=None), now)
    assert found == ((stamp().body_sha[:10], First(201, at)) if now < at + KEY_TTL_S else None)


def test_ids_are_of_the_secret_the_caller_the_key_and_the_body() -> None:
    theirs = stamp_of({"idempotency-key": "k"}, "key/eve", b"{}")
    assert theirs is not None
    made = [event_id_for(b"s", one, 0.0) for one in (stamp(), stamp("l"), stamp(body=b"x"), theirs)]
    assert len({*made, event_id_for(b"t", stamp(), 0.0)}) == 5
    assert made[0][:22] == made[2][:22]


@pytest.mark.parametrize(
    ("is_retraction", "follows", "status"),
    [(False, None, 201), (False, True, 201), (False, False, 200), (True, None, 202), (True, False, 200)],
)
def test_the_status_follows_from_the_history(is_retraction: bool, follows: bool | None, status: int) -> None:
    earlier = Earlier("0" * 32, 1.0, is_retraction=is_retraction, follows_retraction=follows)
    assert found_in(stamp(), earlier, 2.0) == ("0" * 10, First(status, 1.0))
