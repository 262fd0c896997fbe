"""An experiment's report from the store: the same for the command line, for programs and for browsers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ab_testing.analysis.report import Report
from ab_testing.analysis.split_checks import SplitCheck, check_split, together
from ab_testing.analysis.table_analysis import Columns, analyse
from ab_testing.built_in_metrics import FROZEN, built_in, frozen_hash
from ab_testing.experiment_table import Table, read_experiment, users_of
from ab_testing.report_page import page
from pawl.audit import latest_events
from pawl.database import Database
from pawl.errors import NegativeVerdict

OTHERS: Final = "(others)"
"""Variants that nobody was assigned to, together."""


class Wanted(NamedTuple):
    """Which report."""

    experiment: str
    control: str = "control"
    by: str | None = None
    """Also each part of the users on its own: `tenure` or `phase`."""
    return_days: float = 7.0
    maturity_s: float = 0.0
    """Age of an answer from which what users said of it counts."""


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """What an experiment has shown, and whether it may be believed."""

    wanted: Wanted
    users: Mapping[str, int]
    assigned: SplitCheck
    """Of all analysed users."""
    scored: SplitCheck
    """Of users with scored answers: who is missing here alone was lost by the scoring."""
    is_as_declared: bool | None
    """Whether these are the metrics that the experiment was started with; None if its start was not recorded."""
    report: Report

    def to_json(self) -> dict[str, object]:
        return {
            "experiment": self.wanted.experiment,
            "users": dict(self.users),
            "split": {"assigned": split_json(self.assigned), "scored": split_json(self.scored)},
            "is_as_declared": self.is_as_declared,
            "alpha": self.report.alpha,
            "effects": self.report.rows(),
        }

    def warnings(self) -> list[str]:
        """What stands against the whole report, in plain words."""
        found = split_warnings({"assigned": self.assigned, "scored": self.scored})
        if self.is_as_declared is False:
            found.append("the metrics have been changed since this experiment was started")
        return found

    def to_html(self) -> str:
        facts: dict[str, object] = {f"users of {variant}": n for variant, n in self.users.items()}
        facts |= {f"warning {number}": warning for number, warning in enumerate(self.warnings(), 1)}
        return page(self.report, title=f"Experiment {self.wanted.experiment}", facts=facts)


def report_experiment(database: Database, wanted: Wanted, *, now: float) -> ExperimentReport:
    """Read an experiment and analyse it.

    Raises:
        NegativeVerdict: it has no analysed users, or none of the control.
    """
    table = read_experiment(database, wanted.experiment, now=now, return_days=wanted.return_days)
    users = users_of(table)
    require_control(users, wanted.control, wanted.experiment)
    declared = _declared_at_start(database, wanted.experiment)
    return ExperimentReport(
        wanted=wanted,
        users=users,
        assigned=split_of(table),
        scored=split_of(_rows_where(table, table["scored"] > 0)),
        is_as_declared=None if declared is None else declared == frozen_hash(wanted.maturity_s),
        report=analysed(table, wanted, now=now),
    )


def require_control(users: Mapping[str, int], control: str, name: str) -> None:
    """
    Raises:
        NegativeVerdict: there is nothing to compare with.
    """
    if control not in users:
        found = ", ".join(f"{n} of {variant!r}" for variant, n in users.items()) or "none at all"
        raise NegativeVerdict(f"{name} has no analysed users of {control!r}; it has {found}")


def analysed(table: Table, wanted: Wanted, *, now: float) -> Report:
    """The report on a table of `read_experiment`."""
    is_ramp = len(set(table["phase"].tolist())) > 1
    has_past = bool((~np.isnan(table["before_answers"])).sum() > 1)
    metrics = built_in(is_ramp=is_ramp, maturity_s=wanted.maturity_s, has_past=has_past)
    stratum = "phase" if is_ramp and wanted.by != "phase" else None
    columns = Columns(stratum=stratum, segment=wanted.by, created_at="created_at")
    return analyse(table, metrics, columns=columns, control=wanted.control, now=now)


def split_of(table: Table) -> SplitCheck:
    """How users were divided, phase by phase, against the probabilities that they were assigned with."""
    first = np.unique(table["user_id"], return_index=True)[1]
    variants, phases, chances = (table[name][first] for name in ("variant", "phase", "probability"))
    return together(
        [_split_of_phase(variants[phases == phase], chances[phases == phase]) for phase in sorted({*phases.tolist()})]
    )


def _split_of_phase(variants: NDArray[Any], chances: NDArray[Any]) -> SplitCheck:
    names = sorted(set(variants.tolist()))
    weights = {name: float(np.median(chances[variants == name])) for name in names}
    missing = 1.0 - sum(weights.values())
    if missing > 1e-6:  # A variant without a single user shows only in what the others leave.
        weights[OTHERS] = missing
    return check_split({name: int((variants == name).sum()) for name in names}, weights)


def _rows_where(table: Table, is_kept: NDArray[np.bool_]) -> Table:
    return {name: column[is_kept] for name, column in table.items()}


def _declared_at_start(database: Database, experiment: str) -> object:
    """The fingerprint of the metrics, as the audit trail has it from the start; None of what was started elsewhere."""
    noted = latest_events(database, subject=experiment, limit=1000)
    return next((event.detail.get(FROZEN) for event in noted if event.action == "experiment.start"), None)


def split_json(check: SplitCheck) -> dict[str, object]:
    return {
        "counts": check.counts,
        "expected": check.expected,
        "p_value": check.p_value,
        "log_bayes_factor": check.log_bayes_factor,
        "is_mismatch": check.is_mismatch,
    }


def split_warnings(checks: Mapping[str, SplitCheck]) -> list[str]:
    """Of the users that are named, those that did not come in the shares intended."""
    return [
        f"the split of {which} users is not the one intended ({_counts(check)}): find out who is missing"
        for which, check in checks.items()
        if check.is_mismatch
    ]


def _counts(check: SplitCheck) -> str:
    return ", ".join(
        f"{seen} of {name} where {check.expected[name]:.0f} were due" for name, seen in check.counts.items()
    )
