"""`python -m serving.report_process`: one report, in a process of its own, since a gateway must not stand still.

It reads a `Job` as JSON on standard input and writes an `Outcome` on standard output. Reading millions of rows keeps an
interpreter busy for seconds and leaves a big heap behind. Both end with the process, and that with the gateway.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from ab_testing.errors import ABTestingError
from ab_testing.experiment_report import Wanted, report_experiment
from pawl.database import open_database
from pawl.errors import NegativeVerdict, PawlError, Unreachable
from pawl.settings import DatabaseSettings
from serving.children import ending_with_parent

Form = Literal["json", "html"]
NICENESS = 5
"""Requests come first."""


class Job(NamedTuple):
    """Which report, of which database, in which form."""

    database: Mapping[str, Any]
    """`DatabaseSettings`; by standard input, since it holds the password."""
    wanted: Wanted
    form: Form
    now: float

    def to_json(self) -> str:
        return json.dumps({**self._asdict(), "wanted": self.wanted._asdict()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        given = json.loads(text)
        return cls(given["database"], Wanted(**given["wanted"]), given["form"], given["now"])


class Outcome(NamedTuple):
    """What came of a job."""

    kind: Literal["report", "nothing", "refused", "unreachable"]
    text: str
    """The report in the form that was asked for, or what was wrong."""


def run(job: Job) -> Outcome:
    """Write the report."""
    try:
        database = open_database(DatabaseSettings.model_validate(job.database))
        try:
            found = report_experiment(database, job.wanted, now=job.now)
        finally:
            database.close()
    except NegativeVerdict as exc:
        return Outcome("nothing", str(exc))
    except Unreachable as exc:
        return Outcome("unreachable", str(exc))
    except sa.exc.DBAPIError:
        return Outcome("unreachable", "the database does not answer; try again")
    except (PawlError, ABTestingError) as exc:
        return Outcome("refused", str(exc))
    return Outcome("report", found.to_html() if job.form == "html" else json.dumps(found.to_json(), allow_nan=False))


def main() -> None:
    """One job, one outcome."""
    os.nice(NICENESS)
    if (ask_kernel := ending_with_parent()) is not None:
        ask_kernel()
    print(json.dumps(run(Job.from_json(sys.stdin.read()))._asdict()))


if __name__ == "__main__":
    main()
