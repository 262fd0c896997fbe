"""Cron expressions, and the rounds that a worker starts by them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl import leases, registry
from pawl.cli.due_rounds import answered
from pawl.cli.scheduled_rounds import MAX_RETRY_S, MAX_TRIES, RETRY_S, ScheduledRounds, run_if_due
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.registry import RunStatus
from pawl.round_checks import add_check, newest_answer, newest_check
from pawl.round_due import Code, Decision
from pawl.schedule import last_moment, next_moment
from pawl.settings import RetrainSettings, load_settings
from tests.pawl.conftest import Cli

WEEKLY = "17 3 * * 0"
DAY = 86400.0
ALIAS = "assistant"
BERLIN = ZoneInfo("Europe/Berlin")


EXPRESSIONS = st.sampled_from([WEEKLY, "*/5 * * * *", "0 0 1 * *", "30 2 * * *"])


@given(EXPRESSIONS, st.floats(0, 4e9), st.sampled_from(["UTC", "Europe/Berlin"]))
def test_moments_lie_around_any_time_and_are_their_own_last(expression: str, at: float, zone: str) -> None:
    before, after = last_moment(expression, zone, at), next_moment(expression, zone, at)
    assert before <= at < after
    assert last_moment(expression, zone, before) == before
    assert last_moment(expression, zone, after) == after


def test_moments_are_of_the_clock_on_the_wall() -> None:
    summer = datetime(2026, 7, 1, 12, tzinfo=BERLIN).timestamp()
    winter = datetime(2026, 12, 1, 12, tzinfo=BERLIN).timestamp()
    for at in (summer, winter):
        assert datetime.fromtimestamp(next_moment("17 3 * * *", "Europe/Berlin", at), BERLIN).hour == 3


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("schedule", "weekly", "five fields"),
        ("schedule", "61 * * * *", "bad minute"),
        ("schedule", "0 0 31 2 *", "day-of-month"),
        ("schedule", "*/5 * * * * *", "five fields"),
        ("time_zone", "Mars/Base", "no time zone is called"),
    ],
)
def test_a_schedule_that_cannot_be_kept_stops_the_start(setting: str, value: str, told: str) -> None:
    environ = {"PAWL_RETRAIN__SCHEDULE": WEEKLY, f"PAWL_RETRAIN__{setting.upper()}": f"'{value}'"}
    with pytest.raises(ConfigurationError, match=told):
        load_settings(None, environ)


class Started:
    """Stands in for the command: processes that end at once as they are told to, and write no answer themselves."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.code = 0
        self.is_due = False
        """What it answers."""
        self.answer: Callable[[float], None] = lambda _: None

    def __call__(self, alias: str, moment: float) -> subprocess.Popen[bytes]:
        assert alias == ALIAS
        self.moments.append(moment)
        self.answer(moment)
        self.processes.append(subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({self.code})"]))
        return self.processes[-1]

    def end(self) -> None:
        for process in self.processes:
            process.wait(60)


class Clock:
    def __init__(self) -> None:
        self.at = next_moment(WEEKLY, "UTC", 0.0) + DAY

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def started() -> Iterator[Started]:
    found = Started()
    yield found
    found.end()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rounds(database: Database, clock: Clock, started: Started) -> ScheduledRounds:
    def answer(moment: float) -> None:
        clock.at += 1.0
        said = Decision(True, Code.ENOUGH, "enough") if started.is_due else Decision(False, Code.FEW_PAIRS, "few")
        add_check(database, ALIAS, said, at=clock.at, moment=moment)

    started.answer = answer
    return ScheduledRounds(RetrainSettings(schedule=WEEKLY), database, clock, started)


def look(rounds: ScheduledRounds, started: Started, times: int = 3) -> None:
    for _ in range(times):
        rounds.look(ALIAS)
        started.end()


def test_a_new_schedule_begins_with_its_next_moment(
    rounds: ScheduledRounds, started: Started, clock: Clock, database: Database
) -> None:
    look(rounds, started)
    assert started.moments == []
    check = newest_check(database, ALIAS)
    assert check is not None
    assert (check.code, "first moment is in 144.0 hours" in check.reason) == ("new_schedule", True)
    clock.at += 7 * DAY
    look(rounds, started)
    assert started.moments == [last_moment(WEEKLY, "UTC", clock.at)]


def test_moments_that_were_missed_are_made_up_for_once(rounds: ScheduledRounds, started: Started, clock: Clock) -> None:
    look(rounds, started)
    clock.at += 5 * 7 * DAY
    look(rounds, started)
    assert started.moments == [last_moment(WEEKLY, "UTC", clock.at)]


def test_another_worker_s_answer_counts(rounds: ScheduledRounds, started: Started, clock: Clock) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    started.answer(last_moment(WEEKLY, "UTC", clock.at))
    look(rounds, started)
    assert started.moments == []


def test_nothing_is_started_while_somebody_is_at_work(
    rounds: ScheduledRounds, started: Started, clock: Clock, database: Database
) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    assert leases.acquire(database, f"retrain/{ALIAS}", "elsewhere:7", ttl_s=60.0, now=clock.at)
    look(rounds, started)
    assert started.moments == []
    clock.at += 61.0
    look(rounds, started)
    assert len(started.moments) == 1


def test_a_command_that_fails_is_not_started_again_at_once(
    rounds: ScheduledRounds, started: Started, clock: Clock
) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    started.code, started.answer = 2, lambda _: None
    look(rounds, started)
    assert len(started.moments) == 1
    clock.at += RETRY_S
    look(rounds, started)
    assert len(started.moments) == 2
    clock.at += RETRY_S
    look(rounds, started)
    assert len(started.moments) == 2, "the pause grows"


def test_a_killed_round_is_gone_on_with_a_few_times(
    rounds: ScheduledRounds, started: Started, clock: Clock, database: Database
) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    run = registry.create_run(database, ALIAS, "week", epoch=1, now=clock.at)
    started.code, started.is_due = -9, True
    for _ in range(20):
        look(rounds, started)
        clock.at += MAX_RETRY_S
    moments = set(started.moments)
    assert (len(started.moments), len(moments)) == (MAX_TRIES, 1)
    registry.update_run(database, run, now=clock.at, step="gate", status=RunStatus.PASSED, detail={})
    clock.at += 7 * DAY
    look(rounds, started)
    assert set(started.moments) - moments == {last_moment(WEEKLY, "UTC", clock.at)}


def test_a_round_that_was_killed_before_it_was_written_down_is_begun_again(
    rounds: ScheduledRounds, started: Started, clock: Clock, database: Database
) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    started.code, started.is_due = -9, True
    look(rounds, started)
    (moment,) = started.moments
    assert answered(database, ALIAS, moment) is None
    clock.at += MAX_RETRY_S
    look(rounds, started, times=1)
    assert started.moments == [moment, moment]
    run = registry.create_run(database, ALIAS, "week", epoch=1, now=clock.at)
    registry.update_run(database, run, now=clock.at, step="gate", status=RunStatus.FAILED, detail={})
    assert answered(database, ALIAS, moment) == "enough"
    clock.at += MAX_RETRY_S
    look(rounds, started)
    assert started.moments == [moment, moment]


def test_a_worker_that_stops_starts_nothing_more(rounds: ScheduledRounds, started: Started, clock: Clock) -> None:
    look(rounds, started)
    clock.at += 7 * DAY
    rounds.stop()
    look(rounds, started)
    assert started.moments == []


def test_a_round_that_runs_is_told_to_leave_with_the_worker(started: Started, clock: Clock, database: Database) -> None:
    def begin(_alias: str, _moment: float) -> subprocess.Popen[bytes]:
        started.processes.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]))
        return started.processes[-1]

    waiting = ScheduledRounds(RetrainSettings(schedule=WEEKLY), database, clock, begin)
    waiting.look(ALIAS)
    clock.at += 7 * DAY
    waiting.look(ALIAS)
    waiting.look(ALIAS)
    waiting.stop()
    assert [process.poll() for process in started.processes] == [-15]


def test_the_worker_s_own_command_answers_the_moment(
    cli: Cli, shared: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("retrain", "list").code == 0  # The configuration is that of the directory.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert run_if_due(ALIAS, 1_000_000.25).wait(120) == 0
    answer = newest_answer(shared, ALIAS)
    assert answer is not None
    assert (answer.moment, answer.code) == (1_000_000.25, "few_pairs")
