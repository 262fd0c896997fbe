"""Rounds that the worker starts by the clock, each as a `pawl retrain run --if-due` of its own.

A process of its own because training takes what memory and time it needs, and may be killed, without the worker's other
duties. Any number of workers may do this: the lease of the round lets one of their processes in, which writes down the
moment of the schedule that it answers, and the others find the answer.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from pawl import leases
from pawl.cli.context import config_path
from pawl.cli.due_rounds import is_owed
from pawl.clock import Clock
from pawl.database import Database
from pawl.round_checks import Check, add_check, count_answers, newest_answer
from pawl.round_due import Code, Decision
from pawl.schedule import last_moment, next_moment
from pawl.settings import RetrainSettings

log = structlog.get_logger()

RETRY_S = 600.0
"""How long after a process that ended badly the next one starts; four times as long after each further one."""
MAX_RETRY_S = 6 * 3600.0
MAX_TRIES = 10
"""For one moment of the schedule. After that somebody has to look; the next moment tries again."""
STANDARD_ERROR = 2
STOP_WAIT_S = 8.0
"""A training that is told to stop saves its state first; the worker itself has ten seconds."""

Start = Callable[[str, float], subprocess.Popen[bytes]]
"""Given an alias and a moment, starts the process that answers it."""


@dataclass
class _Started:
    process: subprocess.Popen[bytes]
    moment: float
    n_failures: int = 0
    retry_at: float = 0.0


def run_if_due(alias: str, moment: float) -> subprocess.Popen[bytes]:
    """The command, with this process's configuration; it writes to standard error."""
    config = ["--config", str(path.resolve())] if (path := config_path()) else []
    command = [*config, "retrain", "run", "--if-due", "--model", alias, "--moment", repr(moment)]
    return subprocess.Popen([sys.executable, "-m", "pawl.cli.main", *command], stdout=STANDARD_ERROR)


class ScheduledRounds:
    """Starts a round at each moment of the schedule, one for all that were missed, and goes on with killed ones."""

    def __init__(self, settings: RetrainSettings, database: Database, clock: Clock, start: Start = run_if_due) -> None:
        self._settings = settings
        self._database = database
        self._clock = clock
        self._start = start
        self._started: dict[str, _Started] = {}
        self._starting = threading.Lock()
        self._is_stopped = False

    def look(self, alias: str) -> None:
        """Start what is to be started for an alias now."""
        if self._settings.schedule is None or self._is_busy(alias):
            return
        moment = last_moment(self._settings.schedule, self._settings.time_zone, self._clock())
        answer = newest_answer(self._database, alias)
        if answer is None or answer.moment is None:
            self._begin_schedule(alias, moment)
        elif moment > answer.moment:
            self._launch(alias, moment)
        elif self._is_to_be_resumed(alias, answer):
            self._launch(alias, answer.moment)

    def stop(self) -> None:
        """Tell what runs to save its state and leave; nothing is started any more."""
        with self._starting:
            self._is_stopped = True
            running = [one.process for one in self._started.values() if one.process.poll() is None]
        for process in running:
            process.terminate()
        until = time.monotonic() + STOP_WAIT_S
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("round_still_stopping", pid=process.pid)

    def _is_busy(self, alias: str) -> bool:
        """Whether a process works on the alias's rounds, here or elsewhere, or one of ours failed just now."""
        ours = self._started.get(alias)
        if ours is not None:
            if ours.process.poll() is None:
                return True
            if ours.retry_at == 0.0:
                self._note_end(alias, ours)
            if self._clock() < ours.retry_at:
                return True
        return leases.holding(self._database, f"retrain/{alias}", self._clock()) is not None

    def _note_end(self, alias: str, ours: _Started) -> None:
        code = ours.process.returncode
        log.info("scheduled_round_ended", model=alias, code=code)
        ours.n_failures = ours.n_failures + 1 if code else 0
        ours.retry_at = self._clock() + (min(RETRY_S * 4 ** (ours.n_failures - 1), MAX_RETRY_S) if code else 0.0)

    def _begin_schedule(self, alias: str, moment: float) -> None:
        settings, at = self._settings, self._clock()
        due_at = next_moment(str(settings.schedule), settings.time_zone, at)
        reason = f"the schedule {settings.schedule} begins; its first moment is in {(due_at - at) / 3600:.1f} hours"
        decision = Decision(False, Code.NEW_SCHEDULE, reason)
        add_check(self._database, alias, decision, at=at, moment=moment)

    def _is_to_be_resumed(self, alias: str, answer: Check) -> bool:
        if answer.moment is None or not is_owed(self._database, answer):
            return False
        return count_answers(self._database, alias, answer.moment) < MAX_TRIES

    def _launch(self, alias: str, moment: float) -> None:
        before = self._started.get(alias)
        n_failures = before.n_failures if before and before.moment == moment else 0
        with self._starting:
            if self._is_stopped:
                return
            process = self._start(alias, moment)
            self._started[alias] = _Started(process, moment, n_failures)
        log.info("scheduled_round_started", model=alias, pid=process.pid)
