"""Write down what other packages say of the sample tables: `python -m tests.ab_testing.analysis.record_peers`.

Needs gbstats, tea-tasting, statsmodels and pandas, which the tests do not: they compare with `peers.json`, which names
the versions it was made with. gbstats 0.8.0 asks for an older NumPy than it needs; `pip install --no-deps` it.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.ab_testing.analysis.sample_tables import interactions, per_user

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
    names: tuple[str, ...] = ("control", "treatment", "effect_size", "effect_size_ci_lower", "effect_size_ci_upper")
    names += ("rel_effect_size", "rel_effect_size_ci_lower", "rel_effect_size_ci_upper", "pvalue")
    return {metric: {name: float(getattr(found[metric], name)) for name in names} for metric in metrics}


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
        pairs[name] = {"estimate": result.expected, "ci": [float(v) for v in result.ci], "p_value": result.p_value}
    return pairs


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
