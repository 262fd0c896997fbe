"""The hold-out beside everybody else: what the experiments of some weeks have done to users, taken together.

Held-out users see the champion of the day and nothing else. So both sides get what was promoted, from the same moment
on, and the difference between them is what canaries, splits and rollbacks in between have meant for everybody else: it
is no measure of a champion against the one a year ago.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from ab_testing.analysis.report import Report
from ab_testing.analysis.split_checks import SplitCheck, check_split
from ab_testing.analysis.table_analysis import Columns, analyse
from ab_testing.built_in_metrics import built_in
from ab_testing.experiment import HOLDOUT
from ab_testing.experiment_report import split_json, split_warnings
from ab_testing.experiment_table import DAY_S, EVERYBODY_ELSE, Beside, Table, read_holdout, users_of
from ab_testing.report_page import page
from pawl.database import Database
from pawl.errors import NegativeVerdict


class WantedHoldout(NamedTuple):
    """Which report."""

    alias: str
    days: float = 28.0
    """So far back; less where the hold-out was changed since."""
    return_days: float = 7.0
    maturity_s: float = 0.0
    """Age of an answer from which what users said of it counts."""


@dataclass(frozen=True, slots=True)
class HoldoutReport:
    """How everybody else fares beside the held-out users, and whether it may be believed."""

    wanted: WantedHoldout
    since: float
    until: float
    share: float
    users: Mapping[str, int]
    seen: SplitCheck
    """Of all users who came."""
    scored: SplitCheck
    """Of users with scored answers."""
    n_in_both: int
    report: Report

    def to_json(self) -> dict[str, object]:
        return {
            "experiment": HOLDOUT,
            "alias": self.wanted.alias,
            "since": self.since,
            "until": self.until,
            "share": self.share,
            "users": dict(self.users),
            "users_in_both": self.n_in_both,
            "split": {"assigned": split_json(self.seen), "scored": split_json(self.scored)},
            "alpha": self.report.alpha,
            "effects": self.report.rows(),
        }

    def warnings(self) -> list[str]:
        """What stands against the whole report, in plain words."""
        found = split_warnings({"all": self.seen, "scored": self.scored})
        if self.n_in_both:
            found.append(
                f"{self.n_in_both} users were held out at times only, and count where they were first: "
                "the salt was changed"
            )
        return found

    def summary(self) -> str:
        """What is compared, in plain words."""
        first, last = (datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M") for at in (self.since, self.until))
        return (
            f"{self.wanted.alias}, {first} to {last} UTC: {self.users[HOLDOUT]} held-out users "
            f"({self.share:g} of all were to be) beside {self.users[EVERYBODY_ELSE]} others, "
            "who saw the same champions and every experiment"
        )

    def to_html(self) -> str:
        facts: dict[str, object] = {"compared": self.summary()}
        facts |= {f"warning {number}": warning for number, warning in enumerate(self.warnings(), 1)}
        return page(self.report, title=f"Hold-out of {self.wanted.alias}", facts=facts)


def report_holdout(database: Database, wanted: WantedHoldout, *, now: float) -> HoldoutReport:
    """Read what happened to both sides, and compare it.

    Raises:
        NegativeVerdict: nobody was held out, or everybody.
    """
    since = now - wanted.days * DAY_S
    found = read_holdout(database, wanted.alias, since=since, now=now, return_days=wanted.return_days)
    if found is None:
        raise NegativeVerdict(
            f"nobody of {wanted.alias} was held out in the last {wanted.days:g} days; "
            "`serving.holdout.share` says how many are"
        )
    users = users_of(found.table)
    if len(users) < 2:
        raise NegativeVerdict(
            f"{wanted.alias} has no users beside the {users.get(HOLDOUT, 0)} held-out ones to compare"
        )
    metrics = built_in(is_ramp=False, maturity_s=wanted.maturity_s)
    return HoldoutReport(
        wanted=wanted,
        since=found.since,
        until=now,
        share=found.share,
        users=users,
        seen=_split(found, found.table["user_id"] >= 0),
        scored=_split(found, found.table["scored"] > 0),
        n_in_both=found.n_in_both,
        report=analyse(found.table, metrics, columns=Columns(created_at="created_at"), control=HOLDOUT, now=now),
    )


def _split(found: Beside, is_kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> SplitCheck:
    kept: Table = {name: found.table[name][is_kept] for name in ("user_id", "variant")}
    return check_split(users_of(kept), {HOLDOUT: found.share, EVERYBODY_ELSE: 1 - found.share})
