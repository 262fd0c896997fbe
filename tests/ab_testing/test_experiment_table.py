"""An experiment's table tells what became of every interaction of its users, and its report adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ab_testing.analysis import Columns, analyse
from ab_testing.built_in_metrics import EXPERIMENT_COLUMNS, built_in
from ab_testing.experiment_report import Wanted, report_experiment
from ab_testing.experiment_table import DAY_S, PAST_DAYS, Table, read_experiment, users_of
from feedback.interactions import Interaction, Status
from feedback.store import Score, save_scores
from pawl.database import Database
from tests.pawl.records import feedback, interaction_id, save, served

KEY = "tone"
FOREVER = 1e9


def shown(number: int, user: str, variant: str = "control", **changes: Any) -> Interaction:
    fields: dict[str, Any] = {
        "unit_id": user, "experiment": KEY, "assigned_variant": variant, "served_variant": variant, "is_analysed": True,
        "completion_tokens": 20, "latency_ms": 500.0, "first_byte_ms": 100.0,
    }  # fmt: skip
    return served(number, **(fields | changes))


def row(table: Table, created_at: float) -> dict[str, Any]:
    (place,) = np.flatnonzero(table["created_at"] == created_at)
    return {name: column[place].item() for name, column in table.items()}


def test_every_column_is_there_and_of_one_length(database: Database) -> None:
    for interactions in ([], [shown(1, "ann")]):
        save(database, interactions)
        table = read_experiment(database, KEY, now=FOREVER)
        assert set(table) == set(EXPERIMENT_COLUMNS)
        assert {len(column) for column in table.values()} == {len(interactions)}
    assert users_of(table) == {"control": 1}


def test_what_was_said_and_scored_stands_in_the_row_it_is_about(database: Database) -> None:
    again = served(5, regenerate_of=interaction_id(2), unit_id="bob")
    save(
        database,
        [shown(1, "ann"), shown(2, "bob"), shown(3, "cy"), again],
        [
            feedback(interaction_id(1), "thumbs", "up", created_at=10.0),
            feedback(interaction_id(1), "rating", 0.0, user_id="dan", feedback_id="fb_dan", created_at=11.0),
            feedback(interaction_id(2), "thumbs", "up", created_at=10.0),
            feedback(interaction_id(2), "thumbs", None, created_at=12.0, is_retraction=True),
            feedback(interaction_id(3), "edit", "Better so.", created_at=10.0),
        ],
    )
    scores = [
        Score(interaction_id(1), 0.9, True, "comply", True, "test", 1.0),
        Score(interaction_id(3), 0.1, False, "refuse", False, "test", 1.0),
    ]
    save_scores(database, scores)
    table = read_experiment(database, KEY, now=FOREVER)
    first, second, third = (row(table, float(number)) for number in (1, 2, 3))
    assert len(table["created_at"]) == 3, "what is outside of the experiment has no row"
    assert (first["thumbs_up"], first["thumbs_down"], first["edited"]) == (1, 1, 0)
    assert (second["thumbs_up"], second["regenerated"], third["regenerated"], third["edited"]) == (0, 1, 0, 1)
    assert (first["toxic"], first["harmful_asked"], first["harmful_complied"], first["benign_asked"]) == (1, 1, 1, 0)
    assert (third["scored"], third["benign_refused"], third["harmful_asked"]) == (1, 1, 0)
    assert (second["scored"], second["toxic"]) == (0, 0)
    assert (first["tokens"], first["latency_s"], first["ttft_s"]) == (20.0, 0.5, 0.1)


@pytest.mark.parametrize(
    ("status", "counted", "failed"),
    [
        (Status.UPSTREAM_ERROR, 1, 1),
        (Status.CLIENT_DISCONNECTED, 1, 0),
        (Status.REJECTED, 0, 0),
        (Status.SHUTDOWN, 0, 0),
    ],
)
def test_what_has_no_answer_weighs_nothing_but_in_the_errors(
    database: Database, status: Status, counted: int, failed: int
) -> None:
    save(database, [shown(1, "ann", status=status)], [feedback(interaction_id(1), "thumbs", "down")])
    found = row(read_experiment(database, KEY, now=FOREVER), 1.0)
    assert (found["counted"], found["failed"], found["answered"], found["thumbs_down"]) == (counted, failed, 0, 0)
    assert np.isnan([found["tokens"], found["latency_s"]]).all()


def test_a_request_that_the_control_refused_as_well_is_no_fallback(database: Database) -> None:
    save(database, [shown(1, "ann", "treatment", served_variant="control", status=Status.REJECTED)])
    found = row(read_experiment(database, KEY, now=FOREVER), 1.0)
    assert (found["counted"], found["fallback"]) == (0, 0)


def test_users_count_by_where_they_were_first(database: Database) -> None:
    """Who was first seen outside the zones that are analysed was moved by a later step, and not by chance."""
    save(
        database,
        [
            shown(1, "moved", is_analysed=False),
            shown(2, "moved", "treatment"),
            shown(3, "stays", "treatment", phase=1),
            shown(4, "stays", "control", phase=2, served_variant="treatment"),
        ],
    )
    table = read_experiment(database, KEY, now=FOREVER)
    assert users_of(table) == {"treatment": 1}
    assert (table["phase"].tolist(), table["fallback"].tolist()) == ([1, 1], [0.0, 1.0])


def test_who_returns_is_known_once_everybody_had_the_time(database: Database) -> None:
    save(
        database,
        [
            shown(1, "ann", created_at=0.0),
            shown(2, "ann", created_at=2 * DAY_S),
            shown(3, "bob", created_at=10.0),
            shown(4, "bob", created_at=60.0),
            shown(5, "cy", created_at=9 * DAY_S),
        ],
    )
    table = read_experiment(database, KEY, now=10 * DAY_S, return_days=7.0)
    assert (table["may_return"].sum(), table["returned"].sum()) == (2, 1)
    assert row(table, 0.0)["returned"] == 1
    assert row(table, 2 * DAY_S)["tenure"] == "first week"
    assert row(table, 60.0)["tenure"] == "first day"


def test_what_users_did_before_takes_noise_away(database: Database) -> None:
    """What somebody clicked and waited for before the experiment stands on the first row, and nowhere else."""
    began = PAST_DAYS * DAY_S
    outside: dict[str, Any] = {"experiment": None, "is_analysed": False}
    past = [
        shown(1, "ann", created_at=began - 60.0, latency_ms=2000.0, **outside),
        shown(2, "ann", created_at=began - 50.0, latency_ms=1000.0, completion_tokens=None, **outside),
        shown(3, "ann", created_at=began - 40.0, status=Status.UPSTREAM_ERROR, **outside),
        shown(4, "ann", created_at=-10.0, **outside),
        shown(5, "bob", created_at=began - 30.0, alias="other", **outside),
    ]
    now = [shown(10 + n, "ann" if n < 2 else "bob", created_at=began + n) for n in range(4)]
    thumbs = [
        feedback(interaction_id(1), "thumbs", "up", created_at=began - 59.0),
        feedback(interaction_id(2), "thumbs", "up", created_at=began - 49.0),
        feedback(interaction_id(2), "thumbs", "down", created_at=began - 48.0),
        feedback(interaction_id(1), "thumbs", "down", created_at=began + 1.0),
    ]
    save(database, [*past, *now], thumbs)
    table = read_experiment(database, KEY, now=FOREVER)
    ann, bob = row(table, began), row(table, began + 2)
    sums = {name: ann[name] for name in ann if name.startswith("before_")}
    assert sums == {
        "before_answers": 2.0, "before_tokens": 20.0, "before_latency_s": 3.0, "before_ttft_s": 0.2,
        "before_thumbs_up": 1.0, "before_thumbs_down": 1.0,
    }  # fmt: skip
    assert np.isnan(bob["before_answers"])
    assert np.isnan(table["before_answers"][1:]).all()


def test_a_report_uses_the_past(database: Database) -> None:
    rng = np.random.default_rng(3)
    habits, began = rng.integers(1, 6, 160), 1000.0
    rows: list[Interaction] = []
    for user, habit in enumerate(habits.tolist()):
        name = f"user {user}"
        rows += [shown(len(rows) + n, name, experiment=None, is_analysed=False, created_at=10.0) for n in range(habit)]
        n_now = max(1, habit + int(rng.integers(-1, 2)))
        start = len(rows)
        variant = ("control", "treatment")[user % 2]
        rows += [shown(start + n, name, variant, probability=0.5, created_at=began + user) for n in range(n_now)]
    save(database, rows, [])
    found = report_experiment(database, Wanted(KEY), now=FOREVER)
    effect = found.report.effect("answers_per_user")
    assert effect.method == "cuped"
    assert (effect.variance_reduction or 0) > 0.4
    assert found.users == {"control": 80, "treatment": 80}
    assert found.warnings() == []


@pytest.mark.parametrize("is_ramp", [False, True])
def test_the_report_is_about_all_that_is_built_in(database: Database, is_ramp: bool) -> None:
    rows = [
        shown(number, f"user {number // 2}", ("control", "treatment")[number // 2 % 2], phase=is_ramp * (number // 200))
        for number in range(400)
    ]
    liked = [one for place, one in enumerate(rows) if place % (3 if one.assigned_variant == "treatment" else 11) == 0]
    save(database, rows, [feedback(one.id, "thumbs", "up") for one in liked])
    table = read_experiment(database, KEY, now=FOREVER)
    metrics = built_in(is_ramp=is_ramp)
    report = analyse(table, metrics, columns=Columns(stratum="phase" if is_ramp else None))
    assert [effect.metric for effect in report] == [metric.name for metric in metrics]
    effect = report.effect("thumbs_up_rate")
    assert effect.verdict == "better"
    assert effect.treatment_value.value is not None
    assert effect.treatment_value.value > 0.25 > (effect.control_value.value or 0.0)
    assert report.effect("toxicity").verdict == "insufficient_data"
