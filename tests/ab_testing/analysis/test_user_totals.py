from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ab_testing.analysis import analyse, mean, quantile, ratio
from ab_testing.analysis.metric_effects import Variants, moments_effect
from ab_testing.analysis.metrics import Metric
from ab_testing.analysis.moments import Cell
from ab_testing.analysis.tables import read_labels, read_units
from ab_testing.analysis.user_totals import Layout, UserTotals, lay_out
from tests.ab_testing.analysis.sample_tables import interactions

TABLE = interactions()
METRICS = (
    ratio("r", "thumbs_up", "eligible"),
    mean("m", "latency_s"),
    ratio("c", "thumbs_up", covariate="before_x", covariate_denominator="before_n"),
)


def cell_by_cell() -> Layout:
    """As it is laid out when some user is in both variants."""
    users = TABLE["user_id"].astype(np.int64)
    count = int(users.max()) + 1
    keys = users + count * (TABLE["variant"] == "treatment")
    cells = (Cell("", "control"), Cell("", "treatment"))
    return Layout(keys, count, cells, np.bincount(keys, minlength=2 * count), None)


def test_both_layouts_hold_the_same() -> None:
    by_user = lay_out(read_units(TABLE, "user_id"), read_labels(TABLE, "variant"), None)
    by_cell = cell_by_cell()
    assert by_user.cell_of_user is not None
    for metric in METRICS:
        assert UserTotals(TABLE, by_user).moments(metric) == UserTotals(TABLE, by_cell).moments(metric)
    for cell in range(2):
        assert by_user.users_of([cell]) == by_cell.users_of([cell])
        assert (by_user.is_in(cell) == by_cell.is_in(cell)).all()
    is_even = np.arange(len(by_user.keys)) % 2 == 0
    parts = [UserTotals(TABLE, layout).restricted(is_even) for layout in (by_user, by_cell)]
    assert parts[0].moments(METRICS[0]) == parts[1].moments(METRICS[0])


@pytest.mark.parametrize(
    "metric", [ratio("r", "x", covariate="before", covariate_denominator="times"), mean("m", "x", covariate="before")]
)
def test_a_row_without_an_outcome_says_all_the_same_what_its_user_did_before(metric: Metric) -> None:
    """Else the past would be known of those alone whose first request came to something."""
    table = {
        "user_id": np.array([0, 0, 1, 1]),
        "variant": np.array(["control", "control", "treatment", "treatment"]),
        "x": np.array([np.nan, 1.0, 2.0, 3.0]),
        "before": np.array([5.0, np.nan, 7.0, np.nan]),
        "times": np.array([1.0, np.nan, 1.0, np.nan]),
    }
    totals = UserTotals(table, lay_out(read_units(table, "user_id"), read_labels(table, "variant"), None))
    assert [float(each) for each in totals.moments(metric).cells[Cell("", "control")].sums] == [1.0, 1.0, 5.0, 1.0]


def test_a_user_in_both_variants_is_one_user_of_each() -> None:
    variant = TABLE["variant"].copy()
    first = np.flatnonzero(TABLE["user_id"] == TABLE["user_id"][0])[0]
    variant[first] = "treatment" if variant[first] == "control" else "control"
    plain, crossed = analyse(TABLE, METRICS), analyse(TABLE | {"variant": variant}, METRICS)
    for before, after in zip(plain, crossed, strict=True):
        users = before.control_value.users + before.treatment_value.users
        assert after.control_value.users + after.treatment_value.users - users in (0, 1)
        assert after.estimate == pytest.approx(before.estimate, abs=0.2)
    median = quantile("median", "latency_s", 0.5)
    pair = [analyse(table, [median]).effects[0].estimate for table in (TABLE, TABLE | {"variant": variant})]
    assert pair[0] == pytest.approx(pair[1], abs=0.05)


def test_shards_of_users_merge_to_the_report_of_the_whole_table() -> None:
    shards = []
    for rest in range(3):
        shard = {name: column[TABLE["user_id"].astype(np.int64) % 3 == rest] for name, column in TABLE.items()}
        layout = lay_out(read_units(shard, "user_id"), read_labels(shard, "variant"), None)
        shards.append(UserTotals(shard, layout))
    whole = analyse(TABLE, METRICS)
    for metric in METRICS:
        parts = [shard.moments(metric) for shard in shards]
        merged = parts[2].merge(parts[0]).merge(parts[1])
        found = moments_effect(metric, merged, Variants("control", "treatment"), 0.05)
        assert replace(found, adjusted_p_value=whole.effect(metric.name).adjusted_p_value) == whole.effect(metric.name)


def test_restricting_twice_is_restricting_to_both() -> None:
    totals = UserTotals(TABLE, lay_out(read_units(TABLE, "user_id"), read_labels(TABLE, "variant"), None))
    rows = np.arange(len(TABLE["user_id"]))
    outer, inner = rows % 2 == 0, rows % 3 == 0
    twice = totals.restricted(outer).restricted(inner[outer])
    assert twice.moments(METRICS[0]) == totals.restricted(outer & inner).moments(METRICS[0])
    assert (twice.numbers("latency_s") == TABLE["latency_s"][outer & inner]).all()
