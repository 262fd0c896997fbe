"""When a round is due, and what is said when none is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl.database import Database
from pawl.errors import Unreachable
from pawl.round_alarms import firing_alarms
from pawl.round_checks import add_check, count_answers, count_skips, newest_answer, newest_check
from pawl.round_due import Code, Decision, Facts, Needs, decide

NEEDS = Needs(min_pairs=1000, interval_hours=168.0, alarm_min_pairs=100)
READY = Facts(n_new=1000, left_out="", hours_since_last=168.0, unfinished_run=None, open_rollout=None)
ALARM = ("PawlHarmfulRefusalsFalling",)


@pytest.mark.parametrize(
    ("facts", "code", "reason"),
    [
        (READY, Code.ENOUGH, "1000 new pairs"),
        (replace(READY, hours_since_last=None), Code.ENOUGH, "1000 new pairs"),
        (replace(READY, n_new=999, left_out="7 secret"), Code.FEW_PAIRS, "999 new pairs, retrain.min_pairs is 1000; l"),
        (replace(READY, hours_since_last=1.0), Code.TOO_SOON, "the last round was 1.0 hours ago"),
        (replace(READY, open_rollout="ro_1"), Code.ROLLOUT_OPEN, "rollout ro_1 is open"),
        (replace(READY, n_new=100, hours_since_last=1.0, alarms=ALARM), Code.ALARM, "PawlHarmfulRefusalsFalling is"),
        (replace(READY, n_new=99, alarms=ALARM), Code.FEW_PAIRS, "retrain.alarms.min_pairs is 100, though Pawl"),
        (replace(READY, alarms=ALARM, open_rollout="ro_1"), Code.ROLLOUT_OPEN, "rollout ro_1"),
        (replace(READY, n_new=0, open_rollout="ro_1", unfinished_run="r0007"), Code.UNFINISHED, "r0007"),
    ],
)  # fmt: skip
def test_each_answer_has_its_reason(facts: Facts, code: Code, reason: str) -> None:
    decision = decide(facts, NEEDS)
    assert (decision.code, reason in decision.reason) == (code, True), decision.reason
    assert decision.is_due == (code in {Code.ENOUGH, Code.ALARM, Code.UNFINISHED})


FACTS = st.builds(
    Facts,
    n_new=st.integers(0, 3000),
    left_out=st.just(""),
    hours_since_last=st.none() | st.floats(0.0, 400.0),
    unfinished_run=st.none() | st.just("r0001"),
    open_rollout=st.none() | st.just("ro_1"),
    alarms=st.just(()) | st.just(ALARM),
)


@given(FACTS)
def test_an_alarm_and_more_pairs_never_make_a_due_round_undue(facts: Facts) -> None:
    decision = decide(facts, NEEDS)
    assert decision.reason
    if decision.is_due:
        assert decide(replace(facts, alarms=ALARM, n_new=facts.n_new + 1), NEEDS).is_due
        assert facts.open_rollout is None or facts.unfinished_run is not None


def test_checks_are_kept_and_counted(database: Database) -> None:
    skipped = Decision(False, Code.FEW_PAIRS, "3 new pairs")
    add_check(database, "assistant", Decision(False, Code.NEW_SCHEDULE, "begins"), at=1.0, moment=0.0)
    add_check(database, "assistant", skipped, at=2.0, moment=None)
    add_check(database, "assistant", Decision(True, Code.ENOUGH, "enough"), at=3.0, moment=2.5)
    add_check(database, "assistant", Decision(True, Code.UNFINISHED, "again"), at=4.0, moment=2.5)
    add_check(database, "assistant", skipped, at=5.0, moment=None)
    add_check(database, "other", skipped, at=6.0, moment=5.5)
    newest, answer = newest_check(database, "assistant"), newest_answer(database, "assistant")
    assert newest is not None
    assert (newest.at, newest.reason, newest.is_due) == (5.0, "3 new pairs", False)
    assert answer is not None
    assert (answer.at, answer.moment) == (4.0, 2.5)
    assert count_answers(database, "assistant", 2.5) == 2
    assert count_skips(database, "assistant") == {"few_pairs": 2}
    assert count_skips(database) == {"few_pairs": 3}
    assert newest_check(database, "nobody") is None


@contextmanager
def prometheus(answer: Any, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/api/v1/alerts" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def alert(name: str, state: str = "firing", **labels: str) -> dict[str, Any]:
    return {"state": state, "labels": {"alertname": name, **labels}}


def test_alarms_are_those_that_fire_about_this_model() -> None:
    alerts = [
        alert("Falling", model="assistant", variant="a"),
        alert("Falling", model="assistant", variant="b"),
        alert("Everywhere"),
        alert("Rising", model="other"),
        alert("Pending", "pending", model="assistant"),
        alert("NotAsked", model="assistant"),
    ]
    with prometheus({"status": "success", "data": {"alerts": alerts}}) as url:
        found = firing_alarms(url, ["Falling", "Everywhere", "Rising", "Pending"], "assistant")
    assert found == ("Everywhere", "Falling")


@pytest.mark.parametrize(("answer", "status"), [({"data": {}}, 200), ([], 200), ({"data": {"alerts": []}}, 503)])
def test_a_prometheus_that_does_not_say_is_out_of_reach(answer: Any, status: int) -> None:
    with prometheus(answer, status) as url, pytest.raises(Unreachable, match="does not say which alerts"):
        firing_alarms(url, ["Falling"], "assistant")
    with pytest.raises(Unreachable):
        firing_alarms(url, ["Falling"], "assistant")
