"""Held-out users beside everybody else: who belongs where, whether that may be believed, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from ab_testing.assignment import assign
from ab_testing.experiment import CONTROL, HOLDOUT, TREATMENT, Experiment, Holdout, Route, Variant
from ab_testing.experiment_table import DAY_S, EVERYBODY_ELSE
from ab_testing.holdout_report import HoldoutReport, WantedHoldout, report_holdout
from feedback.interactions import Interaction
from feedback.store import Score, save_scores
from feedback.tombstones import forgotten
from pawl.database import Database
from pawl.errors import NegativeVerdict
from tests.pawl.records import save, served

ALIAS, NOW = "assistant", 40 * DAY_S
SPLIT = Experiment("tone", "salt", (Variant(CONTROL, "base-model", 0.5), Variant(TREATMENT, "base--r1", 0.5)))
ROUTE = Route(ALIAS, 1, "base-model", SPLIT, holdout=Holdout(0.25, "pawl"))
WANTED = WantedHoldout(ALIAS)
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def asked(number: int, user: str, *, days_ago: float = 1.0, route: Route = ROUTE, **changes: Any) -> Interaction:
    """As a gateway with this route records it."""
    found = assign(route, user)
    fields: dict[str, Any] = {
        "unit_id": user, "user_id": user, "created_at": NOW - days_ago * DAY_S + number, "model": found.model,
        "experiment": found.experiment, "assigned_variant": found.variant, "served_variant": found.variant,
        "probability": found.probability, "is_analysed": found.is_analysed,
    }  # fmt: skip
    return served(number, **(fields | changes))


def fill(database: Database, n_users: int = 400) -> None:
    """The treatment's answers are toxic to every second user; nobody else's are."""
    rows = [asked(number, f"user-{number}") for number in range(n_users)]
    save(database, rows)
    toxic = [one.assigned_variant == TREATMENT and number % 2 == 0 for number, one in enumerate(rows)]
    save_scores(
        database,
        [Score(one.id, 0.5, is_toxic, "comply", False, "test", 1.0) for one, is_toxic in zip(rows, toxic, strict=True)],
    )


def report(database: Database, wanted: WantedHoldout = WANTED) -> HoldoutReport:
    return report_holdout(database, wanted, now=NOW)


def test_what_experiments_did_to_everybody_else_is_seen_beside_those_they_left_alone(database: Database) -> None:
    fill(database)
    found = report(database)
    assert sum(found.users.values()) == 400
    assert 70 < found.users[HOLDOUT] < 130
    (toxicity,) = [row for row in found.report.rows() if row["metric"] == "toxicity"]
    assert (toxicity["control_value"], toxicity["treatment"], toxicity["verdict"]) == (0.0, EVERYBODY_ELSE, "worse")
    assert toxicity["treatment_value"] == pytest.approx(0.25, abs=0.06)
    assert found.warnings() == []
    assert (found.share, found.seen.expected[HOLDOUT]) == (0.25, 100.0)
    assert "toxicity" in found.to_html()


@ON_SQLITE
def test_who_cannot_be_compared_is_on_no_side(database: Database) -> None:
    fill(database)
    before = report(database).users
    save(
        database,
        [
            asked(1001, "nobody", user_id=None),
            asked(1002, "elsewhere", alias="another"),
            asked(1003, "long ago", days_ago=30.0),
            asked(1004, "tester", experiment="tone", assigned_variant=TREATMENT, probability=1.0, is_analysed=False),
        ],
    )
    assert report(database).users == before
    save(database, [asked(1005, "a key", user_id=None, key_id="key_1")])
    assert sum(report(database).users.values()) == 401
    save(database, [forgotten(asked(1100 + number, "erased", key_id="key_1")) for number in range(5)])
    assert sum(report(database).users.values()) == 401, "what is left of one person is not one user for each answer"


@ON_SQLITE
def test_only_the_time_of_the_present_share_is_looked_at(database: Database) -> None:
    smaller = Route(ALIAS, 1, "base-model", SPLIT, holdout=Holdout(0.05, "pawl"))
    save(database, [asked(2000 + number, f"user-{number}", days_ago=9.0, route=smaller) for number in range(400)])
    fill(database)
    found = report(database)
    assert (found.share, found.warnings()) == (0.25, [])
    assert found.since > NOW - 1.001 * DAY_S


@ON_SQLITE
def test_another_salt_and_lost_users_stand_against_the_report(database: Database) -> None:
    fill(database)
    others = Route(ALIAS, 1, "base-model", SPLIT, holdout=Holdout(0.25, "another"))
    save(database, [asked(3000 + number, f"user-{number}", days_ago=0.5, route=others) for number in range(50)])
    (warning,) = report(database).warnings()
    assert "users were held out at times only" in warning
    crowd = (asked(4000 + number, f"guest-{number}", days_ago=0.3) for number in range(300))
    save(database, [one for one in crowd if one.experiment == HOLDOUT])
    assert "the split of all users is not the one intended" in report(database).warnings()[0]


@ON_SQLITE
def test_without_a_side_there_is_no_report(database: Database) -> None:
    with pytest.raises(
        NegativeVerdict, match=r"nobody of assistant was held out in the last 28 days; `serving.holdout"
    ):
        report(database)
    everybody = (asked(number, f"user-{number}") for number in range(50))
    save(database, [one for one in everybody if one.experiment == HOLDOUT])
    with pytest.raises(NegativeVerdict, match="no users beside the"):
        report(database)
