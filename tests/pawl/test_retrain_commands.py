"""`pawl retrain` says what is at work, what comes next and why not yet, and what each round did."""

from __future__ import annotations

import re

import pytest

from monitoring.metrics import REGISTRY
from pawl import leases, registry
from pawl.cli.worker import Worker
from pawl.clock import now
from pawl.database import Database
from pawl.registry import Model, ModelState, RunStatus
from pawl.round_checks import add_check, newest_answer, newest_check
from pawl.round_due import Code, Decision
from pawl.settings import Settings
from tests.pawl.conftest import Cli
from tests.pawl.records import save, served, thumb

MOMENT = 1_000_000.0


def add_feedback(database: Database) -> None:
    save(database, [served(1), served(2)], [thumb(1, "up"), thumb(2, "down")])


def n_skips(reason: str) -> float:
    return REGISTRY.get_sample_value("pawl_retrain_skips_total", {"reason": reason}) or 0.0


def test_a_skipped_round_is_recorded_with_its_reason(cli: Cli, shared: Database) -> None:
    add_feedback(shared)
    assert cli("retrain", "run", "--if-due").out == "not due: 1 new pairs, retrain.min_pairs is 1000\n"
    cli("retrain", "run", "--if-due", "--moment", str(MOMENT))
    status = cli("retrain", "status", "--json").json()
    assert status["skips"] == {"few_pairs": 2}
    assert (status["last_check"]["due"], status["last_check"]["reason"]) == (False, status["why_not_due"])
    assert status["why_not_due"] == "1 new pairs, retrain.min_pairs is 1000"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status["last_check"]["at"])
    answer = newest_answer(shared, "assistant")
    assert answer is not None
    assert (answer.moment, answer.is_due) == (MOMENT, False)


@pytest.mark.usefixtures("shared")
def test_one_moment_of_the_schedule_is_answered_once(cli: Cli) -> None:
    first = cli("retrain", "run", "--if-due", "--moment", str(MOMENT)).out
    again = cli("retrain", "run", "--if-due", "--moment", str(MOMENT)).out
    assert (first, again) == (
        "not due: 0 new pairs, retrain.min_pairs is 1000\n",
        "not due: this moment of the schedule has its answer: 0 new pairs, retrain.min_pairs is 1000\n",
    )
    assert cli("retrain", "status", "--json").json()["skips"] == {"few_pairs": 1}
    assert cli("retrain", "run", "--if-due", "--moment", str(MOMENT + 1)).out == first


def test_the_status_tells_who_is_at_work_and_what_comes_next(
    cli: Cli, shared: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = cli("retrain", "status", "--json").json()
    assert (status["working"], status["next_scheduled"], status["last_check"]) == (None, None, None)
    monkeypatch.setenv("PAWL_RETRAIN__SCHEDULE", "17 3 * * 0")
    assert leases.acquire(shared, "retrain/assistant", "elsewhere:7", ttl_s=600.0, now=now())
    status = cli("retrain", "status", "--json").json()
    assert status["working"] == "elsewhere:7"
    assert status["next_scheduled"].endswith("T03:17:00+00:00")
    assert "next_scheduled" in cli("retrain", "status").out


def test_a_round_is_explained_step_by_step_with_its_line_of_descent(cli: Cli, shared: Database) -> None:
    for name, parent in (("base--r0001-aa", "base-model"), ("base--r0002-bb", "base--r0001-aa")):
        state = ModelState.CANDIDATE
        model = Model(name, "assistant", "base-model", parent, None, None, None, None, state, {}, 1.0, 1.0)
        registry.register_model(shared, model)
    run = registry.create_run(shared, "assistant", "week", epoch=1, now=1.0)
    steps = {
        "train": {"did": "12 steps on 40 examples", "sha256": "ff", "seconds": 3.2, "at": 30.0},
        "mine": {"did": "45 new pairs", "sha256": "ee", "seconds": 0.1, "at": 10.0},
    }
    gate = {"verdict": "pass", "checks": [{"name": "toxicity", "verdict": "pass", "reason": "0 % against 0 %"}]}
    detail = {"steps": steps, "gate": gate, "model": "base--r0002-bb", "note": "due: 45 new pairs"}
    registry.update_run(shared, run, now=40.0, step="canary", status=RunStatus.PASSED, detail=detail)
    told = cli("retrain", "explain", run.id, "--json").json()
    assert [(step["step"], step["did"]) for step in told["steps"]] == [
        ("mine", "45 new pairs"),
        ("train", "12 steps on 40 examples"),
    ]
    assert told["lineage"] == ["base--r0002-bb", "base--r0001-aa", "base-model"]
    assert (told["detail"], told["note"], told["working"]) == (detail, "due: 45 new pairs", None)
    lines = cli("retrain", "explain", run.id).out.splitlines()
    assert "  toxicity  pass: 0 % against 0 %" in lines
    assert not any(line.startswith("detail") for line in lines)
    (listed,) = cli("retrain", "list", "--json").json()
    assert (listed["model"], listed["started"]) == ("base--r0002-bb", "1970-01-01T00:00:01+00:00")


def test_a_round_that_was_given_up_says_why_and_is_not_owed(cli: Cli, shared: Database) -> None:
    run = registry.create_run(shared, "assistant", "week", epoch=1, now=1.0)
    broken = {"error": "no stop token", "failures": {"step": "preflight", "n": 2}}
    run = registry.update_run(shared, run, now=2.0, step="preflight", status=RunStatus.ERROR, detail=broken)
    status = cli("retrain", "status", "--json").json()
    assert (status["due"], status["why_due"]) == (True, f"run {run.id} is unfinished")
    assert status["run_failed"] == "no stop token (failures in a row: 2)"
    reason = {"reason": "given up after 3 failures at preflight: no stop token"}
    registry.update_run(shared, run, now=3.0, step="preflight", status=RunStatus.GIVEN_UP, detail=reason)
    status = cli("retrain", "status", "--json").json()
    assert (status["due"], status["status"], status["run_failed"]) == (False, "given_up", reason["reason"])
    told = cli("retrain", "explain", run.id, "--json").json()
    assert (told["reason"], told["error"], told["working"]) == (reason["reason"], "no stop token", None)


def test_the_worker_counts_skips_and_begins_the_schedule(shared: Database) -> None:
    models = {"assistant": {"engines": ["http://127.0.0.1:9"], "champion": "base-model"}}
    tree = {"serving": {"models": models}, "retrain": {"schedule": "17 3 * * 0"}}
    worker = Worker(Settings.model_validate(tree), shared)
    worker.start_rounds()
    check = newest_check(shared, "assistant")
    assert check is not None
    assert check.code == Code.NEW_SCHEDULE
    before = n_skips("too_soon")
    add_check(shared, "assistant", Decision(False, Code.TOO_SOON, "an hour ago"), at=now(), moment=None)
    worker.show_learning()
    worker.show_learning()
    assert n_skips("too_soon") - before == 1


@pytest.mark.usefixtures("cli")
def test_a_round_that_is_due_in_a_week_that_had_one_is_a_new_one(shared: Database) -> None:
    from pawl.cli.learning import options_for
    from retrain.pipeline import iso_week

    week = iso_week(now())
    alarm, resumed = Decision(True, Code.ALARM, "Falling is firing"), Decision(True, Code.UNFINISHED, "r0001")
    for expected in (week, f"{week}.2", f"{week}.3"):
        options = options_for(shared, "assistant", alarm, None, force=False)
        assert (options.cycle, options.force, options.note) == (expected, True, "due: Falling is firing")
        registry.create_run(shared, "assistant", expected, epoch=1, now=1.0)
    assert options_for(shared, "assistant", resumed, None, force=False).cycle is None
    assert options_for(shared, "assistant", alarm, "mine", force=False).cycle == "mine"
