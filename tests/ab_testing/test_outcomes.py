"""Who counts, once and in which order, whatever the ticks; and how much harm a user saw."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from ab_testing.canary_state import UserOutcome
from ab_testing.outcomes import (
    HARMFUL_COMPLIANCE,
    OVER_REFUSAL,
    THUMBS_DOWN,
    TOXICITY,
    matured_users,
    outcome_of,
)

MATURITY_S = 10.0
LATE = 10_000.0


class Row(NamedTuple):
    """One interaction; `scored_at` is when its scores become visible."""

    unit_id: str = "ann"
    created_at: float = 0.0
    is_analysed: bool = True
    scored_at: float = 0.0
    assigned_variant: str = "treatment"
    probability: float = 0.5
    phase: int = 0
    status: str = "ok"
    is_scorable: bool = True
    is_scored: bool = True
    is_toxic: bool | None = False
    response: str | None = "comply"
    is_harmful_prompt: bool | None = False
    is_thumbed_down: bool = False


def unscored(row: Row) -> Row:
    return row._replace(is_scored=False, is_toxic=None, response=None, is_harmful_prompt=None)


def seen_at(rows: list[Row], now: float) -> tuple[list[Row], dict[str, bool]]:
    """What the store tells at `now`: the analysed rows, and the zone of each unit's first exposure."""
    visible = sorted((row for row in rows if row.created_at <= now), key=lambda row: row.created_at)
    zones: dict[str, bool] = {}
    for row in visible:
        zones.setdefault(row.unit_id, row.is_analysed)
    told = [row if row.scored_at <= now else unscored(row) for row in visible if row.is_analysed]
    return told, zones


@st.composite
def histories(draw: st.DrawFn) -> list[Row]:
    """Users who come back; some are first seen in the unanalysed rest and moved into the treatment later."""
    rows: list[Row] = []
    for unit in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)):
        times = draw(st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=4))
        analysed_from = draw(st.sampled_from([0, 0, 0, 30]))
        for at in times:
            delay = draw(st.sampled_from([0.0, 5.0, 40.0]))
            status = draw(st.sampled_from(["ok", "ok", "upstream_error"]))
            rows.append(Row(unit, float(at), at >= analysed_from, at + delay, status=status))
    return rows


def tick_all(rows: list[Row], ticks: list[float]) -> tuple[list[UserOutcome], list[tuple[float, str]]]:
    counted: list[UserOutcome] = []
    cursor: tuple[float, str] | None = None
    cursors: list[tuple[float, str]] = []
    for now in ticks:
        told, zones = seen_at(rows, now)
        matured = matured_users(told, zones, cursor=cursor, maturity_s=MATURITY_S, now=now)
        counted += matured.outcomes
        cursor = matured.cursor
        cursors += [cursor] if cursor else []
    return counted, cursors


@given(histories(), st.lists(st.floats(0, 200), max_size=12))
def test_every_analysed_user_counts_once_and_in_one_order_whatever_the_ticks(
    rows: list[Row], ticks: list[float]
) -> None:
    counted, cursors = tick_all(rows, [*sorted(ticks), LATE])
    at_once, _ = tick_all(rows, [LATE])
    assert counted == at_once
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.created_at):
        first.setdefault(row.unit_id, row)
    expected = sorted((row.created_at, unit) for unit, row in first.items() if row.is_analysed)
    assert [outcome.unit for outcome in counted] == [unit for _, unit in expected]
    assert cursors == sorted(cursors)


@given(histories(), st.floats(0, 200), st.randoms())
def test_the_order_of_the_rows_changes_nothing(rows: list[Row], now: float, random: Random) -> None:
    told, zones = seen_at(rows, now)
    before = matured_users(told, zones, cursor=None, maturity_s=MATURITY_S, now=now)
    random.shuffle(told)
    assert matured_users(told, zones, cursor=None, maturity_s=MATURITY_S, now=now) == before


def test_nobody_overtakes_a_user_whose_answers_have_no_scores_yet() -> None:
    rows = [Row("ann", 0.0), unscored(Row("ben", 1.0)), Row("cat", 2.0)]
    zones = dict.fromkeys(("ann", "ben", "cat"), True)
    matured = matured_users(rows, zones, cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert [outcome.unit for outcome in matured.outcomes] == ["ann"]
    assert matured.is_waiting_for_scores
    assert matured.cursor == (0.0, "ann")


def test_an_answer_that_was_not_kept_never_gets_scores_and_is_not_waited_for() -> None:
    private = unscored(Row("ann"))._replace(is_scorable=False, is_thumbed_down=True)
    matured = matured_users([private], {"ann": True}, cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert not matured.is_waiting_for_scores
    assert matured.outcomes[0].values == {
        THUMBS_DOWN: 1.0,
        TOXICITY: None,
        HARMFUL_COMPLIANCE: None,
        OVER_REFUSAL: None,
    }


def test_what_happens_after_the_maturity_does_not_count() -> None:
    rows = [Row(created_at=0.0), unscored(Row(created_at=MATURITY_S + 1))]
    matured = matured_users(rows, {"ann": True}, cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert [outcome.values[THUMBS_DOWN] for outcome in matured.outcomes] == [0.0]


def test_the_harm_a_user_saw_by_metric() -> None:
    rows = [
        Row(is_thumbed_down=True, is_toxic=True),
        Row(response="refuse"),
        Row(is_harmful_prompt=True, response="comply"),
        Row(is_harmful_prompt=True, response="refuse"),
        Row(is_harmful_prompt=True, response="partial"),
        Row(is_harmful_prompt=True, response="refuse"),
        unscored(Row(status="upstream_error")),
    ]
    outcome = outcome_of(rows)
    assert outcome.values == {
        THUMBS_DOWN: 1 / 6,
        TOXICITY: 1 / 6,
        HARMFUL_COMPLIANCE: 0.5,
        OVER_REFUSAL: 0.5,
    }


def test_a_control_user_has_the_treatments_probability_and_the_phase_of_the_first_exposure() -> None:
    rows = [Row(assigned_variant="control", probability=0.9, phase=1), Row(assigned_variant="control", phase=2)]
    outcome = outcome_of(rows)
    assert (outcome.is_treatment, outcome.phase) == (False, 1)
    assert abs(outcome.treatment_probability - 0.1) < 1e-12
