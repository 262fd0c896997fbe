"""A plan's numbers are those that the experiments then need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ab_testing.analysis import InvalidMetric, analyse, mean, quantile, ratio
from ab_testing.canary_state import GuardrailMetric
from ab_testing.experiment_table import DAY_S, read_traffic
from ab_testing.plan import Question, harm_rates, plan_split
from ab_testing.planning import plan_experiment, sentences
from feedback.store import Score, save_scores
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import RolloutSettings
from tests.ab_testing.test_experiment_table import shown
from tests.pawl.records import feedback, interaction_id, save

UP = ratio("up", "up", "answered", margin=0.02)


def population(users: int, seed: int) -> dict[str, NDArray[Any]]:
    """Twenty rows of each of these users, who like a fifth of all answers, some more and some less."""
    rng = np.random.default_rng(seed)
    taste = rng.beta(2, 8, users).repeat(20)
    return {
        "user_id": np.arange(users).repeat(20),
        "up": (rng.random(users * 20) < taste).astype(np.float64),
        "answered": np.ones(users * 20),
    }


def everybody(table: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return table | {"variant": np.full(len(table["user_id"]), "control")}


def test_the_users_asked_for_show_the_effect_as_often_as_promised() -> None:
    (plan,) = plan_split(everybody(population(3000, 1)), [UP], Question(100.0, effects={"up": 0.03}))
    assert plan.users is not None
    n_found = 0
    for seed in range(2, 202):
        table = population(round(plan.users), seed)
        is_treatment = table["user_id"] % 2 == 1
        more = is_treatment & (np.random.default_rng(seed).random(len(is_treatment)) < 0.03 / 0.8)
        later = table | {"variant": np.where(is_treatment, "treatment", "control"), "up": np.maximum(table["up"], more)}
        n_found += (analyse(later, [UP]).effects[0].p_value or 1.0) < 0.05
    assert 0.8 * 200 - 18 <= n_found <= 0.8 * 200 + 18, "three standard errors"


def test_to_look_at_any_time_has_its_price() -> None:
    (plan,) = plan_split(everybody(population(2000, 1)), [UP], Question(60.0, horizon_hours=100.0))
    assert plan.users is not None
    assert plan.users_at_any_look is not None
    assert 1.2 < plan.users_at_any_look / plan.users < 3
    assert plan.effect == UP.margin
    assert plan.hours == pytest.approx(plan.users / 60.0)
    (again,) = plan_split(everybody(population(2000, 1)), [UP], Question(60.0, effects={"up": plan.detectable or 0.0}))
    assert again.users == pytest.approx(6000.0, rel=1e-4), "what 100 hours bring shows what it is said to show"


def test_what_cannot_be_planned_says_why() -> None:
    table = everybody(population(50, 1))
    metrics = [quantile("p", "up", 0.9), mean("never", "no"), ratio("rare", "no", "answered"), UP]
    nothing = table | {"no": np.zeros(1000)}
    found = plan_split(nothing, metrics, Question(1.0, rates={"rare": 0.01}, effects={"rare": 0.005}))
    assert [plan.reason is None for plan in found] == [False, False, True, True]
    assert "name its rate" in (found[1].reason or "")
    assert found[2].users == pytest.approx(2 * 2 * 0.01 * 0.99 * (1.959964 + 0.841621) ** 2 / 0.005**2, rel=1e-4)
    with pytest.raises(InvalidMetric, match="no metric 'colour'"):
        plan_split(nothing, metrics, Question(1.0, effects={"colour": 0.1}))
    (still,) = plan_split(table, [UP], Question(0.0))
    assert (still.hours, still.detectable) == (None, None)
    assert still.users is not None


THRESHOLDS = (
    GuardrailMetric("toxicity", 0.02, 0.5, counts_events=True),
    GuardrailMetric("over_refusal", 0.05, 0.25),
    GuardrailMetric("slow_answers", 0.05, 0.25, threshold=900.0),
)


def test_rates_of_harms_are_those_that_the_canary_bets_on() -> None:
    """Of rare ones the users who saw any; of others the share of answers; nothing for what nobody saw."""
    table = {
        "user_id": np.array([1, 1, 1, 1, 2, 2, 3, 4]),
        "variant": np.full(8, "control"),
        "toxic": np.array([1, 1, 0, 0, 0, 0, 0, 0]),
        "scored": np.ones(8),
        "benign_refused": np.zeros(8),
        "benign_asked": np.ones(8),
        "latency_s": np.array([1.0, 0.5, 0.5, 0.5, 2.0, 0.5, np.nan, 0.5]),
    }
    found = harm_rates(table, THRESHOLDS, given={}, times=4.0)
    assert found == {"toxicity": (0.25, 1.0), "slow_answers": (pytest.approx(2 / 7), 1.0)}
    named = harm_rates(table, THRESHOLDS, given={"over_refusal": 0.01, "colour": 0.5}, times=4.0)
    assert named["over_refusal"] == (0.01, 0.04)
    assert "colour" not in named


def fill(database: Database, *, at: float) -> None:
    """A hundred users in ten hours; two of them meet something toxic, ten click their thumb up."""
    rows = [
        shown(number, f"user {number // 3}", experiment=None, is_analysed=False, created_at=at + 120.0 * number)
        for number in range(300)
    ]
    liked = [feedback(rows[3 * user].id, "thumbs", "up", created_at=at + 1.0) for user in range(10)]
    save(database, rows, liked)
    save_scores(
        database,
        [Score(interaction_id(n), 0.1, n in (0, 1, 30), "comply", n == 60, "test", 1.0) for n in range(300)],
    )


def test_traffic_and_rates_come_from_the_store(database: Database) -> None:
    fill(database, at=1e6)
    now = 1e6 + 10 * 3600.0
    seen = read_traffic(database, "assistant", since=now - 7 * DAY_S, now=now)
    assert (seen.users, seen.seconds) == (100, 36_000.0)
    plan = plan_experiment(database, RolloutSettings(), "assistant", Question(), days=7.0, now=now)
    assert plan.users_per_hour == 10.0
    by_name = {metric.metric: metric for metric in plan.split}
    assert by_name["thumbs_up_rate"].value == pytest.approx(10 / 300)
    assert by_name["thumbs_up_rate"].users is not None
    assert by_name["latency_mean_s"].reason == "the users do not differ"
    assert {found.metric for found in plan.canary.detections} == {"toxicity", "harmful_compliance"}
    assert plan.unseen == ("thumbs_down", "over_refusal")
    lines = list(sentences(plan))
    assert lines[0] == "assistant: 10 new users an hour (100 users seen in 10 h)"
    assert any("at 1 %: toxicity: " in line and "canary users, about" in line for line in lines)


def test_without_traffic_it_must_be_named(database: Database) -> None:
    with pytest.raises(NegativeVerdict, match="users-per-hour"):
        plan_experiment(database, RolloutSettings(), "assistant", Question(), days=7.0, now=1e6)
    question = Question(users_per_hour=1000.0, rates={"toxicity": 0.005})
    plan = plan_experiment(database, RolloutSettings(), "assistant", question, days=7.0, now=1e6)
    first = plan.canary.detections[0]
    assert (first.metric, first.weight) == ("toxicity", 0.01)
    assert 4 < first.canary_events < 15, "research measured 7 of a single metric, which has all of the evidence"
    assert "expected to be promoted after about" in " ".join(sentences(plan))
