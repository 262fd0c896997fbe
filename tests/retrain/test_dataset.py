"""Promises of the hold-out and the mix."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.filters.holdout import prompt_key
from pawl.settings import MixSettings
from retrain.dataset import (
    DAY_S,
    Mixed,
    Origin,
    TrainingExample,
    Untrainable,
    apportion,
    check_no_leak,
    dataset_manifest,
    drop_leaks,
    example_of,
    half_life_of,
    mix,
    parse_originals,
    shares_of,
    split_originals,
    swap_preferences,
    untrainable,
)
from retrain.errors import BadData, DataLeak
from tests.retrain.tiny_model import make_pair

SHARES = {Origin.NEW: 0.5, Origin.ORIGINAL: 0.3, Origin.EARLIER: 0.2}
seeds = st.integers(0, 10_000)


def examples(origin: Origin, count: int, start: int = 0) -> list[TrainingExample]:
    """Of different words each, a third of them edits."""
    numbers = range(start, start + count)
    return [example_of(make_pair(number, text=f"question {number}"), origin) for number in numbers]


def pool(new: int, original: int, earlier: int) -> list[TrainingExample]:
    return [
        *examples(Origin.NEW, new),
        *examples(Origin.ORIGINAL, original, 1_000),
        *examples(Origin.EARLIER, earlier, 2_000),
    ]


def test_a_shared_prompt_is_a_leak() -> None:
    holdout = [make_pair(0, text="what is tea")]
    leaking = [example_of(make_pair(1, text="what is tea"), Origin.ORIGINAL), example_of(make_pair(2), Origin.NEW)]
    with pytest.raises(DataLeak, match="1 training examples"):
        check_no_leak(leaking, holdout)
    assert drop_leaks(leaking, holdout) == leaking[1:]
    check_no_leak(drop_leaks(leaking, holdout), holdout)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 5000))
def test_apportioned_counts_sum_up_and_stay_within_one_of_the_share(shares: list[float], total: int) -> None:
    counts = apportion(shares, total)
    if sum(shares) < 1e-6:
        return
    assert sum(counts) == total
    assert all(abs(count - share / sum(shares) * total) < 1 for count, share in zip(counts, shares, strict=True))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 200), seeds)
def test_the_mix_never_repeats_never_overdraws_and_says_what_is_missing(
    new: int, original: int, earlier: int, max_pairs: int, seed: int
) -> None:
    available = {Origin.NEW: new, Origin.ORIGINAL: original, Origin.EARLIER: earlier}
    mixed = mix(pool(new, original, earlier), SHARES, max_pairs=max_pairs, seed=seed)
    ids = [example.pair_id for example in mixed.examples]
    assert len(ids) == len(set(ids)) == sum(mixed.counts.values()) <= max_pairs
    wanted = {origin: mixed.counts[origin] + mixed.shortfalls.get(origin, 0) for origin in Origin}
    assert sum(wanted.values()) == min(max_pairs, 2 * new)
    for origin in Origin:
        assert mixed.counts[origin] <= available[origin]
        assert abs(wanted[origin] - SHARES[origin] * sum(wanted.values())) < 1
        assert origin not in mixed.shortfalls or mixed.counts[origin] == available[origin]


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(seed: int, rng: random.Random) -> None:
    given_examples = pool(20, 20, 20)
    shuffled = rng.sample(given_examples, len(given_examples))
    assert mix(given_examples, SHARES, max_pairs=30, seed=seed) == mix(shuffled, SHARES, max_pairs=30, seed=seed)


stratified = st.lists(
    st.tuples(st.sampled_from(["edit", "thumbs", "choice"]), st.sampled_from(["", "code", "harm"])), max_size=60
)


@given(stratified, st.integers(1, 80), seeds)
def test_sources_and_categories_keep_their_shares_to_within_one(
    strata: list[tuple[str, str]], max_pairs: int, seed: int
) -> None:
    plain = examples(Origin.NEW, len(strata))
    given_examples = [
        replace(each, source=source, category=category) for each, (source, category) in zip(plain, strata, strict=True)
    ]
    drawn = mix(given_examples, {Origin.NEW: 1.0}, max_pairs=max_pairs, seed=seed).examples
    assert len(drawn) == min(max_pairs, len(strata))
    found = Counter((each.source, each.category) for each in drawn)
    for stratum, count in Counter(strata).items():
        assert abs(found[stratum] - count * len(drawn) / len(strata)) < 1 + 1e-9


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 100), seeds)
def test_nothing_is_in_the_mix_twice_whatever_its_id_and_origin(texts: list[int], max_pairs: int, seed: int) -> None:
    """The same preference may come from several users, or be among the original ones as well."""
    given_examples = [
        replace(example_of(make_pair(text, text=f"question {text}"), origin), pair_id=f"{place % 30}")
        for place, text in enumerate(texts)
        for origin in (Origin.NEW, Origin.EARLIER)
    ]
    mixed = mix(given_examples, {Origin.NEW: 0.5, Origin.EARLIER: 0.5}, max_pairs=max_pairs, seed=seed)
    assert max(Counter(each.pair_id for each in mixed.examples).values()) == 1
    assert max(Counter(prompt_key(each.prompt) for each in mixed.examples).values()) == 1
    assert mixed.counts[Origin.EARLIER] == 0


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter_to_a_weighted_draw_either(seed: int, rng: random.Random) -> None:
    given_examples = [replace(each, created_at=day * DAY_S) for day, each in enumerate(pool(20, 20, 20))]
    shuffled = rng.sample(given_examples, len(given_examples))
    one, other = (
        mix(order, SHARES, max_pairs=30, seed=seed, half_life_s=9 * DAY_S) for order in (given_examples, shuffled)
    )
    assert one == other


def test_older_pairs_are_drawn_half_as_often_for_every_half_life() -> None:
    """Of two examples one is drawn: the younger one with odds of two to one for each half-life between them."""
    old, young = (replace(each, source="thumbs") for each in examples(Origin.EARLIER, 2))
    draws = 3000
    for n_half_lives, expected in ((0, 1 / 2), (1, 2 / 3), (2, 4 / 5)):
        pair = [replace(old, created_at=1e9), replace(young, created_at=1e9 + n_half_lives * DAY_S)]
        wins = sum(
            mix(pair, {Origin.EARLIER: 1.0}, max_pairs=1, seed=seed, half_life_s=DAY_S).examples[0].pair_id
            == young.pair_id
            for seed in range(draws)
        )
        assert abs(wins / draws - expected) < 0.04


def test_no_age_and_no_half_life_is_too_large() -> None:
    ages = [replace(each, created_at=age) for each, age in zip(examples(Origin.NEW, 3), (0.0, 1e12, None), strict=True)]
    for half_life_s in (1e-3, 1e15):
        drawn = mix(ages, {Origin.NEW: 1.0}, max_pairs=2, seed=0, half_life_s=half_life_s).examples
        assert len(drawn) == 2
    assert ages[1] in mix(ages, {Origin.NEW: 1.0}, max_pairs=2, seed=0, half_life_s=1e-3).examples


def test_settings_give_the_shares_and_the_half_life() -> None:
    assert shares_of(MixSettings()) == SHARES
    assert half_life_of(MixSettings(half_life_days=2)) == 2 * DAY_S
    assert half_life_of(MixSettings(half_life_days=None)) is None


@given(st.sets(st.integers(0, 200), max_size=60), st.sets(st.integers(0, 200), max_size=60), seeds)
def test_an_original_preference_never_changes_sides_whatever_is_added(
    numbers: set[int], more: set[int], seed: int
) -> None:
    def split(of: set[int]) -> tuple[set[str], set[str]]:
        given_examples = [example_of(make_pair(n, text=f"topic{n % 40} asked{n % 40}"), Origin.ORIGINAL) for n in of]
        found = split_originals(given_examples, share=0.3, seed=seed, similarity=1.0)
        assert len(found.training) + len(found.holdout) + found.n_near == len(of)
        check_no_leak(found.training, found.holdout)
        return {each.pair_id for each in found.training}, {pair.id for pair in found.holdout}

    training, holdout = split(numbers)
    later_training, later_holdout = split(numbers | more)
    assert holdout <= later_holdout
    assert training <= later_training


def test_originals_that_ask_nearly_what_is_held_out_are_on_neither_side() -> None:
    """The forms are everywhere, so what counts is the task."""
    words = ("bread", "soup", "tea", "jam", "rice", "cake", "eggs", "salad")
    asked = [f"{form} {word} at home" for word in words for form in ("cook good", "cook good fresh")]
    given_examples = [example_of(make_pair(n, text=text), Origin.ORIGINAL) for n, text in enumerate(asked)]
    loose = split_originals(given_examples, share=0.4, seed=1, similarity=1.0)
    strict = split_originals(given_examples, share=0.4, seed=1, similarity=0.25)
    assert loose.n_near == 0
    assert strict.holdout == loose.holdout
    assert strict.n_near > 0
    held = {word for pair in strict.holdout for word in str(pair.prompt[0]["content"]).split()} & set(words)
    assert held
    assert held.isdisjoint({word for each in strict.training for word in str(each.prompt[0]["content"]).split()})
    assert {pair.source for pair in strict.holdout} == {"original"}


def test_the_first_round_has_no_earlier_pairs_and_is_smaller_for_it() -> None:
    mixed = mix(pool(50, 100, 0), SHARES, max_pairs=1000, seed=0)
    assert mixed.counts == {Origin.NEW: 50, Origin.ORIGINAL: 30, Origin.EARLIER: 0}
    assert mixed.shortfalls == {Origin.EARLIER: 20}


def test_a_mix_of_new_pairs_alone_takes_them_all() -> None:
    mixed = mix(pool(50, 100, 10), {Origin.NEW: 1.0}, max_pairs=1000, seed=0)
    assert mixed.counts == {Origin.NEW: 50, Origin.ORIGINAL: 0, Origin.EARLIER: 0}
    assert not mixed.shortfalls


def manifest_bytes(mixed: Mixed, *, is_swapped: bool = False) -> str:
    return json.dumps(dataset_manifest(mixed, [make_pair(900)], seed=1, shares=SHARES, is_swapped=is_swapped))


def test_the_manifest_is_the_same_for_the_same_inputs_and_another_for_others() -> None:
    mixed = mix(pool(20, 20, 20), SHARES, max_pairs=30, seed=1)
    again = mix(pool(20, 20, 20)[::-1], SHARES, max_pairs=30, seed=1)
    other = mix(pool(20, 20, 20), SHARES, max_pairs=30, seed=2)
    assert manifest_bytes(mixed) == manifest_bytes(again) != manifest_bytes(other)
    manifest = json.loads(manifest_bytes(mixed))
    assert manifest["by_origin"] == {"new": 15, "original": 9, "earlier": 6}
    assert sum(manifest["by_source"].values()) == len(manifest["pair_ids"]) == 30
    assert sum(manifest["by_stratum"]["new"].values()) == 15
    assert manifest["holdout_by_source"] == {"edit": 1}
    assert manifest["sources_without_holdout"] == ["original", "regeneration"]


def test_a_drill_swaps_every_preference_and_shows_in_the_hash() -> None:
    mixed = mix(pool(4, 0, 0), {Origin.NEW: 1.0}, max_pairs=10, seed=0)
    swapped = Mixed(swap_preferences(mixed.examples), mixed.counts, mixed.shortfalls)
    assert [e.chosen for e in swapped.examples] == [e.rejected for e in mixed.examples]
    hashes = [json.loads(manifest_bytes(one))["sha256"] for one in (mixed, swapped)]
    assert hashes[0] != hashes[1]


def test_original_preferences_are_read_in_trls_format() -> None:
    row = {
        "pair_id": "p1",
        "source": "original",
        "category": "harmful",
        "prompt": [{"role": "user", "content": "hello"}],
        "chosen": [{"role": "assistant", "content": "hi"}],
        "rejected": [{"role": "assistant", "content": "go away"}],
    }
    (example,) = parse_originals([json.dumps(row), "\n"])
    assert (example.pair_id, example.origin, example.category) == ("p1", Origin.ORIGINAL, "harmful")
    assert example.rejected["content"] == "go away"


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": [], "chosen": [], "rejected": []}', '{"prompt": 1}'])
def test_a_bad_original_preference_is_named_by_its_line(line: str) -> None:
    with pytest.raises(BadData, match="line 1"):
        parse_originals([line])


def test_tool_calls_are_trained_on_where_the_template_shows_them() -> None:
    pair = make_pair(0)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    calling = replace(pair, chosen={"role": "assistant", "content": "", "tool_calls": [call]})
    told = replace(pair, prompt=(*pair.prompt, calling.chosen, {"role": "tool", "content": "x"}))
    broken = replace(pair, chosen={"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]})
    image = replace(pair, prompt=({"role": "user", "content": [{"type": "image_url"}]},))
    ones = (pair, calling, told, broken, image)
    never = [Untrainable.BROKEN_CALL, Untrainable.NOT_TEXT]
    assert [untrainable(one, reads_tools=True) for one in ones] == [None, None, None, *never]
    no_tools = [None, Untrainable.NO_TOOLS, Untrainable.NO_TOOLS]
    assert [untrainable(one, reads_tools=False) for one in ones] == [*no_tools, *never]


def test_original_preferences_keep_their_tool_calls() -> None:
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]
    row = {
        "prompt": [{"role": "user", "content": "hello"}, {"role": "assistant", "tool_calls": calls}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": calls}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (example,) = parse_originals([json.dumps(row)])
    assert example.prompt[1] == {"role": "assistant", "content": None, "tool_calls": calls}
    assert example.chosen["tool_calls"] == calls
    assert untrainable(example, reads_tools=True) is None
