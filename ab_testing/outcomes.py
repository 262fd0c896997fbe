"""From an experiment's interactions to matured users: who counts, and how much harm each saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from ab_testing.canary_state import GuardrailMetric, UserOutcome
from ab_testing.experiment import TREATMENT

THUMBS_DOWN = "thumbs_down"
TOXICITY = "toxicity"
HARMFUL_COMPLIANCE = "harmful_compliance"
OVER_REFUSAL = "over_refusal"
REGENERATION = "regeneration"
EDIT = "edit"
ERRORS = "errors"
FALLBACK = "fallback"
SLOW_ANSWERS = "slow_answers"
SLOW_FIRST_TOKEN = "slow_first_token"
LONG_ANSWERS = "long_answers"

REFUSES = "refuse"
COMPLIES = frozenset({"comply", "partial"})
FAILED = "upstream_error"
ANSWERED = "ok"
ACCOUNTABLE = frozenset({ANSWERED, FAILED, "client_disconnected"})
"""A request that the engine refused, or that a restart cut short, says nothing of the variant."""


class Exposure(Protocol):
    """One interaction of an analysed user, as the store tells of it."""

    @property
    def unit_id(self) -> str: ...
    @property
    def created_at(self) -> float: ...
    @property
    def assigned_variant(self) -> str: ...
    @property
    def served_variant(self) -> str: ...
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
    @property
    def is_regenerated(self) -> bool: ...
    @property
    def is_edited(self) -> bool: ...
    @property
    def latency_ms(self) -> float: ...
    @property
    def first_byte_ms(self) -> float | None: ...
    @property
    def completion_tokens(self) -> int | None: ...


class UserHarm(NamedTuple):
    """A harm that is the share of a user's interactions in which it happened."""

    applies: Callable[[Exposure], bool]
    """Whether an interaction could have shown it."""
    happened: Callable[[Exposure, float], bool]
    """Whether it did; the number is the metric's threshold."""
    has_threshold: bool = False
    needs_scores: bool = False
    is_rare: bool = False
    """Few users ever see it, so its first event for each is counted the moment it is known, besides the share."""


def _is_answered(row: Exposure) -> bool:
    return row.status == ANSWERED


def _is_accountable(row: Exposure) -> bool:
    return row.status in ACCOUNTABLE


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _exceeds(value: float | None, threshold: float) -> bool:
    return value is not None and value > threshold


HARMS: Final[Mapping[str, UserHarm]] = {
    THUMBS_DOWN: UserHarm(_is_answered, lambda row, _: row.is_thumbed_down),
    TOXICITY: UserHarm(
        lambda row: _is_answered(row) and row.is_toxic is not None,
        lambda row, _: bool(row.is_toxic),
        needs_scores=True,
        is_rare=True,
    ),
    HARMFUL_COMPLIANCE: UserHarm(
        lambda row: _is_answered(row) and bool(row.is_harmful_prompt),
        lambda row, _: row.response in COMPLIES,
        needs_scores=True,
        is_rare=True,
    ),
    OVER_REFUSAL: UserHarm(
        lambda row: _is_answered(row) and row.is_harmful_prompt is False,
        lambda row, _: row.response == REFUSES,
        needs_scores=True,
    ),
    REGENERATION: UserHarm(_is_answered, lambda row, _: row.is_regenerated),
    EDIT: UserHarm(_is_answered, lambda row, _: row.is_edited),
    ERRORS: UserHarm(_is_accountable, lambda row, _: row.status == FAILED),
    FALLBACK: UserHarm(_is_accountable, lambda row, _: row.served_variant != row.assigned_variant),
    SLOW_ANSWERS: UserHarm(
        lambda row: _is_answered(row) and _is_known(row.latency_ms),
        lambda row, most: _exceeds(row.latency_ms, most),
        has_threshold=True,
    ),
    SLOW_FIRST_TOKEN: UserHarm(
        lambda row: _is_answered(row) and _is_known(row.first_byte_ms),
        lambda row, most: _exceeds(row.first_byte_ms, most),
        has_threshold=True,
    ),
    LONG_ANSWERS: UserHarm(
        lambda row: _is_answered(row) and _is_known(row.completion_tokens),
        lambda row, most: _exceeds(row.completion_tokens, most),
        has_threshold=True,
    ),
}
"""All that a rollout can be decided on, by name."""


class Matured(NamedTuple):
    """Users that count now, in the order of their first exposure, and where that order stopped."""

    outcomes: tuple[UserOutcome, ...]
    cursor: tuple[float, str] | None
    waiting_since: float | None
    """First exposure of the next user, whose time has come, but some of whose answers have not been scored."""

    @property
    def is_waiting_for_scores(self) -> bool:
        return self.waiting_since is not None


def matured_users(
    rows: Iterable[Exposure],
    first_zones: Mapping[str, bool],
    metrics: Sequence[GuardrailMetric],
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
        metrics: What is measured of each user.
        cursor: First exposure (seconds) and unit of the last user counted before.
        maturity_s: A user's outcome is what happened within this time of the first exposure.
        now: Seconds since the epoch.
    """
    outcomes: list[UserOutcome] = []
    waits_for_scores = any(HARMS[metric.name].needs_scores for metric in metrics)
    for first, user_rows in _by_first_exposure(rows, first_zones):
        if cursor is not None and first <= cursor:
            continue
        if first[0] + maturity_s > now:
            break
        counted = [row for row in user_rows if row.created_at <= first[0] + maturity_s]
        if waits_for_scores and any(is_unscored(row) for row in counted):
            return Matured(tuple(outcomes), cursor, first[0])
        outcomes.append(outcome_of(counted, metrics))
        cursor = first
    return Matured(tuple(outcomes), cursor, None)


def is_unscored(row: Exposure) -> bool:
    """Whether scores are still to come. An answer that was not kept (`store: false`) never gets any."""
    return row.status == ANSWERED and row.is_scorable and not row.is_scored


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


def outcome_of(rows: Sequence[Exposure], metrics: Sequence[GuardrailMetric]) -> UserOutcome:
    """The harm that one user saw, by metric; analysed by the variant assigned, whatever was served."""
    first = rows[0]
    is_treatment = first.assigned_variant == TREATMENT
    return UserOutcome(
        unit=first.unit_id,
        is_treatment=is_treatment,
        treatment_probability=first.probability if is_treatment else 1 - first.probability,
        values={metric.name: _share(rows, metric) for metric in metrics},
        phase=first.phase,
    )


def _share(rows: Sequence[Exposure], metric: GuardrailMetric) -> float | None:
    harm = HARMS[metric.name]
    happened = [harm.happened(row, metric.threshold or 0.0) for row in rows if harm.applies(row)]
    return sum(happened) / len(happened) if happened else None
