"""Who counts, once and in which order, whatever the ticks; and how much harm a user saw."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ab_testing.canary_state import CanaryConfig, GuardrailMetric, UserOutcome
from ab_testing.outcomes import (
    HARMFUL_COMPLIANCE,
    OVER_REFUSAL,
    THUMBS_DOWN,
    TOXICITY,
    matured_users,
    outcome_of,
)
from ab_testing.rollout_rules import canary_config
from pawl.errors import ConfigurationError
from pawl.settings import RolloutSettings

METRICS = canary_config(RolloutSettings()).metrics
MATURITY_S = 10.0
LATE = 10_000.0


class Row(NamedTuple):
    """One interaction; `scored_at` is when its scores become visible."""

    unit_id: str = "ann"
    created_at: float = 0.0
    is_analysed: bool = True
    scored_at: float = 0.0
    assigned_variant: str = "treatment"
    served_variant: str = "treatment"
    probability: float = 0.5
    phase: int = 0
    status: str = "ok"
    is_scorable: bool = True
    is_scored: bool = True
    is_toxic: bool | None = False
    response: str | None = "comply"
    is_harmful_prompt: bool | None = False
    is_thumbed_down: bool = False
    is_regenerated: bool = False
    is_edited: bool = False
    latency_ms: float = 10.0
    first_byte_ms: float | None = 5.0
    completion_tokens: int | None = 5


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
        matured = matured_users(told, zones, METRICS, cursor=cursor, maturity_s=MATURITY_S, now=now)
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
    before = matured_users(told, zones, METRICS, cursor=None, maturity_s=MATURITY_S, now=now)
    random.shuffle(told)
    assert matured_users(told, zones, METRICS, cursor=None, maturity_s=MATURITY_S, now=now) == before


def test_nobody_overtakes_a_user_whose_answers_have_no_scores_yet() -> None:
    rows = [Row("ann", 0.0), unscored(Row("ben", 1.0)), Row("cat", 2.0)]
    zones = dict.fromkeys(("ann", "ben", "cat"), True)
    matured = matured_users(rows, zones, METRICS, cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert [outcome.unit for outcome in matured.outcomes] == ["ann"]
    assert matured.is_waiting_for_scores
    assert matured.cursor == (0.0, "ann")


def test_an_answer_that_was_not_kept_never_gets_scores_and_is_not_waited_for() -> None:
    private = unscored(Row("ann"))._replace(is_scorable=False, is_thumbed_down=True)
    matured = matured_users([private], {"ann": True}, METRICS, cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert not matured.is_waiting_for_scores
    assert matured.outcomes[0].values == {
        THUMBS_DOWN: 1.0,
        TOXICITY: None,
        HARMFUL_COMPLIANCE: None,
        OVER_REFUSAL: None,
    }


def test_what_happens_after_the_maturity_does_not_count() -> None:
    rows = [Row(created_at=0.0), unscored(Row(created_at=MATURITY_S + 1))]
    matured = matured_users(rows, {"ann": True}, METRICS, cursor=None, maturity_s=MATURITY_S, now=100.0)
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
    outcome = outcome_of(rows, METRICS)
    assert outcome.values == {
        THUMBS_DOWN: 1 / 6,
        TOXICITY: 1 / 6,
        HARMFUL_COMPLIANCE: 0.5,
        OVER_REFUSAL: 0.5,
    }


def test_a_control_user_has_the_treatments_probability_and_the_phase_of_the_first_exposure() -> None:
    rows = [Row(assigned_variant="control", probability=0.9, phase=1), Row(assigned_variant="control", phase=2)]
    outcome = outcome_of(rows, METRICS)
    assert (outcome.is_treatment, outcome.phase) == (False, 1)
    assert abs(outcome.treatment_probability - 0.1) < 1e-12


def declared(name: str, threshold: float | None = None) -> GuardrailMetric:
    return GuardrailMetric(name, 0.05, 1.0, "primary", threshold)


@pytest.mark.parametrize(
    ("metric", "rows", "harm"),
    [
        (declared("regeneration"), [Row(is_regenerated=True), Row(), Row(status="upstream_error")], 0.5),
        (declared("edit"), [Row(is_edited=True), Row(), Row(), Row()], 0.25),
        (declared("errors"), [Row(status="upstream_error"), Row(), Row(status="rejected")], 0.5),
        (declared("errors"), [Row(status="shutdown")], None),
        (declared("fallback"), [Row(served_variant="control"), Row(status="client_disconnected")], 0.5),
        (declared("slow_answers", 1000.0), [Row(latency_ms=1000.0), Row(latency_ms=1000.1)], 0.5),
        (declared("slow_answers", 1000.0), [Row(latency_ms=float("nan"))], None),
        (declared("slow_first_token", 100.0), [Row(first_byte_ms=101.0), Row(first_byte_ms=None)], 1.0),
        (declared("long_answers", 200.0), [Row(completion_tokens=201), Row(completion_tokens=None)], 1.0),
    ],
)
def test_what_else_can_be_declared(metric: GuardrailMetric, rows: list[Row], harm: float | None) -> None:
    assert outcome_of(rows, [metric]).values == {metric.name: harm}


def test_users_wait_for_scores_only_where_a_metric_needs_them() -> None:
    rows = [unscored(Row("ann"))]
    matured = matured_users(rows, {"ann": True}, [declared("errors")], cursor=None, maturity_s=MATURITY_S, now=100.0)
    assert [outcome.values for outcome in matured.outcomes] == [{"errors": 0.0}]


def settings_with(*metrics: dict[str, object]) -> RolloutSettings:
    return RolloutSettings.model_validate({"metrics": metrics})


def test_what_decides_is_what_was_declared() -> None:
    config = canary_config(
        settings_with(
            {"name": "regeneration", "margin": 0.05, "weight": 0.5, "role": "primary"},
            {"name": "toxicity", "margin": 0.02, "weight": 0.3},
            {"name": "slow_answers", "margin": 0.1, "weight": 0.2, "role": "signal", "threshold": 20_000},
        )
    )
    assert [(metric.name, metric.role, metric.threshold, metric.counts_events) for metric in config.metrics] == [
        ("regeneration", "primary", None, False),
        ("toxicity", "guardrail", None, True),
        ("slow_answers", "signal", 20_000.0, False),
    ]
    assert CanaryConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("metric", "path"),
    [
        ({"name": "slow_answers", "margin": 0.1, "weight": 1, "role": "primary"}, r"rollout\.metrics\.0\.threshold"),
        ({"name": "edit", "margin": 0.1, "weight": 1, "role": "primary", "threshold": 2}, r"rollout\.metrics\.0\.thr"),
        ({"name": "edit", "margin": 0.1, "weight": 0.9, "role": "primary"}, "rollout: the weights"),
        ({"name": "edit", "margin": 0.1, "weight": 1}, "one of them must be primary"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_told_by_its_path(metric: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigurationError, match=path):
        canary_config(settings_with(metric))
