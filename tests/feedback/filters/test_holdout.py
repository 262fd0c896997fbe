"""Promises of the hold-out, and a leak check that finds what is planted."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from feedback.filters.holdout import (
    FoundLeak,
    HoldoutRules,
    Leak,
    LeftOut,
    find_leaks,
    is_held_out,
    latest_share,
    prompt_key,
    split_holdout,
)
from feedback.filters.near_prompts import NearPrompts
from feedback.pairs import PreferencePair
from tests.feedback.filters.pairs import ask, assistant, make_pair

WORDS = ("roses", "tulips", "ferns", "bread", "chess", "knots")
TAILS = ("", " please", " and why", " in spring, step by step, without any tools at all")


@st.composite
def crowds(draw: st.DrawFn) -> list[PreferencePair]:
    """Pairs of a few users who ask much the same, some pairs made by several users, some by nobody."""
    users = st.sets(st.integers(0, 12), max_size=3)
    prompts = st.tuples(st.sampled_from(WORDS), st.sampled_from(TAILS))
    rows = draw(st.lists(st.tuples(users, prompts, st.integers(0, 100)), max_size=25))
    return [
        make_pair(
            number,
            prompt=ask(f"tell me something about {word}{tail}"),
            principals=tuple(sorted(f"key/{user}" for user in who)),
            created_at=float(at),
        )
        for number, (who, (word, tail), at) in enumerate(rows)
    ]


rules = st.builds(
    HoldoutRules,
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
    since=st.none() | st.floats(0, 100),
    prompt_similarity=st.sampled_from([0.5, 0.9, 1.0]),
)


@given(crowds(), rules)
def test_both_sides_have_nothing_in_common_and_every_pair_is_accounted_for(
    pairs: list[PreferencePair], chosen: HoldoutRules
) -> None:
    split = split_holdout(pairs, chosen)
    assert len(split.training) + len(split.holdout) + split.left_out.total() == len(pairs)
    assert find_leaks(split.training, split.holdout, chosen) == ()
    assert {who for p in split.training for who in p.principals}.isdisjoint(
        {who for p in split.holdout for who in p.principals}
    )
    assert {prompt_key(p.prompt) for p in split.training}.isdisjoint({prompt_key(p.prompt) for p in split.holdout})


@given(crowds(), rules, st.randoms(use_true_random=False))
def test_the_order_changes_nothing(pairs: list[PreferencePair], chosen: HoldoutRules, rng: random.Random) -> None:
    assert split_holdout(rng.sample(pairs, len(pairs)), chosen) == split_holdout(pairs, chosen)


@given(crowds(), rules)
def test_what_comes_later_moves_nobody_to_the_other_side(pairs: list[PreferencePair], chosen: HoldoutRules) -> None:
    earlier, later = split_holdout(pairs[::2], chosen), split_holdout(pairs, chosen)
    assert {p.id for p in earlier.holdout} <= {p.id for p in later.holdout}
    assert {p.id for p in earlier.training}.isdisjoint(p.id for p in later.holdout)


@given(crowds(), st.floats(0, 100), st.integers(0, 100))
def test_what_is_judged_by_lies_in_the_future_of_what_was_learned(
    pairs: list[PreferencePair], since: float, seed: int
) -> None:
    split = split_holdout(pairs, HoldoutRules(0.5, seed, since))
    assert all(pair.created_at < since for pair in split.training)
    assert all(pair.created_at >= since for pair in split.holdout)


def user(held_out: bool, number: int = 0) -> str:
    """The first user from `number` on that is, or is not, held out under `RULES`."""
    names = (f"key/{n}" for n in range(number, number + 1000))
    return next(name for name in names if is_held_out(name, RULES.share, RULES.seed) is held_out)


RULES = HoldoutRules(0.3, seed=5)
LONG = "Please explain to me in plain words how one grows roses on a balcony that gets little sun"
TRAINED = make_pair(1, prompt=ask("How do I bake bread?"), principals=(user(False),), created_at=1.0)
HELD = make_pair(2, prompt=ask(LONG), principals=(user(True),), created_at=9.0)
LEAKS: list[tuple[Leak, PreferencePair, str]] = [
    (Leak.PAIR, replace(TRAINED, id=HELD.id), HELD.id),
    (Leak.USER, replace(TRAINED, principals=(user(False), user(True))), user(True)),
    (Leak.ANSWER, replace(TRAINED, rejected_interaction=HELD.chosen_interaction or ""), HELD.chosen_interaction or ""),
    (Leak.PROMPT, replace(TRAINED, prompt=ask(LONG.upper() + " ")), prompt_key(HELD.prompt)),
    (Leak.NEAR_PROMPT, replace(TRAINED, prompt=ask(LONG + ".")), prompt_key(ask(LONG + "."))),
    (Leak.TIME, replace(TRAINED, created_at=9.0), "9.0"),
]


@pytest.mark.parametrize(("kind", "planted", "what"), LEAKS)
def test_a_planted_leak_is_found_and_nothing_else(kind: Leak, planted: PreferencePair, what: str) -> None:
    rules = replace(RULES, since=5.0)
    assert find_leaks([TRAINED], [HELD], rules) == ()
    assert find_leaks([planted], [HELD], rules) == (FoundLeak(kind, planted.id, what),)


def test_each_reason_to_leave_a_pair_out() -> None:
    rules = replace(RULES, since=5.0)
    mixed = make_pair(3, principals=(user(False), user(True)), created_at=9.0)
    early = replace(HELD, id="e" * 32, created_at=1.0)
    late = replace(TRAINED, id="f" * 32, created_at=9.0)
    near = replace(TRAINED, id="d" * 32, prompt=ask(LONG + "!"))
    split = split_holdout([TRAINED, HELD, mixed, early, late, near], rules)
    assert (split.training, split.holdout) == ((TRAINED,), (HELD,))
    assert split.left_out == {LeftOut.MIXED_USERS: 1, LeftOut.WRONG_TIME: 2, LeftOut.HELD_OUT_PROMPT: 1}


def test_the_share_of_users_is_as_asked() -> None:
    held = sum(is_held_out(f"key/{number}", 0.15, seed=3) for number in range(10_000))
    assert 1400 < held < 1600


def test_the_latest_share_is_a_time() -> None:
    pairs = [make_pair(number) for number in range(100)]
    since = latest_share(pairs, 0.2)
    assert since == 80.0
    assert latest_share(pairs, 0.0) == 99.0


def test_the_words_of_a_prompt_count_and_what_messages_carry_besides_does_not() -> None:
    parts = ({"role": "user", "content": [{"type": "text", "text": "Hello  there"}], "name": "ann"},)
    assert prompt_key(parts) == prompt_key(ask("hello there"))
    assert prompt_key((*ask("a"), assistant("b"))) != prompt_key((assistant("a"), *ask("b")))


def strangers(n: int, before: str = "", system: str = "", **fields: Any) -> list[PreferencePair]:
    """Pairs on questions of 15 words that have nothing in common, asked after the same words, told the same."""
    told = ({"role": "system", "content": system},) if system else ()
    questions = [" ".join(f"word{number}x{place}" for place in range(15)) for number in range(n)]
    return [
        make_pair(number, prompt=(*told, *ask(before + question)), **fields)
        for number, question in enumerate(questions)
    ]


TEMPLATE = " ".join(f"rule{number}" for number in range(500))


@pytest.mark.parametrize("shared", [{"system": TEMPLATE}, {"before": f"{TEMPLATE}. The question: "}])
def test_what_every_prompt_begins_with_does_not_make_them_near(shared: dict[str, str]) -> None:
    split = split_holdout(strangers(400, **shared), HoldoutRules(0.2, seed=0))
    assert split.left_out == {}
    assert (len(split.training) > 300, len(split.holdout) > 40) == (True, True)


@pytest.mark.parametrize("shared", [{"system": TEMPLATE}, {"before": f"{TEMPLATE}. The question: "}])
def test_the_same_question_is_found_behind_what_every_prompt_begins_with(shared: dict[str, str]) -> None:
    split = split_holdout(strangers(100, **shared), HoldoutRules(0.2, seed=0))
    held = split.holdout[0]
    near = replace(held, prompt=(*held.prompt[:-1], *ask(held.prompt[-1]["content"] + "!")), id="e" * 32)
    told_otherwise = replace(held, prompt=({"role": "system", "content": "Be brief."}, *held.prompt[-1:]), id="f" * 32)
    moved = [replace(pair, principals=(user(False),)) for pair in (near, told_otherwise)]
    leaks = find_leaks([*split.training, *moved], split.holdout, HoldoutRules(0.2, seed=0))
    assert {leak.pair_id for leak in leaks if leak.kind is Leak.NEAR_PROMPT} == {near.id, told_otherwise.id}


def test_a_chain_of_near_prompts_is_not_followed() -> None:
    words = LONG.split()
    chain = [" ".join(words[:-step] if step else words) for step in range(0, 10)]
    learned = [make_pair(10 + step, prompt=ask(text), principals=(user(False),)) for step, text in enumerate(chain)]
    split = split_holdout([HELD, *learned], replace(RULES, prompt_similarity=0.8))
    assert [pair.id for pair in split.training] == [pair.id for pair in learned[4:]]


@given(st.lists(st.text("abc ", max_size=12), max_size=6), st.text("abc ", max_size=12), st.floats(0.05, 1))
def test_near_prompts_are_those_that_comparing_with_each_would_find(
    held: list[str], text: str, similarity: float
) -> None:
    counts = Counter(shingle for prompt in {frozenset(parts(each)) for each in held} for shingle in prompt)
    n = len({frozenset(parts(each)) for each in held} - {frozenset()}) + 1

    def weight(shingles: set[str]) -> float:
        return math.fsum(math.log(n / max(counts[each], 1)) for each in shingles)

    shares = [weight(parts(text) & parts(each)) / (weight(parts(text) | parts(each)) or 1) for each in held]
    assume(all(abs(share - similarity) > 1e-6 for share in shares))
    assert NearPrompts(held, similarity).are_near([text]) == [any(share > similarity for share in shares)]


def parts(text: str) -> set[str]:
    words = text.split()
    return {*words, *(f"{one} {other}" for one, other in pairwise(words))}


@pytest.mark.parametrize("principals", [("/",), ("652cb6d2f14ac16a/",), ()])
def test_users_without_names_are_not_one_user(principals: tuple[str, ...]) -> None:
    pairs = strangers(200, principals=principals)
    again = [replace(pair, id=f"{number + 1000:032x}") for number, pair in enumerate(pairs)]
    split = split_holdout([*pairs, *again], HoldoutRules(0.2, seed=0))
    assert (len(split.training) + len(split.holdout), split.left_out) == (400, {})
    assert 40 < len(split.holdout) < 120
    assert find_leaks(split.training, split.holdout, HoldoutRules(0.2, seed=0)) == ()


def test_a_named_user_decides_where_others_have_no_name() -> None:
    named = [make_pair(number, prompt=ask(LONG), principals=("key/", user(True))) for number in range(3)]
    assert len(split_holdout(named, RULES).holdout) == 3
