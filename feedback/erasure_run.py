"""One erasure from its tombstone to the report. It may be killed at any moment and started again, by anybody.

The tombstone comes first, in a file and in the table; from then on nothing of the person's comes in any more, and a
worker that finds it open does what is left. Then rows go in batches, each a transaction that also adds itself to the
report; then the files of runs; then the space. Only then is the tombstone closed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from feedback.erasure import Removed, Report, report_from
from feedback.erasure_files import erase_in_run, erase_in_runs, mark_late_models, picker
from feedback.erasure_space import reclaim
from feedback.erasure_store import (
    Step,
    completion_step,
    completions,
    mark_models,
    people,
    steps_for,
)
from feedback.tombstone_store import (
    FILE,
    Grave,
    TombstoneFile,
    bury,
    close_grave,
    grave_of,
    graves,
    write_report,
)
from feedback.tombstones import Erased, Person, Subject, Tombstone, digest_of, key_check
from pawl.audit import AuditEvent, note
from pawl.clock import Clock
from pawl.database import Database

log = structlog.get_logger()

BATCH_ROWS = 500
LEASE = "erasure"


@dataclass(frozen=True)
class Eraser:
    """What erasing works with."""

    database: Database
    secret: bytes
    state_dir: Path
    runs_dir: Path
    limit_subject: Callable[[str, str], str]
    """Who a user of a key is in the tables of limits."""
    actor: str
    clock: Clock
    pause: Callable[[float], None] = time.sleep
    batch_rows: int = BATCH_ROWS

    def tombstone(self, subject: Subject, reason: str) -> Tombstone:
        """For everything up to this moment."""
        return Tombstone(digest_of(self.secret, subject), self.clock(), reason, key_check(self.secret))

    def bury(self, tombstone: Tombstone, *, is_rewriting: bool = True) -> Grave:
        """From here on nothing comes in any more, and the erasure will be done, whatever becomes of this process."""
        TombstoneFile(self.state_dir / FILE).add([tombstone])
        report = Report(is_rewriting=is_rewriting).as_json()
        bury(self.database, [tombstone], self.clock(), report=report)
        with self.database.read() as connection:
            return grave_of(connection, tombstone)

    def erase(self, grave: Grave, subject: Subject) -> Report:
        """Do one erasure whose subject is known by name; somebody else may have begun, or ended it, meanwhile."""
        with self.database.read() as connection:
            grave = grave_of(connection, grave.tombstone)
        if subject.completion is not None:
            return self._erase(grave, [completion_step(subject.completion)], [])
        person = Person(subject.user or "", subject.key_id, grave.tombstone.until)
        return self._erase(grave, self._steps(person), [person])

    def finish_open(self) -> list[Report]:
        """Do every erasure that was begun and not finished, or came back from a file: by digest alone.

        One that was begun under another secret stays open: who is meant cannot be told with this one.
        """
        mine = key_check(self.secret)
        with self.database.read() as connection:
            waiting = graves(connection, only_open=True)
        if strange := [grave.number for grave in waiting if grave.tombstone.key_check != mine]:
            log.error("erasures_of_another_secret", tombstones=strange)
        return [self._finish(grave) for grave in waiting if grave.number not in strange]

    def _finish(self, grave: Grave) -> Report:
        erased = Erased(self.secret, [grave.tombstone])
        persons = list(people(self.database, erased))
        steps = [step for person in persons for step in self._steps(person)]
        if not persons:
            steps = [completion_step(suffix) for suffix in completions(self.database, erased)]
        return self._erase(grave, steps, persons)

    def erase_late(self, run: Path) -> None:
        """Take everybody who was ever erased out of one run: it wrote what it had read before they were."""
        with self.database.read() as connection:
            erased = Erased(self.secret, [grave.tombstone for grave in graves(connection)])
        if erased:
            erase_in_run(run, picker(self.database, erased, [], self.secret), self.clock())

    def mark_late_models(self) -> list[str]:
        """Mark what was still being trained on a person's pairs while they were erased."""
        return mark_late_models(self.database, self.runs_dir, self.clock())

    def _steps(self, person: Person) -> list[Step]:
        return steps_for(person, self.secret, self.limit_subject, self.batch_rows)

    def _erase(self, grave: Grave, steps: Sequence[Step], persons: Sequence[Person]) -> Report:
        report = report_from(grave.report)
        for step in steps:
            report = self._exhaust(step, grave.number, report)
        report = self._erase_in_files(grave, persons, report)
        reclaim(self.database, is_rewriting=report.is_rewriting, pause=self.pause)
        self._close(grave, report)
        return report

    def _exhaust(self, step: Step, number: int, report: Report) -> Report:
        """Batch after batch until there is nothing left."""
        while True:
            with self.database.write() as connection:
                removed = step(connection)
                if removed is None:
                    return report
                models = mark_models(connection, removed.trained, self.clock())
                report = report.after(removed, models)
                write_report(connection, number, report.as_json())

    def _erase_in_files(self, grave: Grave, persons: Sequence[Person], report: Report) -> Report:
        """Take the rows out of the files of runs; the files know runs that the database does not."""
        pick = picker(self.database, Erased(self.secret, [grave.tombstone]), persons, self.secret)
        touched = erase_in_runs(self.runs_dir, pick, self.clock())
        trained = Removed(trained=Counter({run: n for run, n in touched.items() if run not in report.runs}))
        with self.database.write() as connection:
            report = report.after(trained, mark_models(connection, trained.trained, self.clock()))
            write_report(connection, grave.number, report.as_json())
        return report

    def _close(self, grave: Grave, report: Report) -> None:
        line = AuditEvent(self.clock(), self.actor, "erase", grave.tombstone.who, report.as_json())
        with self.database.write() as connection:
            close_grave(connection, grave.number, self.clock())
            note(connection, line)
        log.info("erased", tombstone=grave.number, **report.as_json())
