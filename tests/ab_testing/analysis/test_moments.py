from __future__ import annotations

import json
import random
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ab_testing.analysis.effects import compare
from ab_testing.analysis.errors import MomentsDoNotFit
from ab_testing.analysis.moments import Cell, Moments, UserColumns, moments_of

STRATA, VARIANTS = ("0", "1"), ("control", "treatment")
value = st.floats(-1e12, 1e12, allow_nan=False)
rows = st.lists(st.tuples(value, st.floats(1e-3, 1e3), st.integers(0, 3)), min_size=1, max_size=30)


def moments(users: list[tuple[int, float, float, int]]) -> Moments:
    """Users as (number, x, n, cell); the last cell of four stands for being in the first and the last."""
    cells = {}
    for place, cell in enumerate(Cell(stratum, variant) for stratum in STRATA for variant in VARIANTS):
        ours = [user for user in users if user[3] == place or (user[3] == 3 and place == 0)]
        columns = tuple(np.array([user[key] for user in ours]) for key in (1, 2))
        cells[cell] = UserColumns(columns, np.array([user[0] for user in ours], dtype=np.intp))
    return moments_of(cells)


@given(rows, st.randoms(use_true_random=False), st.integers(1, 6))
def test_merging_in_any_order_is_one_pass(
    drawn: list[tuple[float, float, int]], chance: random.Random, parts: int
) -> None:
    users = [(number, *row) for number, row in enumerate(drawn)]
    part_of = [chance.randrange(parts) for _ in users]
    pieces = [moments([user for user, own in zip(users, part_of, strict=True) if own == part]) for part in range(parts)]
    chance.shuffle(pieces)
    merged = reduce(Moments.merge, pieces)
    assert merged == moments(users)
    assert list(merged.cells) == list(moments(users).cells)


@given(rows)
def test_json_gives_back_the_same_numbers(drawn: list[tuple[float, float, int]]) -> None:
    found = moments([(number, *row) for number, row in enumerate(drawn)])
    assert Moments.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_moments_of_different_metrics_do_not_merge() -> None:
    users, ones = np.arange(2), np.ones(2)
    plain = moments_of({Cell("", "control"): UserColumns((ones, ones), users)})
    adjusted = moments_of({Cell("", "control"): UserColumns((ones, ones, ones, ones), users)})
    with pytest.raises(MomentsDoNotFit):
        plain.merge(adjusted)


def test_a_huge_mean_costs_no_digit() -> None:
    """Sums of squares in floats lose everything here (research: one peer says p = 1)."""
    rng = np.random.default_rng(3)
    arms = [np.round(rng.normal(size=200) * 2**20) / 2**20 for _ in VARIANTS]
    cells = {
        Cell("", name): UserColumns((arm + 2.0**30, np.ones(200)), np.arange(200) + 200 * place)
        for place, (name, arm) in enumerate(zip(VARIANTS, arms, strict=True))
    }
    found = compare(moments_of(cells), *VARIANTS)
    assert found.estimate == pytest.approx(arms[1].mean() - arms[0].mean(), rel=1e-12)
    assert found.variance == pytest.approx(sum(arm.var(ddof=1) / 200 for arm in arms), rel=1e-12)
