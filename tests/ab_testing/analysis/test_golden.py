"""What scipy, statsmodels, gbstats and tea-tasting say, where they are right. `record_peers` made `peers.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ab_testing.analysis import Effect, Metric, analyse, check_split, mean, ratio
from ab_testing.analysis.corrections import benjamini_hochberg, holm
from ab_testing.analysis.power import Design, power, required_users
from ab_testing.analysis.quantiles import clustered_quantile, share_variance
from ab_testing.analysis.small_counts import Share, newcombe, share_p_value, wilson
from tests.ab_testing.analysis.record_peers import SHARES, SPLIT
from tests.ab_testing.analysis.sample_tables import interactions, per_user

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
TABLE = interactions()
METRICS = {
    "ratio": ratio("ratio", "thumbs_up"),
    "ratio_cuped": ratio("ratio_cuped", "thumbs_up", covariate="before_x", covariate_denominator="before_n"),
    "mean": mean("mean", "latency_s"),
    "mean_cuped": mean("mean_cuped", "latency_s", covariate="before_x"),
}


def effect(metric: Metric) -> Effect:
    return analyse(TABLE, [metric]).effects[0]


@pytest.mark.parametrize("name", METRICS)
def test_tea_tasting(name: str) -> None:
    peer, ours = PEERS["tea_tasting"][name], effect(METRICS[name])
    assert ours.estimate == pytest.approx(peer["effect_size"], rel=1e-9)
    expected = (peer["effect_size_ci_lower"], peer["effect_size_ci_upper"])
    assert ours.interval == pytest.approx(expected, rel=1e-9)
    assert ours.p_value == pytest.approx(peer["pvalue"], rel=1e-9)
    assert (ours.control_value.value, ours.treatment_value.value) == pytest.approx(
        (peer["control"], peer["treatment"]), rel=1e-9
    )


@pytest.mark.parametrize("name", METRICS)
def test_tea_tastings_relative_effect(name: str) -> None:
    peer, ours = PEERS["tea_tasting"][name], effect(METRICS[name]).relative
    assert ours is not None
    assert ours.method == "log_ratio"
    assert ours.estimate == pytest.approx(peer["rel_effect_size"], rel=1e-9)
    assert ours.interval == pytest.approx(
        (peer["rel_effect_size_ci_lower"], peer["rel_effect_size_ci_upper"]), rel=1e-9
    )


@pytest.mark.parametrize("name", ["ratio", "mean", "mean_cuped"])
def test_gbstats(name: str) -> None:
    peer, ours = PEERS["gbstats"][name], effect(METRICS[name])
    assert ours.estimate == pytest.approx(peer["estimate"], rel=1e-9)
    assert ours.interval == pytest.approx(peer["ci"], rel=1e-9)
    assert ours.p_value == pytest.approx(peer["p_value"], rel=1e-9)


def test_gbstats_clustered_variance_of_a_quantiles_share() -> None:
    for variant, expected in PEERS["gbstats"]["quantile"].items():
        ours = TABLE["variant"] == variant
        values = TABLE["latency_s"][ours].astype(np.float64)
        users = np.unique(TABLE["user_id"][ours], return_inverse=True)[1]
        value = clustered_quantile(values, users, 0.9, 0.05).value
        found = share_variance(values <= value, users, np.bincount(users))
        assert found == pytest.approx(expected, rel=1e-9)


def test_shares_and_splits_of_all_peers() -> None:
    for method, expected in PEERS["tea_tasting"]["shares"].items():
        control, treatment = (Share(*pair) for pair in SHARES[method])
        assert share_p_value(control, treatment) == pytest.approx(expected, rel=1e-9)
    seen = dict(zip(("control", "treatment"), SPLIT, strict=True))
    found = check_split(seen, {"control": 9, "treatment": 1}).p_value
    assert found == pytest.approx(PEERS["tea_tasting"]["split"], rel=1e-9)
    assert found == pytest.approx(PEERS["gbstats"]["split"], rel=1e-9)
    z = float(stats.norm.isf(0.025))
    assert wilson(Share(3, 40), z) == pytest.approx(PEERS["statsmodels"]["wilson"], rel=1e-9)


def test_statsmodels_cluster_robust_variance() -> None:
    """Its CR0 variance per variant, times K / (K - 1), is the delta method's."""
    covariance = np.array(PEERS["statsmodels"]["cluster_covariance"])
    ours = effect(METRICS["ratio"])
    counts = [ours.control_value.users, ours.treatment_value.users]
    parts = [covariance[0, 0], covariance[1, 1] - covariance[0, 0]]
    expected = math.sqrt(sum(part * count / (count - 1) for part, count in zip(parts, counts, strict=True)))
    assert ours.std_error == pytest.approx(expected, rel=1e-9)
    assert ours.estimate == pytest.approx(PEERS["statsmodels"]["cluster_estimate"], rel=1e-9)


def test_statsmodels_corrections_power_and_newcombe() -> None:
    peer = PEERS["statsmodels"]
    assert holm(peer["p_values"]) == pytest.approx(peer["holm"], rel=1e-9)
    assert benjamini_hochberg(peer["p_values"]) == pytest.approx(peer["bh"], rel=1e-9)
    assert newcombe(Share(5, 400), Share(12, 300), 0.05) == pytest.approx(peer["newcombe"], rel=1e-9)
    assert power(Design(1.0, treatment_share=0.75), 0.2, 400) == pytest.approx(peer["power"], rel=1e-9)
    users = required_users(Design(1.0, alpha=0.01), 0.1, 0.9)
    assert users / 2 == pytest.approx(peer["required_per_control"], rel=1e-9)


def test_scipys_welch() -> None:
    users = per_user(TABLE)
    control, treatment = (users["latency_s"][users["variant"] == name] for name in ("control", "treatment"))
    peer = stats.ttest_ind(treatment, control, equal_var=False)
    interval = peer.confidence_interval(0.95)
    ours = effect(METRICS["mean"])
    assert ours.p_value == pytest.approx(peer.pvalue, rel=1e-9)
    assert ours.interval == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_scipys_holm_and_fdr() -> None:
    p_values = np.random.default_rng(0).random(30) ** 3
    assert benjamini_hochberg(p_values.tolist()) == pytest.approx(stats.false_discovery_control(p_values), rel=1e-12)


def test_a_far_tail_does_not_vanish() -> None:
    """One minus the distribution function is 0 from eight standard errors on."""
    users = np.arange(2000)
    table = {
        "user_id": users,
        "variant": np.where(users % 2, "treatment", "control"),
        "x": np.random.default_rng(0).normal(size=2000) + 1.0 * (users % 2),
    }
    found = analyse(table, [mean("x", "x")]).effects[0]
    control, treatment = table["x"][::2], table["x"][1::2]
    assert found.p_value == pytest.approx(stats.ttest_ind(treatment, control, equal_var=False).pvalue, rel=1e-9)
    assert 0 < (found.p_value or 0) < 1e-60
