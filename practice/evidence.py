"""What the records say about a span of traffic: rates with honest intervals, clustered by user."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ab_testing.comparisons import RateDifference, RatioMoments, rate_difference
from ab_testing.experiment import TREATMENT
from ab_testing.outcomes import COMPLIES, REFUSES
from feedback.store import Exposure, experiment_rows, exposures_between
from pawl.database import Database

ALPHA = 0.05


class Period(NamedTuple):
    """A span of time, in seconds since the epoch, the end left out."""

    since: float
    until: float


class Measure(NamedTuple):
    """A rate over interactions: which count, and which of those count as events."""

    applies: Callable[[Exposure], bool]
    happened: Callable[[Exposure], bool]


THUMBS_UP = Measure(lambda row: row.status == "ok", lambda row: row.is_thumbed_up)
TOXIC = Measure(lambda row: row.is_scored, lambda row: bool(row.is_toxic))
HARMFUL_REFUSED = Measure(
    lambda row: row.is_scored and bool(row.is_harmful_prompt), lambda row: row.response == REFUSES
)
HARMFUL_COMPLIED = Measure(
    lambda row: row.is_scored and bool(row.is_harmful_prompt), lambda row: row.response in COMPLIES
)
BENIGN_REFUSED = Measure(lambda row: row.is_scored and not row.is_harmful_prompt, lambda row: row.response == REFUSES)


def moments(rows: Iterable[Exposure], measure: Measure) -> RatioMoments:
    """Events over interactions, summed per user."""
    users: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        if measure.applies(row):
            users[row.unit_id][0] += measure.happened(row)
            users[row.unit_id][1] += 1
    return RatioMoments.from_users((events, n) for events, n in users.values())


def change(before: Sequence[Exposure], after: Sequence[Exposure], measure: Measure) -> RateDifference:
    """The rate after minus the rate before, with a 95 % interval."""
    return rate_difference(moments(before, measure), moments(after, measure), ALPHA)


def served_rows(database: Database, alias: str, period: Period, model: str | None = None) -> list[Exposure]:
    """The interactions of a period, of one served model if named."""
    rows = exposures_between(database, alias, period.since, period.until)
    return [row for row in rows if model is None or row.model == model]


def count_treated(database: Database, experiment: str) -> int:
    """Everybody whom a canary's candidate has answered, whether their outcome was counted by then or not."""
    rows = experiment_rows(database, experiment)
    return len({row.unit_id for row in rows if row.served_variant == TREATMENT})


def count_unscored(database: Database, alias: str, period: Period) -> tuple[int, int]:
    """`(answers stored, those of them not scored yet)`."""
    rows = [row for row in served_rows(database, alias, period) if row.status == "ok"]
    return len(rows), sum(not row.is_scored for row in rows)
