from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from ab_testing.analysis import Columns, Effect, analyse, mean, ratio
from ab_testing.analysis.effects import Arm, Comparison
from ab_testing.analysis.relative_effects import fieller, relative_effect
from ab_testing.errors import InsufficientData
from tests.ab_testing.analysis.sample_tables import NumpyTable, interactions

PHASED = Columns(stratum="phase")


def ramp(seed: int, users: int = 600, rows: int = 4) -> NumpyTable:
    """Three phases in which users stay, a few more move to the treatment, and the rate falls: no variant is better."""
    rng = np.random.default_rng(seed)
    luck, taste = rng.random(users), rng.normal(0, 0.12, users)
    tables = []
    for phase, (weight, rate) in enumerate(((0.1, 0.6), (0.3, 0.45), (0.6, 0.3))):
        seen = np.flatnonzero(rng.random(users) < 0.8)
        user = np.repeat(seen, rows)
        chance = np.clip(rate + taste[user], 0, 1)
        tables.append((user, luck[user] < weight, np.full(len(user), phase), rng.random(len(user)) < chance))
    user, is_treatment, phase_of, x = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    variant = np.where(is_treatment, "treatment", "control")
    return {"user_id": user, "variant": variant, "phase": phase_of, "x": x.astype(np.float64)}


def phased_effect(seed: int, columns: Columns) -> Effect:
    return analyse(ramp(seed), [ratio("x", "x")], columns=columns).effects[0]


def direct(table: NumpyTable) -> tuple[float, float]:
    """Estimate and variance by the definition: one influence per user, over all phases and both variants."""
    user, phase = table["user_id"].astype(np.int64), table["phase"].astype(np.int64)
    is_treatment, x = table["variant"] == "treatment", table["x"].astype(np.float64)
    counts = {}
    for place in range(3):
        for arm in (False, True):
            counts[place, arm] = len(np.unique(user[(phase == place) & (is_treatment == arm)]))
    size = {p: counts[p, False] * counts[p, True] / (counts[p, False] + counts[p, True]) for p in range(3)}
    estimate, influence = 0.0, np.zeros(user.max() + 1)
    for (place, arm), count in counts.items():
        ours = (phase == place) & (is_treatment == arm)
        rate, weight = x[ours].mean(), size[place] / sum(size.values()) * (1 if arm else -1)
        estimate += weight * rate
        scale = weight * math.sqrt(count / (count - 1)) / ours.sum()
        influence += scale * np.bincount(user[ours], weights=x[ours] - rate, minlength=len(influence))
    return estimate, float(influence @ influence)


def test_strata_and_crossing_users_are_the_sum_of_influences() -> None:
    found = phased_effect(1, PHASED)
    estimate, variance = direct(ramp(1))
    assert found.estimate == pytest.approx(estimate, rel=1e-12)
    assert found.std_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def z_values(columns: Columns) -> npt.NDArray[np.float64]:
    found = [phased_effect(seed, columns) for seed in range(150)]
    return np.array([(effect.estimate or 0) / (effect.std_error or 1) for effect in found])


def test_a_ramp_while_the_rate_falls_fools_pooling_but_not_phases() -> None:
    """Research page, section 3.1: pooled 85 to 100 % false positives; clustered across phases z has sd 1.00 to 1.02."""
    pooled, phased = z_values(Columns()), z_values(PHASED)
    assert np.mean(np.abs(pooled) > 1.96) > 0.9
    assert np.mean(np.abs(phased) > 1.96) < 0.12
    assert 0.85 < phased.std() < 1.15


def test_a_covariate_removes_variance_and_no_signal() -> None:
    table = interactions()
    plain = analyse(table, [ratio("r", "thumbs_up")]).effects[0]
    metric = ratio("r", "thumbs_up", covariate="before_x", covariate_denominator="before_n")
    adjusted = analyse(table, [metric]).effects[0]
    assert adjusted.method == "cuped"
    assert adjusted.variance_reduction == pytest.approx(
        1 - ((adjusted.std_error or 0) / (plain.std_error or 1)) ** 2, rel=1e-9
    )
    assert adjusted.variance_reduction is not None
    assert 0 < adjusted.variance_reduction < 1


def test_users_without_a_past_keep_their_own_values() -> None:
    """Who has no past is not taken for one who did nothing."""
    table = interactions()
    is_new = table["user_id"] % 2 == 1
    before = np.where(is_new, np.nan, table["before_x"].astype(float))
    found = analyse(table | {"before_x": before}, [mean("m", "latency_s", covariate="before_x")]).effects[0]
    zero = analyse(table | {"before_x": np.nan_to_num(before)}, [mean("m", "latency_s", covariate="before_x")])
    assert found.method == "cuped"
    assert found.estimate != zero.effects[0].estimate
    assert found.control_value.users == zero.effects[0].control_value.users


def test_a_constant_covariate_changes_nothing_and_says_so() -> None:
    table = interactions()
    constant = table | {"one": np.ones(len(table["user_id"]))}
    metric = ratio("r", "thumbs_up", covariate="one", covariate_denominator="one")
    found = analyse(constant, [metric]).effects[0]
    plain = analyse(table, [ratio("r", "thumbs_up")]).effects[0]
    assert (found.estimate, found.std_error, found.method) == (plain.estimate, plain.std_error, "delta")
    assert "the covariate does not vary: nothing was adjusted" in found.notes


def comparison(control: tuple[float, float], treatment: tuple[float, float]) -> Comparison:
    arms = [Arm(value, sd**2, 1e6, 100, 100.0) for value, sd in (control, treatment)]
    return Comparison(arms[0], arms[1], 0.0, 1e6, treatment[0] - control[0])


def test_fieller_is_where_the_difference_just_is_not_significant() -> None:
    found = comparison((2.0, 0.3), (-1.0, 0.4))
    relative = relative_effect(found, 0.05)
    assert relative.method == "fieller"
    for limit in relative.interval:
        difference = -1.0 - (limit + 1) * 2.0
        z = difference / math.hypot(0.4, (limit + 1) * 0.3)
        assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_fieller_and_the_log_ratio_agree_where_the_control_is_sure() -> None:
    found = comparison((2.0, 0.02), (2.2, 0.03))
    logs = relative_effect(found, 0.05)
    assert logs.method == "log_ratio"
    assert logs.interval == pytest.approx(fieller(found, 1.959964), abs=2e-4)


def test_a_control_like_zero_has_no_relative_effect() -> None:
    with pytest.raises(InsufficientData, match="told from zero"):
        relative_effect(comparison((0.1, 0.1), (1.0, 0.1)), 0.05)
