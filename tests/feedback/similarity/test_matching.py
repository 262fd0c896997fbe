"""Thumbs on nearly the same question: one liked over one disliked, each once, in whatever order they come."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.candidates import Skipped, Source
from feedback.interactions import FeedbackEvent, Interaction
from feedback.pairs import MinedPairs, mine_pairs
from tests.feedback.similarity.asking import BEFORE, GRASS, NEAR, SKY, SKY_AGAIN, TOOLS, ask, asked_, user
from tests.feedback.test_pairs import down, events_, iid, sides, up


def mine(interactions: Sequence[Interaction], events: Sequence[FeedbackEvent]) -> MinedPairs:
    return mine_pairs(interactions, events, similarity=NEAR)


def test_a_liked_answer_is_preferred_to_a_disliked_one_on_nearly_the_same_question() -> None:
    liked = ask(1, "Scattering.", SKY, key_id="one", user_id="ann", probability=0.1, model="tuned")
    disliked = ask(2, "Paint.", SKY_AGAIN, key_id="two", user_id="bob", probability=0.7, model="base")
    mined = mine([liked, disliked], [up(8, 1, key_id="one"), down(9, 2, key_id="two", user_id="bob")])
    (pair,) = mined.pairs
    assert (pair.source, pair.margin, pair.prompt) == ("similar_thumbs", 0.7, (user(SKY),))
    assert (pair.chosen_interaction, pair.rejected_interaction) == (iid(1), iid(2))
    assert (pair.chosen["content"], pair.rejected["content"]) == ("Scattering.", "Paint.")
    assert (pair.probability, pair.models, pair.created_at) == (0.1, ("base", "tuned"), 9.0)
    assert pair.principals == ("one/ann", "two/bob")
    assert (mined.skipped, mined.unpaired) == ({}, ())


def test_the_same_conversation_comes_first() -> None:
    answers = [ask(1, "a", SKY), ask(2, "b", SKY), ask(3, "c", SKY_AGAIN)]
    mined = mine(answers, [up(7, 1), down(8, 2), down(9, 3)])
    assert sides(mined) == {("thumbs", 1, 2)}
    assert mined.skipped == {Skipped.UNPAIRED: 1}


def test_the_nearest_is_matched_and_each_thumb_once() -> None:
    nearer, farther = SKY + "!", SKY.replace("noon", "nooon")
    answers = [ask(1, "a", SKY), ask(2, "b", farther), ask(3, "c", nearer)]
    mined = mine(answers, [up(7, 1), down(8, 2), down(9, 3)])
    assert sides(mined) == {("similar_thumbs", 1, 3)}
    assert [example.interaction for example in mined.unpaired] == [iid(2)]


def test_popular_questions_are_matched_as_far_as_both_go() -> None:
    answers = [*(ask(n, f"a{n}", SKY) for n in range(7)), *(ask(n, f"a{n}", SKY_AGAIN) for n in range(7, 12))]
    mined = mine(answers, [up(20 + n, n) if n < 7 else down(20 + n, n) for n in range(12)])
    assert len(mined.pairs) == len({pair.chosen_interaction for pair in mined.pairs}) == 5
    assert len({pair.rejected_interaction for pair in mined.pairs}) == 5
    assert mined.skipped == {Skipped.UNPAIRED: 2}


def test_equal_answers_are_no_pair_but_others_of_the_same_questions_are() -> None:
    answers = [ask(1, "a", SKY), ask(2, "a", SKY), ask(3, "a ", SKY_AGAIN), ask(4, "b", SKY_AGAIN)]
    mined = mine(answers, [up(6, 1), up(7, 2), down(8, 3), down(9, 4)])
    assert [(pair.source, pair.rejected_interaction) for pair in mined.pairs] == [("similar_thumbs", iid(4))]
    assert mined.skipped == {Skipped.UNPAIRED: 2}


@pytest.mark.parametrize(
    "disliked",
    [
        ask(2, "b", GRASS),
        ask(2, "b", (*BEFORE, user(SKY_AGAIN))),
        ask(2, "b", SKY_AGAIN, alias="other"),
        ask(2, "b", SKY_AGAIN, tools=TOOLS),
        ask(2, "b", SKY + " (in 2 lines)"),
    ],
)
def test_another_question_history_alias_tool_or_number_is_no_match(disliked: Interaction) -> None:
    mined = mine([ask(1, "a", SKY), disliked], [up(8, 1), down(9, 2)])
    assert (mined.pairs, mined.skipped) == ((), {Skipped.UNPAIRED: 2})


def test_later_turns_match_after_the_same_history() -> None:
    answers = [ask(1, "a", (*BEFORE, user(SKY))), ask(2, "b", (*BEFORE, user(SKY_AGAIN)))]
    assert sides(mine(answers, [up(8, 1), down(9, 2)])) == {("similar_thumbs", 1, 2)}


def test_a_margin_that_is_asked_for_leaves_them_alone() -> None:
    answers, events = [ask(1, "a", SKY), ask(2, "b", SKY_AGAIN)], [up(8, 1), down(9, 2)]
    assert len(mine_pairs(answers, events, similarity=NEAR, min_margin=0.7).pairs) == 1
    assert len(mine_pairs(answers, events, similarity=NEAR, min_margin=0.8).unpaired) == 2


@settings(max_examples=100)
@given(asked_, events_())
def test_two_thumbs_become_one_pair_and_nothing_else_changes(
    interactions: tuple[Interaction, ...], events: list[FeedbackEvent]
) -> None:
    without, mined = mine_pairs(interactions, events), mine(interactions, events)
    similar = [pair for pair in mined.pairs if pair.source == Source.SIMILAR_THUMBS]
    assert tuple(pair for pair in mined.pairs if pair not in similar) == without.pairs
    assert len(mined.unpaired) == len(without.unpaired) - 2 * len(similar) == mined.skipped[Skipped.UNPAIRED]
    assert all(example in without.unpaired for example in mined.unpaired)
    others = {reason: n for reason, n in without.skipped.items() if reason is not Skipped.UNPAIRED}
    assert {reason: n for reason, n in mined.skipped.items() if reason is not Skipped.UNPAIRED} == others
    was_alone = {example.interaction: example.label for example in without.unpaired}
    taken = [(pair.chosen_interaction, True) for pair in similar]
    taken += [(pair.rejected_interaction, False) for pair in similar]
    assert len({side for side, _ in taken}) == len(taken)
    assert all(was_alone[side or ""] is label for side, label in taken)
    for pair in similar:
        assert str(pair.chosen["content"]).strip() != str(pair.rejected["content"]).strip()


@settings(max_examples=100)
@given(asked_, events_(), st.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing(
    interactions: tuple[Interaction, ...], events: list[FeedbackEvent], random: Random
) -> None:
    shuffled = [*interactions, *interactions[:2]], [*events, *events[:3]]
    random.shuffle(shuffled[0])
    random.shuffle(shuffled[1])
    assert repr(mine(*shuffled)) == repr(mine(interactions, events))
