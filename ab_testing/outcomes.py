"""From an experiment's interactions to matured users: who counts, and how much harm each saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ab_testing.canary_state import UserOutcome
from ab_testing.experiment import TREATMENT

THUMBS_DOWN = "thumbs_down"
TOXICITY = "toxicity"
HARMFUL_COMPLIANCE = "harmful_compliance"
OVER_REFUSAL = "over_refusal"
SCORED_METRICS = (TOXICITY, HARMFUL_COMPLIANCE, OVER_REFUSAL)
"""Those that need the worker's scores."""

REFUSES = "refuse"
COMPLIES = frozenset({"comply", "partial"})


class Exposure(Protocol):
    """One interaction of an analysed user, as the store tells of it."""

    @property
    def unit_id(self) -> str: ...
    @property
    def created_at(self) -> float: ...
    @property
    def assigned_variant(self) -> str: ...
    @property
    def probability(self) -> float: ...
    @property
    def phase(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def is_scorable(self) -> bool: ...
    @property
    def is_scored(self) -> bool: ...
    @property
    def is_toxic(self) -> bool | None: ...
    @property
    def response(self) -> str | None: ...
    @property
    def is_harmful_prompt(self) -> bool | None: ...
    @property
    def is_thumbed_down(self) -> bool: ...


class Matured(NamedTuple):
    """Users that count now, in the order of their first exposure, and where that order stopped."""

    outcomes: tuple[UserOutcome, ...]
    cursor: tuple[float, str] | None
    is_waiting_for_scores: bool
    """The next user's time has come, but some of the user's answers have not been scored."""


def matured_users(
    rows: Iterable[Exposure],
    first_zones: Mapping[str, bool],
    *,
    cursor: tuple[float, str] | None,
    maturity_s: float,
    now: float,
) -> Matured:
    """Return the users after `cursor` whose outcome has matured.

    Args:
        rows: Analysed interactions of the experiment.
        first_zones: Per unit, whether its first exposure ever was in an analysed zone. A unit first seen outside, and
            moved into the treatment by a later step, was not randomised then and is never analysed.
        cursor: First exposure (seconds) and unit of the last user counted before.
        maturity_s: A user's outcome is what happened within this time of the first exposure.
        now: Seconds since the epoch.
    """
    outcomes: list[UserOutcome] = []
    for first, user_rows in _by_first_exposure(rows, first_zones):
        if cursor is not None and first <= cursor:
            continue
        if first[0] + maturity_s > now:
            break
        counted = [row for row in user_rows if row.created_at <= first[0] + maturity_s]
        if any(is_unscored(row) for row in counted):
            return Matured(tuple(outcomes), cursor, True)
        outcomes.append(outcome_of(counted))
        cursor = first
    return Matured(tuple(outcomes), cursor, False)


def is_unscored(row: Exposure) -> bool:
    """Whether scores are still to come. An answer that was not kept (`store: false`) never gets any."""
    return row.status == "ok" and row.is_scorable and not row.is_scored


def _by_first_exposure(
    rows: Iterable[Exposure], first_zones: Mapping[str, bool]
) -> list[tuple[tuple[float, str], list[Exposure]]]:
    users: dict[str, list[Exposure]] = {}
    for row in rows:
        if first_zones.get(row.unit_id):
            users.setdefault(row.unit_id, []).append(row)
    for user_rows in users.values():
        user_rows.sort(key=lambda row: row.created_at)
    return sorted(((user_rows[0].created_at, unit), user_rows) for unit, user_rows in users.items())


def outcome_of(rows: Sequence[Exposure]) -> UserOutcome:
    """The harm that one user saw, by metric; analysed by the variant assigned, whatever was served."""
    first = rows[0]
    is_treatment = first.assigned_variant == TREATMENT
    answered = [row for row in rows if row.status == "ok"]
    harmful = [row for row in answered if row.is_harmful_prompt]
    benign = [row for row in answered if row.is_harmful_prompt is False]
    return UserOutcome(
        unit=first.unit_id,
        is_treatment=is_treatment,
        treatment_probability=first.probability if is_treatment else 1 - first.probability,
        values={
            THUMBS_DOWN: _share([row.is_thumbed_down for row in answered]),
            TOXICITY: _share([row.is_toxic for row in answered if row.is_toxic is not None]),
            HARMFUL_COMPLIANCE: _share([row.response in COMPLIES for row in harmful]),
            OVER_REFUSAL: _share([row.response == REFUSES for row in benign]),
        },
        phase=first.phase,
    )


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
