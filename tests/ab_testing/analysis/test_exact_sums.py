from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ab_testing.analysis import exact_sums
from ab_testing.analysis.exact_sums import exact_products

finite = st.floats(allow_nan=False, allow_infinity=False)
rows = st.lists(st.tuples(finite, finite), min_size=1, max_size=20)


@settings(max_examples=40)
@given(rows)
def test_products_are_those_of_fractions(pairs: list[tuple[float, float]]) -> None:
    columns = [np.array(column) for column in zip(*pairs, strict=True)]
    expected = tuple(
        tuple(
            sum((Fraction(a) * Fraction(b) for a, b in zip(first, second, strict=True)), Fraction(0))
            for second in columns
        )
        for first in columns
    )
    assert exact_products(columns, columns) == expected
    assert exact_products(columns[:1], columns[1:]) == ((expected[0][1],),)


def test_many_rows_do_not_round() -> None:
    values = np.full(1 << 17, float((1 << 18) - 1))
    assert exact_products([values], [values])[0][0] == ((1 << 18) - 1) ** 2 << 17


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=100)
    whole = exact_products([values], [values])
    monkeypatch.setattr(exact_sums, "_BLOCK_ROWS", 7)
    assert exact_products([values], [values]) == whole


def test_no_rows_add_up_to_zero() -> None:
    assert exact_products([np.array([])], [np.array([])]) == ((Fraction(0),),)
