"""Rollbacks reach every gateway, and what holds the weights when the controller or the database is gone: a few of each.

How fast it is, `python -m bench.rollback` measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ab_testing.assignment import assign
from ab_testing.experiment import CONTROL, TREATMENT, Route, canary_experiment
from bench.rollback import (
    ALIAS,
    Held,
    Outcome,
    Reached,
    Stage,
    absent_database,
    dead_controller,
    print_outcome,
    report_of,
    staged,
    stopped_leader,
    users_of,
)

WATCH_S = 0.5
PAUSE_S = 0.03
"""Between two questions: as many as are needed to see, no more."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with staged(2, PAUSE_S) as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    """The shared one; whatever a test left running is over afterwards."""
    yield shared
    shared.controller.act(ALIAS, "abort", "the test is over", actor="operator:test", epoch=shared.epoch)
    shared.expect({})


def test_a_rollback_reaches_every_gateway(stage: Stage) -> None:
    for _ in range(2):
        stage.send_out([TREATMENT])
        reached = stage.roll_back()
        assert [one.gateway for one in reached] == [0, 1]
        assert all(one.seconds >= 0.0 for one in reached)
        assert not any(asker.failures for asker in stage.askers)
        assert stage.watch(WATCH_S) != "", "who was in the treatment sees the champion now"
        stage.expect({})


def test_a_dead_controller_leaves_the_weights_where_they_are(stage: Stage) -> None:
    held = dead_controller(stage, WATCH_S, has_successor=False)
    assert held.is_right, held.says


def test_a_leader_that_is_stopped_in_the_middle_of_a_tick_changes_nothing_when_it_wakes(stage: Stage) -> None:
    held = stopped_leader(stage)
    assert held.is_right, held.says


def test_without_the_database_the_last_known_weights_hold(stage: Stage) -> None:
    held = absent_database(stage, WATCH_S)
    assert held.is_right, held.says


def test_users_are_those_of_the_variants_asked_for_and_take_turns() -> None:
    experiment = canary_experiment("ro_1", "salt", champion="a", candidate="b", weight=0.5, phase=0)
    route = Route("assistant", 1, "a", experiment)
    users = users_of(route, [TREATMENT, CONTROL])
    assert {user: assign(route, user).variant for user in users} == users
    assert list(users.values())[:4] == [TREATMENT, CONTROL, TREATMENT, CONTROL]


def outcome(seconds: list[float], *, is_right: bool = True, failures: int = 0) -> Outcome:
    reached = tuple(Reached(number % 2, one) for number, one in enumerate(seconds))
    return Outcome(2, len(seconds) // 2, reached, (Held("nothing", is_right, "well"),), failures)


def test_one_slow_rollback_of_a_hundred_is_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    good = outcome([0.1, 0.2] * 100)
    assert good.is_faultless
    assert (good.percentile(0.5, 0), good.percentile(0.5, 1), good.percentile(1.0)) == (0.1, 0.2, 0.2)
    assert not outcome([0.1] * 196 + [1.5] * 4).is_faultless
    assert outcome([0.1] * 398 + [1.5] * 2).is_faultless
    late_at_one = outcome([0.1] * 396 + [0.1, 1.5, 1.5, 0.1])
    assert not late_at_one.is_faultless, "two of two hundred"
    assert not outcome([0.1] * 200, is_right=False).is_faultless
    assert not outcome([0.1] * 200, failures=1).is_faultless
    assert json.loads(json.dumps(report_of(good)))["percentiles"]["p99"] == 0.2
    print_outcome(good)
    assert "0.200 s" in capsys.readouterr().out
