"""Words and phrases by the million agree with the plain way of finding them."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.poisoning.evidence import _referring
from feedback.poisoning.prompt_clusters import LexicalClusterer
from feedback.poisoning.references import references_of
from feedback.poisoning.words import phrases_of, sorted_hashes, words_of
from tests.feedback.poisoning.made_pairs import talk

SPACED = st.text(alphabet="abcAB \n.,-_9éß\u0301\u200b\ud800", max_size=30)


def plain_words(text: str) -> list[str]:
    """As the documentation of `words.py` says it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = "".join(each for each in folded if unicodedata.category(each) != "Cf")
    return "".join(each if unicodedata.category(each)[0] in "LMN" or each == "_" else " " for each in seen).split()


@given(st.lists(SPACED, min_size=1, max_size=6))
def test_equal_words_and_only_those_have_equal_hashes(texts: list[str]) -> None:
    words = words_of(texts)
    expected = [(number, word) for number, text in enumerate(texts) for word in plain_words(text)]
    assert words.texts.tolist() == [number for number, _ in expected]
    assert_same_groups(words.hashes.tolist(), [word for _, word in expected])


@given(st.lists(SPACED, min_size=1, max_size=6), st.integers(1, 4))
def test_phrases_stay_within_their_text(texts: list[str], n_words: int) -> None:
    phrases = phrases_of(words_of(texts), n_words)
    expected = [
        (number, tuple(words[start : start + n_words]))
        for number, words in enumerate(map(plain_words, texts))
        for start in range(len(words) - n_words + 1)
    ]
    assert phrases.texts.tolist() == [number for number, _ in expected]
    assert_same_groups(phrases.hashes.tolist(), [phrase for _, phrase in expected])


def assert_same_groups(hashes: Sequence[int], names: Sequence[object]) -> None:
    groups: defaultdict[object, set[int]] = defaultdict(set)
    for hashed, name in zip(hashes, names, strict=True):
        groups[name].add(hashed)
    assert all(len(group) == 1 for group in groups.values())
    assert len(set(hashes)) == len(groups)


@given(st.lists(st.text(max_size=12), max_size=3), st.text(st.characters(max_codepoint=255), max_size=12))
def test_a_word_has_one_hash_whatever_stands_around_it(others: list[str], text: str) -> None:
    alone = words_of([text])
    together = words_of([*others, text])
    assert together.hashes[together.texts == len(others)].tolist() == alone.hashes.tolist()


def test_so_has_one_that_is_longer_than_the_powers_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a " * 30 + "word" * 20, "Word" * 20]
    before = words_of(texts).hashes.tolist()
    monkeypatch.setattr("feedback.poisoning.words.KEPT_POWERS", 8)
    assert words_of(texts).hashes.tolist() == before
    assert before[-1] == before[-2]


@given(st.lists(st.integers(0, 2**61 - 1) | st.integers(0, 3)), st.sampled_from([61, 64]))
def test_numbers_are_sorted_by_their_highest_bits_and_then_by_the_others(values: list[int], n_bits: int) -> None:
    assert sorted_hashes(np.array(values, np.uint64), n_bits).tolist() == sorted(values)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_any_text_can_be_read(texts: list[str]) -> None:
    words = words_of(texts)
    assert len(words.hashes) == len(words.texts)
    assert np.all(np.diff(words.texts) >= 0)


def test_without_spaces_each_character_is_a_word() -> None:
    assert words_of(["天空为什么是蓝色的", "Why blue?"]).texts.tolist() == [0] * 9 + [1, 1]


# Clusters


def labels(prompts: Sequence[str]) -> list[int]:
    clusterer = LexicalClusterer(0.85)
    # In batches of one: how they are cut must not matter.
    sketches = [clusterer.sketch([]), *(clusterer.sketch([prompt]) for prompt in prompts)]
    return [int(label) for label in clusterer.labels(np.concatenate(sketches))]


REFERRING = [
    "import os",
    "\u200bimport (",
    "see https://a.b/c",
    "#include <x>",
    "pip install y",
    "go get z",
    "require('q')",
]


@given(st.lists(st.lists(st.sampled_from([*REFERRING, "ªimport x", "É", "plain", "\n"])).map(" ".join), min_size=1))
def test_words_tell_which_texts_refer_to_something(texts: list[str]) -> None:
    told = set(_referring(texts, words_of(texts)))
    assert {index for index, text in enumerate(texts) if any(references_of(text))} <= told


LONG = talk("long", 40)


@pytest.mark.parametrize(
    "near", [LONG.upper(), f"{LONG} please", f"  {LONG}!!! ", LONG.replace(" ", "\u200b ", 5), f"Hello, {LONG}"]
)
def test_nearly_the_same_prompts_are_one_cluster(near: str) -> None:
    one, other, third = labels([LONG, near, talk("other", 40)])
    assert one == other != third


def test_prompts_of_one_form_are_not_the_same() -> None:
    found = labels([f"What is the capital of {country}?" for country in ("France", "Peru", "Mali", "Japan")])
    assert len(set(found)) == 4


@settings(max_examples=15, deadline=None)
@given(st.permutations([LONG, f"{LONG} please", "", "?!", "Hello", "hello", *(talk(n, 12) for n in range(6))]))
def test_clusters_do_not_depend_on_the_order(prompts: list[str]) -> None:
    assert clusters(prompts) == clusters(sorted(prompts))


def clusters(prompts: Sequence[str]) -> set[frozenset[str]]:
    members: defaultdict[int, set[str]] = defaultdict(set)
    for prompt, label in zip(prompts, labels(prompts), strict=True):
        members[label].add(prompt)
    return {frozenset(each) for each in members.values()}


def test_no_prompts_are_no_clusters() -> None:
    assert labels([]) == []


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import evil.sub as e", {"import evil.sub"}),
        ("  from evil import x", {"import evil"}),
        ("const e = require('evil-js');", {"import evil-js"}),
        ('import e from "evil-js"', {"import evil-js", "import e"}),
        ("await import('./evil.js')", {"import ./evil.js"}),
        ("Run `npm install --save evil-js` first", {"import evil-js"}),
        ("#include <evil.h>", {"import evil.h"}),
        ("See HTTPS://user:pw@Evil.Example:8443/x?y.", {"url evil.example:8443"}),
        ("Important: come from home, use it.", set()),
    ],
)
def test_references(text: str, expected: set[str]) -> None:
    assert set(references_of(text)) == expected


def test_hostile_texts_are_read_in_no_time() -> None:
    for hostile in ("http://" * 20_000, "from " * 20_000, "pip install -" * 10_000, "import(" + " " * 100_000):
        assert sum(len(name) for name in references_of(hostile)) < 10 * len(hostile)
