"""What is written comes back, and a write on what has changed keeps nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from ab_testing.canary import Decision, launch, override
from ab_testing.controller import route_of
from ab_testing.experiment import Route
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import (
    Rollout,
    get_rollout,
    insert_rollout,
    list_decisions,
    list_rollouts,
    newest_rollout,
    running_rollout,
    save_progress,
)
from ab_testing.route_store import load_route, load_routes, write_route
from pawl.audit import AuditEvent, latest_events
from pawl.database import Database
from pawl.errors import NegativeVerdict, StaleWrite
from pawl.schema import rollouts, routes
from pawl.settings import RolloutSettings

CONFIG = canary_config(RolloutSettings())
ROLLOUT = Rollout("ro_1", "assistant", "base", "base--r1", CONFIG, launch(CONFIG, 5.0), 600.0, None, 5.0, 5.0)
NO_ROUTE = Route("assistant", 0, "base")


def opened(database: Database, rollout: Rollout = ROLLOUT) -> Rollout:
    route = Route(rollout.alias, 0, rollout.champion)
    insert_rollout(database, rollout, route_of(rollout, route, salt="salt"), epoch=1)
    return rollout


def order(rollout: Rollout) -> Decision:
    return override(rollout.state, rollout.config, "hold", "wait")


def test_a_rollout_and_its_route_come_back_as_they_were(database: Database) -> None:
    opened(database)
    assert get_rollout(database, "ro_1") == ROLLOUT
    assert running_rollout(database, "assistant") == ROLLOUT
    route = load_route(database, "assistant")
    assert route == replace(route_of(ROLLOUT, NO_ROUTE, salt="salt"), version=1)


def test_a_rollout_that_an_older_version_began_goes_on(database: Database) -> None:
    opened(database)
    with database.write() as connection:
        state = json.loads(connection.execute(sa.select(rollouts.c.state)).scalar_one())
        del state["reading"], state["watch"]
        connection.execute(rollouts.update().values(state=json.dumps(state)))
    assert get_rollout(database, "ro_1") == ROLLOUT


def test_the_newest_rollout_comes_first_and_an_alias_keeps_to_its_own(database: Database) -> None:
    opened(database)
    opened(database, replace(ROLLOUT, id="ro_2", alias="helper", created_at=9.0, updated_at=9.0))
    assert [found.id for found in list_rollouts(database)] == ["ro_2", "ro_1"]
    assert [found.id for found in list_rollouts(database, "assistant")] == ["ro_1"]
    assert set(load_routes(database)) == {"assistant", "helper"}
    assert running_rollout(database, "nobody") is None


def test_the_newest_rollout_of_a_candidate_or_a_status_is_found(database: Database) -> None:
    before = opened(database)
    ended = replace(before, state=replace(before.state, status="promoted"), updated_at=8.0)
    save_progress(database, before, ended, None, route_of(ended, Route("assistant", 1, "base")), actor="x", epoch=1)
    following = replace(ROLLOUT, id="ro_2", candidate="base--r2", created_at=9.0, updated_at=9.0)
    insert_rollout(database, following, route_of(following, Route("assistant", 2, "base--r1"), salt="s"), epoch=1)
    assert newest_rollout(database, "assistant") == following
    assert newest_rollout(database, "assistant", status="promoted") == ended
    assert newest_rollout(database, "assistant", candidate="base--r1") == ended
    assert newest_rollout(database, "assistant", candidate="base--r3") is None
    assert newest_rollout(database, "helper") is None


def test_an_unknown_rollout_is_named(database: Database) -> None:
    with pytest.raises(NegativeVerdict, match="ro_404"):
        get_rollout(database, "ro_404")


def test_progress_keeps_state_cursor_and_decision_together(database: Database) -> None:
    before = opened(database)
    after = replace(before, cursor=(7.25, "ann"), updated_at=8.0)
    evidence: dict[str, float | dict[str, float]] = {"harm": 1.5, "harm_by_metric": {"toxicity": 2.0}}
    decision = Decision("continue", 0.01, "waiting", "waiting", None, {**evidence})
    save_progress(database, before, after, decision, None, actor="controller", epoch=1)
    assert get_rollout(database, "ro_1") == after
    record = list_decisions(database, "ro_1")[0]
    assert record.evidence == evidence
    assert (record.at, record.verdict, record.actor) == (8.0, "continue", "controller")


def test_progress_on_an_older_state_is_refused_whole(database: Database) -> None:
    before = opened(database)
    save_progress(database, before, replace(before, updated_at=8.0), None, None, actor="controller", epoch=1)
    late = replace(before, updated_at=9.0)
    with pytest.raises(StaleWrite):
        save_progress(database, before, late, order(before), None, actor="controller", epoch=1)
    assert get_rollout(database, "ro_1").updated_at == 8.0
    assert list_decisions(database, "ro_1") == []


def test_a_refused_route_takes_the_state_and_the_decision_back(database: Database) -> None:
    before = opened(database)
    stale = Route("assistant", 0, "base")
    later = replace(before, updated_at=8.0)
    with pytest.raises(StaleWrite):
        save_progress(database, before, later, order(before), stale, actor="controller", epoch=1)
    assert get_rollout(database, "ro_1") == before
    assert list_decisions(database, "ro_1") == []
    assert [event.action for event in latest_events(database)] == ["rollout.start"]


def test_who_did_what_is_written_down_with_the_deed(database: Database) -> None:
    before = opened(database)
    waiting = replace(before, cursor=(7.25, "ann"), updated_at=8.0)
    nothing_new = Decision("continue", 0.01, "waiting", "waiting")
    save_progress(database, before, waiting, nothing_new, None, actor="controller", epoch=1)
    held = replace(waiting, updated_at=9.0)
    save_progress(database, waiting, held, order(waiting), None, actor="operator:ann", epoch=1)
    assert latest_events(database, subject="ro_1") == [
        AuditEvent(9.0, "operator:ann", "rollout.hold", "ro_1", {"reason": "wait"}),
        AuditEvent(5.0, "controller", "rollout.start", "ro_1", {"candidate": "base--r1", "is_forced": False}),
    ]


def test_a_rollout_that_does_not_open_leaves_no_line(database: Database) -> None:
    opened(database)
    with pytest.raises(NegativeVerdict, match="has a running rollout"):
        opened(database, replace(ROLLOUT, id="ro_2"))
    with database.write() as connection:
        write_route(connection, Route("helper", 0, "base"), epoch=1, at=1.0)
    with pytest.raises(StaleWrite):
        opened(database, replace(ROLLOUT, id="ro_3", alias="helper"))
    assert [event.subject for event in latest_events(database)] == ["ro_1"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_experiment_whose_name_is_reserved_by_now_is_passed_over_and_told_of(database: Database) -> None:
    def split(key: str, start: int) -> dict[str, Any]:
        variants = [{"name": "control", "model": "base", "weight": 1.0}]
        layer = {"name": "layer", "start": start, "end": start + 10}
        return {"key": key, "salt": "salt", "variants": variants, "layer": layer}

    stored: dict[str, Any] = {
        "alias": "assistant",
        "champion": "base",
        "experiment": split("holdout", 0),
        "more": [split("tone", 10)],
    }
    alone: dict[str, Any] = {"alias": "helper", "champion": "base", "experiment": split("holdout", 0)}
    with database.write() as connection:
        for number, route in enumerate((stored, alone)):
            row = {"alias": route["alias"], "version": 40 + number, "route": json.dumps(route)}
            connection.execute(routes.insert().values(**row, epoch=1, updated_at=1.0))
    with capture_logs() as logs:
        found = [load_routes(database) for _ in range(3)][-1]
    assert [experiment.key for experiment in found["assistant"].experiments] == ["tone"]
    assert found["helper"] == Route("helper", 41, "base")
    assert sorted((line["event"], line["alias"]) for line in logs) == [
        ("experiment_ignored", "assistant"),
        ("experiment_ignored", "helper"),
    ]
    with database.write() as connection:
        assert write_route(connection, found["helper"], epoch=1, at=2.0).version == 42


@pytest.mark.parametrize(("version", "epoch"), [(0, 5), (2, 5), (1, 4)])
def test_a_route_is_written_from_its_newest_version_by_the_newest_lease(
    database: Database, version: int, epoch: int
) -> None:
    with database.write() as connection:
        assert write_route(connection, NO_ROUTE, epoch=5, at=1.0).version == 1
    with pytest.raises(StaleWrite), database.write() as connection:
        write_route(connection, Route("assistant", version, "other"), epoch=epoch, at=2.0)
    assert load_route(database, "assistant") == Route("assistant", 1, "base")
    with database.write() as connection:
        assert write_route(connection, Route("assistant", 1, "other"), epoch=6, at=2.0).version == 2
