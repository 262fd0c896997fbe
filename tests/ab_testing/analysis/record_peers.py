"""Write down what other packages say of the sample tables: `python -m tests.ab_testing.analysis.record_peers`.

Needs gbstats, tea-tasting, statsmodels and pandas, which the tests do not: they compare with `peers.json`, which names
the versions it was made with. gbstats 0.8.0 asks for an older NumPy than it needs; `pip install --no-deps` it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.ab_testing.analysis.sample_tables import interactions, per_user

SHARES = {"fisher": ((2, 400), (11, 380)), "pearson": ((200, 1000), (240, 1000))}
"""(events, users) of control and treatment, by the test for them."""
SPLIT = (9050, 950)
"""Users, where nine to one were intended."""
PACKAGES = ("gbstats", "numpy", "pandas", "scipy", "statsmodels", "tea-tasting")


def tea_tasting() -> dict[str, object]:
    pd, tt = import_module("pandas"), import_module("tea_tasting")
    users = per_user(interactions())
    frame = pd.DataFrame(users | {"variant": (users["variant"] == "treatment").astype(int)})
    metrics = {
        "ratio": tt.RatioOfMeans("thumbs_up", "rows"),
        "ratio_cuped": tt.RatioOfMeans("thumbs_up", "rows", "before_x", "before_n"),
        "mean": tt.Mean("latency_s"),
        "mean_cuped": tt.Mean("latency_s", covariate="before_x"),
    }
    found = tt.Experiment(metrics).analyze(frame)
    recorded: dict[str, object] = {"shares": tea_tasting_shares(), "split": tea_tasting_split()}
    names: tuple[str, ...] = ("control", "treatment", "effect_size", "effect_size_ci_lower", "effect_size_ci_upper")
    names += ("rel_effect_size", "rel_effect_size_ci_lower", "rel_effect_size_ci_upper", "pvalue")
    return recorded | {metric: {name: float(getattr(found[metric], name)) for name in names} for metric in metrics}


def tea_tasting_shares() -> dict[str, float]:
    """P-values of two shares, by kind of test."""
    pd, tt = import_module("pandas"), import_module("tea_tasting")
    found = {}
    for method, (control, treatment) in SHARES.items():
        frame = pd.DataFrame(
            {
                "variant": [0] * control[1] + [1] * treatment[1],
                "x": [1] * control[0] + [0] * (control[1] - control[0]) + [1] * treatment[0]
                + [0] * (treatment[1] - treatment[0]),
            }
        )  # fmt: skip
        metric = tt.Proportion("x", method=method, correction=False)
        found[method] = float(tt.Experiment({"x": metric}).analyze(frame)["x"].pvalue)
    return found


def tea_tasting_split() -> float:
    pd, tt = import_module("pandas"), import_module("tea_tasting")
    frame = pd.DataFrame({"variant": [0] * SPLIT[0] + [1] * SPLIT[1]})
    metric = tt.SampleRatio({0: 9, 1: 1}, method="norm", correction=False)
    return float(tt.Experiment({"split": metric}).analyze(frame)["split"].pvalue)


def gbstats() -> dict[str, object]:
    tests, models = import_module("gbstats.frequentist.tests"), import_module("gbstats.models.statistics")
    users = per_user(interactions())
    pairs: dict[str, object] = {}
    for name in ("ratio", "mean"):
        arms = []
        for variant in ("control", "treatment"):
            ours = users["variant"] == variant
            x, n = (users[key][ours].astype(float) for key in ("thumbs_up", "rows"))
            latency = users["latency_s"][ours].astype(float)
            count = len(x)
            top = models.SampleMeanStatistic(n=count, sum=x.sum(), sum_squares=(x**2).sum())
            bottom = models.SampleMeanStatistic(n=count, sum=n.sum(), sum_squares=(n**2).sum())
            mean = models.SampleMeanStatistic(n=count, sum=latency.sum(), sum_squares=(latency**2).sum())
            ratio = models.RatioStatistic(
                n=count, m_statistic=top, d_statistic=bottom, m_d_sum_of_products=(x * n).sum()
            )
            arms.append(ratio if name == "ratio" else mean)
        result = tests.TwoSidedTTest(*arms, tests.FrequentistConfig(difference_type="absolute")).compute_result()
        pairs["quantile"] = gbstats_quantile()
        pairs["mean_cuped"] = gbstats_cuped()
        pairs["split"] = float(import_module("gbstats.utils").check_srm(list(SPLIT), [9, 1]))
        pairs[name] = {"estimate": result.expected, "ci": [float(v) for v in result.ci], "p_value": result.p_value}
    return pairs


def gbstats_quantile() -> dict[str, float]:
    """Of each variant, the clustered variance of the share of rows up to the 90th percentile."""
    models, table = import_module("gbstats.models.statistics"), interactions()
    found = {}
    for variant in ("control", "treatment"):
        ours = table["variant"] == variant
        values, user = table["latency_s"][ours].astype(float), table["user_id"][ours].astype(np.int64)
        value = float(np.quantile(values, 0.9, method="inverted_cdf"))
        n = np.bincount(user)
        below, n = np.bincount(user, weights=values <= value)[n > 0], n[n > 0].astype(float)
        statistic = models.QuantileClusteredStatistic(
            n=len(values), n_star=len(values), nu=0.9, quantile_hat=value, quantile_lower=value, quantile_upper=value,
            main_sum=below.sum(), main_sum_squares=(below**2).sum(), denominator_sum=n.sum(),
            denominator_sum_squares=(n**2).sum(), main_denominator_sum_product=(below * n).sum(), n_clusters=len(n),
        )  # fmt: skip
        found[variant] = float(statistic.get_cluster_variance)
    return found


def gbstats_cuped() -> dict[str, object]:
    tests, models = import_module("gbstats.frequentist.tests"), import_module("gbstats.models.statistics")
    users = per_user(interactions())
    arms = []
    for variant in ("control", "treatment"):
        ours = users["variant"] == variant
        after, before = (users[name][ours].astype(float) for name in ("latency_s", "before_x"))
        pair = [models.SampleMeanStatistic(n=len(x), sum=x.sum(), sum_squares=(x**2).sum()) for x in (after, before)]
        arms.append(
            models.RegressionAdjustedStatistic(
                n=len(after), post_statistic=pair[0], pre_statistic=pair[1],
                post_pre_sum_of_products=(after * before).sum(), theta=0.0,
            )
        )  # fmt: skip
    theta = models.compute_theta(*arms)
    arms = [replace(arm, theta=theta) for arm in arms]
    result = tests.TwoSidedTTest(*arms, tests.FrequentistConfig(difference_type="absolute")).compute_result()
    return {"estimate": result.expected, "ci": [float(v) for v in result.ci], "p_value": result.p_value}


def statsmodels() -> dict[str, object]:
    sm, shares = import_module("statsmodels.api"), import_module("statsmodels.stats.proportion")
    multipletests = import_module("statsmodels.stats.multitest").multipletests
    normal = import_module("statsmodels.stats.power").NormalIndPower()
    newcombe = shares.confint_proportions_2indep(12, 300, 5, 400, method="newcomb", compare="diff", correction=False)
    table = interactions()
    is_treatment = (table["variant"] == "treatment").astype(float)
    model = sm.OLS(table["thumbs_up"].astype(float), sm.add_constant(is_treatment))
    clustered = model.fit(cov_type="cluster", cov_kwds={"groups": table["user_id"], "use_correction": False})
    p_values = [0.01, 0.04, 0.03, 0.005, 0.2]
    return {
        "cluster_estimate": float(clustered.params[1]),
        "cluster_covariance": np.asarray(clustered.cov_params()).tolist(),
        "wilson": [float(limit) for limit in shares.proportion_confint(3, 40, method="wilson")],
        "newcombe": [float(limit) for limit in newcombe],
        "power": float(normal.power(0.2, 100, 0.05, ratio=3.0)),
        "required_per_control": float(normal.solve_power(0.1, power=0.9, alpha=0.01, ratio=1.0)),
        "p_values": p_values,
        "holm": multipletests(p_values, method="holm")[1].tolist(),
        "bh": multipletests(p_values, method="fdr_bh")[1].tolist(),
    }


def main() -> None:
    peers = {
        "versions": {name: version(name) for name in PACKAGES},
        "tea_tasting": tea_tasting(),
        "gbstats": gbstats(),
        "statsmodels": statsmodels(),
    }
    Path(__file__).with_name("peers.json").write_text(json.dumps(peers, indent=1) + "\n")


if __name__ == "__main__":
    main()
