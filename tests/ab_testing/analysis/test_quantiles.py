from __future__ import annotations

import numpy as np
import pytest

from ab_testing.analysis import analyse, quantile
from ab_testing.analysis.quantiles import clustered_quantile
from ab_testing.errors import InsufficientData
from tests.ab_testing.analysis.sample_tables import interactions


def test_independent_rows_give_the_binomial_error() -> None:
    values = np.random.default_rng(1).random(4000)
    found = clustered_quantile(values, np.arange(4000), 0.95, 0.05)
    reach = 1.959964 * np.sqrt(np.mean(values <= found.value) * np.mean(values > found.value) / 3999)
    assert found.value == np.sort(values)[3799]
    assert found.interval == pytest.approx(
        (np.quantile(values, 0.95 - reach), np.quantile(values, 0.95 + reach)), abs=1e-3
    )


def test_users_who_repeat_themselves_add_nothing() -> None:
    """Ten equal rows per user are one row per user."""
    values = np.random.default_rng(2).random(500)
    once = clustered_quantile(values, np.arange(500), 0.9, 0.05)
    tenfold = clustered_quantile(values.repeat(10), np.arange(500).repeat(10), 0.9, 0.05)
    assert tenfold.interval == once.interval
    assert tenfold.value == once.value


def test_the_interval_covers_the_truth_of_clustered_rows() -> None:
    rng = np.random.default_rng(3)
    truth = 1.6448536 * np.sqrt(2)
    covered = []
    for _ in range(300):
        values = (rng.normal(size=(200, 1)) + rng.normal(size=(200, 8))).ravel()
        found = clustered_quantile(values, np.arange(200).repeat(8), 0.95, 0.05)
        covered.append(found.interval.lower <= truth <= found.interval.upper)
    assert 0.90 < np.mean(covered) < 0.99


def test_a_report_has_the_difference() -> None:
    table = interactions()
    slower = table | {"latency_s": table["latency_s"].astype(float) * np.where(table["variant"] == "treatment", 2, 1)}
    found = analyse(slower, [quantile("median", "latency_s", 0.5)]).effects[0]
    assert found.verdict == "worse"
    assert found.method == "woodruff"
    assert found.estimate == (found.treatment_value.value or 0) - (found.control_value.value or 0)


@pytest.mark.parametrize(
    ("values", "users"), [([1.0, 2.0], [0, 0]), ([1.0] * 50, list(range(50))), ([1.0, 2.0, 3.0], [0, 1, 2])]
)
def test_too_little_is_said_to_be_too_little(values: list[float], users: list[int]) -> None:
    with pytest.raises(InsufficientData):
        clustered_quantile(np.array(values), np.array(users), 0.95, 0.05)
