"""Ratings as votes, whose vote it is, and requests that were sent twice: what mining makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.candidates import Skipped
from feedback.interactions import FeedbackEvent, Interaction
from feedback.mining import mine_alias
from feedback.pairs import mine_pairs
from feedback.store import load_pairs
from pawl.database import Database
from tests.feedback.test_pairs import (
    B_OF_A,
    SKY,
    A,
    B,
    better,
    down,
    events_,
    interactions_,
    rate,
    say,
    sides,
    tell,
    up,
)
from tests.pawl.records import save

NOBODY: dict[str, Any] = {"key_id": "", "user_id": None}
"""As a feedback token's event is recorded before its completion is visible."""

# What a rating says


@pytest.mark.parametrize("liked", [up(8, 1), rate(8, 1, 0.75), rate(8, 1, 1.0)])
@pytest.mark.parametrize("disliked", [down(9, 2), rate(9, 2, 0.25), rate(9, 2, 0.0)])
def test_a_rating_makes_the_pair_that_a_thumb_would(liked: FeedbackEvent, disliked: FeedbackEvent) -> None:
    assert mine_pairs([A, B], [liked, disliked]) == mine_pairs([A, B], [up(8, 1), down(9, 2)])
    assert sides(mine_pairs([A, B], [liked, disliked])) == {("thumbs", 1, 2)}


@pytest.mark.parametrize("value", [0.26, 0.5, 0.74])
def test_a_middling_rating_is_as_if_it_were_not_there(value: float) -> None:
    for said in ([], [up(8, 1), down(9, 2)], [up(8, 1)]):
        assert mine_pairs([A, B_OF_A], [*said, rate(10, 1, value), rate(11, 2, value)]) == mine_pairs([A, B_OF_A], said)


@pytest.mark.parametrize(("value", "label"), [(1.0, True), (0.0, False)])
def test_a_lone_rating_is_an_unpaired_example(value: float, label: bool) -> None:
    mined = mine_pairs([A], [rate(9, 1, value)])
    assert [(one.label, one.principals) for one in mined.unpaired] == [(label, ("key/ann",))]
    assert mined.skipped == {Skipped.UNPAIRED: 1}


def test_a_thumb_and_a_rating_that_agree_are_one_voter() -> None:
    mined = mine_pairs([A, B], [up(8, 1), rate(9, 1, 0.9), down(10, 2), rate(11, 2, 0.1)])
    (pair,) = mined.pairs
    assert (pair.n_voters, pair.principals, pair.created_at) == (1, ("key/ann",), 11.0)
    assert mined.skipped == {}


@pytest.mark.parametrize("other", ["ann", "bob"])
def test_a_thumb_and_a_rating_that_disagree_contradict_each_other(other: str) -> None:
    mined = mine_pairs([A, B], [up(8, 1), rate(9, 1, 0.1, user_id=other), down(10, 2)])
    assert mined.pairs == ()
    assert mined.skipped == {Skipped.CONTRADICTION: 1, Skipped.UNPAIRED: 1}


@pytest.mark.parametrize("event", [rate(9, 1, 0.0, user_id="bob"), rate(9, 2, 1.0, user_id="bob")])
def test_a_rating_confirms_a_regeneration(event: FeedbackEvent) -> None:
    (pair,) = mine_pairs([A, B_OF_A], [event]).pairs
    assert (pair.margin, pair.principals) == (0.8, ("key/ann", "key/bob"))


def test_a_rating_speaks_against_a_choice_and_an_edit() -> None:
    chosen = mine_pairs([A, B], [better(8, 2, 1), rate(9, 1, 1.0), rate(10, 2, 0.0)])
    edited = mine_pairs([A], [tell(8, "edit", 1, "better"), rate(9, 1, 1.0)])
    assert (chosen.skipped[Skipped.CONTRADICTION], edited.skipped[Skipped.CONTRADICTION]) == (1, 1)
    assert edited.pairs == ()


def test_a_rating_that_is_taken_back_never_was() -> None:
    gone = rate(10, 1, 0.0, is_retraction=True)
    assert mine_pairs([A, B], [rate(8, 1, 1.0), gone, down(9, 2)]) == mine_pairs([A, B], [down(9, 2)])


# Whose vote it is


@pytest.mark.parametrize("event", [up(9, 1), rate(9, 1, 1.0), tell(9, "edit", 1, "better"), better(9, 2, 1)])
def test_a_vote_by_nobody_is_that_of_whoever_got_the_answer(event: FeedbackEvent) -> None:
    mined = mine_pairs([A, B], [replace(event, **NOBODY)])
    assert mined == mine_pairs([A, B], [event])
    behind = [pair.principals for pair in mined.pairs] + [example.principals for example in mined.unpaired]
    assert behind == [("key/ann",)]


def test_a_vote_that_came_early_and_one_that_came_late_are_one_voter() -> None:
    (pair,) = mine_pairs([A, B], [up(8, 1, **NOBODY), down(9, 2)]).pairs
    assert pair.principals == ("key/ann",)


def test_who_comes_with_a_key_speaks_for_it() -> None:
    (example,) = mine_pairs([A], [up(8, 1, user_id=None)]).unpaired
    assert example.principals == ("key/",)


def test_early_votes_in_the_store_are_their_owners(database: Database) -> None:
    save(database, [A, replace(B, user_id=None)], [up(8, 1, **NOBODY), down(9, 2, **NOBODY)])
    mine_alias(database, A.alias, 100.0)
    assert [pair.principals for pair in load_pairs(database, A.alias)] == [("key/", "key/ann")]


# Requests that an SDK sent twice


def twin(of: Interaction, *, later_s: float = 1.5) -> Interaction:
    """The same request once more: its first answer was lost on the way."""
    return replace(say(7, "another answer", SKY), **{
        "created_at": of.created_at + later_s,
        **{name: getattr(of, name) for name in ("prompt", "prompt_sha", "alias", "key_id", "user_id", "regenerate_of")},
    })  # fmt: skip


@settings(max_examples=150)
@given(interactions_, events_(), st.integers(0, 5), st.sampled_from([0.0, 0.5, 3.0]))
def test_a_request_sent_twice_is_no_regeneration(
    served: tuple[Interaction, ...], said: Sequence[FeedbackEvent], number: int, later_s: float
) -> None:
    """Nobody said a word about the answer that was lost, so it changes nothing, whichever of the two it is."""
    original = replace(served[number], regenerate_of=None)
    others = [each for each in served if each.id != original.id]
    alone = mine_pairs([*others, original], said)
    for lost in (twin(original, later_s=later_s), twin(original, later_s=-later_s)):
        assert mine_pairs([*others, original, lost], said) == alone


def test_a_regeneration_sent_twice_is_one_pair() -> None:
    lost, seen = B_OF_A, twin(B_OF_A)
    mined = mine_pairs([A, lost, seen], [])
    assert sides(mined) == {("regeneration", 7, 1)}
    assert mined.skipped == {Skipped.CONTRADICTION: 1}
    assert mine_pairs([A, replace(lost, is_complete=False), seen], []).skipped == {Skipped.INCOMPLETE: 1}


def test_the_answer_that_was_seen_may_be_liked_or_not() -> None:
    liked = mine_pairs([A, B_OF_A, twin(B_OF_A)], [up(20, 7)])
    assert [(pair.margin, int(pair.chosen_interaction or "", 16)) for pair in liked.pairs] == [(0.8, 7)]
    disliked = mine_pairs([A, B_OF_A, twin(B_OF_A)], [down(20, 7)])
    assert disliked.pairs == ()
