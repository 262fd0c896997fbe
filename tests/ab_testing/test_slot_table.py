"""A slot table moves exactly as many users as a change of weights needs, from those that give to those that get."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ab_testing.errors import InvalidExperiment
from ab_testing.slot_table import N_SLOTS, check_table, new_table, owners_of, reassigned, slot_counts

NAMES = ("control", "treatment", "other", "last")
weights = st.dictionaries(
    st.sampled_from(NAMES), st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=4
).filter(lambda drawn: sum(drawn.values()) > 0)


@settings(max_examples=40, deadline=None)
@given(weights, st.lists(weights, min_size=1, max_size=3))
def test_exactly_the_needed_share_moves_and_none_between_others(
    first: dict[str, float], changes: list[dict[str, float]]
) -> None:
    table = new_table(first)
    for changed in changes:
        before, table = owners_of(table), reassigned(table, changed)
        after = owners_of(table)
        had, has = Counter(before), Counter(after)
        assert has == {name: n for name, n in slot_counts(changed).items() if n}
        moves = Counter((old, new) for old, new in zip(before, after, strict=True) if old != new)
        assert moves.total() == sum(max(0, had[name] - has[name]) for name in NAMES)
        assert all(had[old] > has[old] and had[new] < has[new] for old, new in moves)


@given(weights)
def test_a_table_has_every_slot_and_a_change_to_the_same_weights_moves_nobody(drawn: dict[str, float]) -> None:
    table = new_table(drawn)
    check_table(table, list(drawn))
    assert reassigned(table, drawn) == table
    assert all(abs(n - N_SLOTS * drawn[name] / sum(drawn.values())) <= 1 for name, n in slot_counts(drawn).items())


def test_a_long_ramp_stays_short_to_store() -> None:
    table = new_table({"a": 50, "b": 50})
    for weight in range(1, 51):
        table = reassigned(table, {"a": 50 - weight, "b": 50, "c": weight})
    assert table == (("c", 5000), ("b", 10000))


@pytest.mark.parametrize("wrong", [{}, {"a": 0.0}, {"a": 1e308, "b": 1e308}])
def test_no_weight_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidExperiment):
        slot_counts(wrong)
