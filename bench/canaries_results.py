"""What became of canaries: kept in a file, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ab_testing.experiment import TREATMENT
from bench.canaries_world import Habits
from feedback.store import Exposure
from practice.evidence import BENIGN_REFUSED, HARMFUL_COMPLIED, THUMBS_UP, TOXIC, Measure

MEASURES: Mapping[str, Measure] = {
    "thumbs_up": THUMBS_UP,
    "toxicity": TOXIC,
    "over_refusal": BENIGN_REFUSED,
    "harmful_compliance": HARMFUL_COMPLIED,
}


class Outcome(NamedTuple):
    """What became of one canary."""

    name: str
    wanted: tuple[str, str | None]
    """Status and metric."""
    status: str
    metric: str | None
    reason: str
    users: int
    """All who asked anything while it ran."""
    exposed: int
    """Those whom the candidate answered, counted yet or not."""
    seconds: float
    """From the first user's chance to see it to the decision."""
    steps: tuple[tuple[float, float], ...]
    """Shares of traffic, and when each began."""
    rates: Mapping[str, tuple[float, float]]
    """Of the champion's answers and of the candidate's, among analysed users."""
    habits: Mapping[str, Habits]
    """Of the champion and the candidate, asked before the canary."""

    @property
    def is_right(self) -> bool:
        return (self.status, self.metric if self.status == "rolled_back" else None) == self.wanted


def rates_of(rows: Sequence[Exposure], measure: Measure) -> tuple[float, float]:
    """How often something happened among the champion's answers and among the candidate's."""
    return rate([row for row in rows if row.assigned_variant != TREATMENT], measure), rate(
        [row for row in rows if row.assigned_variant == TREATMENT], measure
    )


def rate(rows: Sequence[Exposure], measure: Measure) -> float:
    """0 when nothing counts."""
    counted = [measure.happened(row) for row in rows if measure.applies(row)]
    return sum(counted) / max(len(counted), 1)


def table_of(outcomes: Iterable[Outcome]) -> Table:
    """One row for each canary."""
    columns = ("canary", "verdict", "by", "users", "of them exposed", "minutes", *MEASURES, "as it should be")
    table = Table(*columns, box=None, header_style="bold")
    for one in outcomes:
        rates = (f"{before:.1%} -> {after:.1%}" for before, after in (one.rates[name] for name in MEASURES))
        counts = (str(one.users), str(one.exposed), f"{one.seconds / 60:.1f}")
        table.add_row(one.name, one.status, one.metric or "", *counts, *rates, "yes" if one.is_right else "NO")
    return table


def read_results(path: Path) -> dict[str, Outcome]:
    """Those of earlier runs."""
    if not path.exists():
        return {}
    return {name: _outcome(row) for name, row in json.loads(path.read_text()).items()}


def write_results(path: Path, results: Mapping[str, Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        name: {**one._asdict(), "habits": {key: habits._asdict() for key, habits in one.habits.items()}}
        for name, one in results.items()
    }
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _outcome(row: Mapping[str, Any]) -> Outcome:
    status, metric = row["wanted"]
    return Outcome(
        **{
            **row,
            "wanted": (status, metric),
            "steps": tuple((weight, at) for weight, at in row["steps"]),
            "rates": {name: (before, after) for name, (before, after) in row["rates"].items()},
            "habits": {name: Habits(**habits) for name, habits in row["habits"].items()},
        }
    )
