"""Batches of like length: every example once, the same examples in every step, less padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from retrain.batching import Batching, epoch_order, padded_tokens

lengths_of_examples = st.lists(st.integers(1, 500), max_size=120)
batchings = st.builds(
    Batching,
    batch_size=st.integers(1, 5),
    n_processes=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    window_steps=st.integers(0, 4),
    seed=st.integers(0, 9),
)


def steps(order: Sequence[int], batching: Batching) -> list[set[int]]:
    size = batching.step_size
    return [set(order[start : start + size]) for start in range(0, len(order), size)]


@given(lengths_of_examples, batchings, st.integers(0, 3))
def test_every_example_comes_once_in_an_epoch(lengths: list[int], batching: Batching, epoch: int) -> None:
    assert sorted(epoch_order(lengths, batching, epoch)) == list(range(len(lengths)))


@given(lengths_of_examples, batchings, st.integers(0, 3))
def test_a_window_of_one_step_leaves_every_step_its_examples(
    lengths: list[int], batching: Batching, epoch: int
) -> None:
    plain = epoch_order(lengths, replace(batching, window_steps=0), epoch)
    sorted_within = epoch_order(lengths, replace(batching, window_steps=1), epoch)
    assert steps(sorted_within, batching) == steps(plain, batching)


@given(st.data(), batchings, st.integers(1, 3))
def test_sorting_never_adds_padding_and_a_wider_window_never_more_than_none(
    data: st.DataObject, batching: Batching, n_windows: int
) -> None:
    n_examples = n_windows * batching.step_size * max(1, batching.window_steps)
    lengths = data.draw(st.lists(st.integers(1, 500), min_size=n_examples, max_size=n_examples))
    plain = epoch_order(lengths, replace(batching, window_steps=0), 0)
    bucketed = epoch_order(lengths, batching, 0)
    assert sum(lengths) <= padded_tokens(lengths, bucketed, batching.group_size)
    assert padded_tokens(lengths, bucketed, batching.group_size) <= padded_tokens(lengths, plain, batching.group_size)


@given(lengths_of_examples, batchings, st.integers(0, 3))
def test_the_order_is_the_same_every_time_it_is_asked_for(lengths: list[int], batching: Batching, epoch: int) -> None:
    assert epoch_order(lengths, batching, epoch) == epoch_order(list(lengths), batching, epoch)


def test_epochs_and_seeds_differ_and_batches_do_not_come_by_length() -> None:
    lengths = list(range(400))
    batching = Batching(4, n_processes=1, accumulation=2, window_steps=10, seed=1)
    first = epoch_order(lengths, batching, 0)
    assert first != epoch_order(lengths, batching, 1)
    assert first != epoch_order(lengths, replace(batching, seed=2), 0)
    batch_means = [sum(first[start : start + 4]) / 4 for start in range(0, 80, 4)]
    assert batch_means != sorted(batch_means)
    assert all(max(batch) - min(batch) < 80 for batch in (first[start : start + 4] for start in range(0, 400, 4)))


def test_the_batch_that_is_short_is_not_the_one_of_the_longest() -> None:
    batching = Batching(8, n_processes=1, accumulation=1, window_steps=4, seed=0)
    short = [epoch_order(range(29), batching, epoch)[24:] for epoch in range(40)]
    mean = sum(map(sum, short)) / sum(map(len, short))
    assert 11 < mean < 17  # Of numbers up to 28; the longest five alone would give 26.


def test_processes_that_work_at_the_same_time_get_like_lengths() -> None:
    batching = Batching(2, n_processes=3, accumulation=2, window_steps=2, seed=0)
    order = epoch_order(range(24), batching, 0)
    groups = [order[start : start + 6] for start in range(0, 24, 6)]
    assert sorted(sorted(group) for group in groups) == [list(range(start, start + 6)) for start in range(0, 24, 6)]
