from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ab_testing.errors import InvalidExperiment
from ab_testing.experiment import LayerRange
from ab_testing.layers import free_gaps, free_range, layer_range, share_in_slots
from ab_testing.slot_table import N_SLOTS


@given(st.lists(st.integers(1, 4000), max_size=8), st.sets(st.integers(0, 7)))
def test_ranges_that_are_given_out_never_overlap(sizes: list[int], ended: set[int]) -> None:
    taken: list[LayerRange] = []
    for number, size in enumerate(sizes):
        try:
            found = free_range("checkout", size / N_SLOTS, taken)
        except InvalidExperiment:
            assert all(end - start < size for start, end in free_gaps("checkout", taken))
            continue
        assert found.end - found.start == size
        assert all(found.end <= other.start or other.end <= found.start for other in taken)
        taken.append(found)
        if number in ended:
            taken.pop(0)


def test_other_layers_are_nobody_s_business() -> None:
    assert free_range("checkout", 1.0, [LayerRange("search", 0, 10000)]) == LayerRange("checkout", 0, 10000)


def test_what_is_free_is_said() -> None:
    with pytest.raises(InvalidExperiment, match=r"no 0.5 of the users left in one piece; free: 0.2, 0.3"):
        free_range("checkout", 0.5, [LayerRange("checkout", 2000, 7000)])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, 0.00001, 0.12345, float("nan")])
def test_a_share_is_a_number_of_slots(share: float) -> None:
    with pytest.raises(InvalidExperiment):
        share_in_slots(share)


def test_shares_become_slots_exactly() -> None:
    assert layer_range("checkout", 0.1, 0.1 + 0.2) == LayerRange("checkout", 1000, 3000)
