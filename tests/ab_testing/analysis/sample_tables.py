"""Small experiments whose every number is known from a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NumpyTable = dict[str, npt.NDArray[np.generic]]


def interactions(seed: int = 7, users: int = 400) -> NumpyTable:
    """Rows of users who differ in habit and in taste, in two variants, with what each did before."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 13, users)
    taste = rng.beta(2, 6, users)
    is_treatment = rng.random(users) < 0.5
    user = np.repeat(np.arange(users), rows)
    order = rng.permutation(len(user))
    user = user[order]
    rate = np.clip(taste + 0.03 * is_treatment, 0, 1)
    is_first = np.zeros(len(user), dtype=np.bool_)
    is_first[np.unique(user, return_index=True)[1]] = True
    before_n = rng.integers(1, 9, users)
    before_x = rng.binomial(before_n, taste)
    return {
        "user_id": user,
        "variant": np.where(is_treatment, "treatment", "control")[user],
        "thumbs_up": (rng.random(len(user)) < rate[user]).astype(np.int64),
        "eligible": (rng.random(len(user)) < 0.9).astype(np.int64),
        "latency_s": rng.lognormal(0.3 * taste[user], 0.7),
        "before_x": np.where(is_first, before_x[user], 0),
        "before_n": np.where(is_first, before_n[user], 0),
        "country": np.array(["de", "fr", "jp"])[(user % 3)],
    }


def per_user(table: NumpyTable) -> NumpyTable:
    """One row per user, as packages without clustering want it."""
    user = table["user_id"].astype(np.int64)
    _, first = np.unique(user, return_index=True)
    totals = {
        name: np.bincount(user, weights=table[name].astype(np.float64))
        for name in ("thumbs_up", "latency_s", "before_x", "before_n")
    }
    rows = np.bincount(user).astype(np.float64)
    return {"variant": table["variant"][first], "rows": rows, **totals}
