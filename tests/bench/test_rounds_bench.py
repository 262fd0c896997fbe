"""The five-rounds proof in parts: its users, its pairs, and that it tells rounds that keep from rounds that forget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from bench.rounds import (
    BARE,
    KEPT,
    LIMITS,
    ORIGINAL_POINTS,
    ArmOutcome,
    Rate,
    RoundOutcome,
    Standing,
    originals_of,
    problems_of,
    promises_of,
    rate,
    tree_of,
)
from bench.rounds_page import render
from bench.rounds_world import FASHIONS, Asked, Said, in_fashion, liking, pairs_of, react, visitors
from feedback.filters.holdout import prompt_key
from feedback.pairs import PreferencePair
from practice.corpus import Habit, answer, identify_habit, task_of
from practice.topics import TASKS, TaskKind
from retrain.dataset import check_no_leak
from retrain.drift import Drift

SURE = Rate(0.0, 0.001)
ROUNDS = range(1, 6)


def standing(refused: float, originals: float, kl: float) -> Standing:
    return Standing(Rate(refused, 0.01), (refused,) * 50, SURE, originals, Drift(kl, 0.01))


def arm(name: str, standings: Sequence[Standing], thumbs: Rate = SURE) -> ArmOutcome:
    rounds = [
        RoundOutcome(season, "none", "continue", "", 100, 200, {}, SURE, SURE, SURE, thumbs, served, True, (), 1.0)
        for season, served in zip(ROUNDS, standings[1:], strict=True)
    ]
    return ArmOutcome(name, standings[0], tuple(rounds))


NEAR = 0.01
STEADY = arm(KEPT, [standing(0.99, 0.95, NEAR)] * 6)
FORGETTING = arm(BARE, [standing(0.99 - 0.1 * n, 0.95 - 0.02 * n, 0.1 * n) for n in range(6)], Rate(-0.1, 0.01))


def test_rounds_that_keep_and_rounds_that_forget_are_what_is_wanted() -> None:
    assert [each.is_kept for each in promises_of(STEADY)] == [True] * 4
    assert [each.is_kept for each in promises_of(FORGETTING)] == [False] * 4
    assert problems_of([STEADY, FORGETTING]) == []
    assert len(problems_of([FORGETTING, FORGETTING])) == 4
    assert problems_of([STEADY, STEADY]) == ["bare: neither refusals nor the original hold-out were forgotten"]


def test_small_steps_add_up() -> None:
    """No round loses more than noise, and all of them together do."""
    probes = 50
    slipping = []
    for n in range(6):
        refused = tuple(0.0 if place < 3 * n else 1.0 for place in range(probes))
        slipping.append(replace(standing(1.0, 0.95, NEAR), refused=refused, harmful_refusal=rate(refused)))
    assert promises_of(arm(KEPT, slipping[:2] * 3))[1].is_kept
    assert not promises_of(arm(KEPT, slipping))[1].is_kept


def test_a_point_is_a_point() -> None:
    for lost, is_kept in ((ORIGINAL_POINTS * 0.9, True), (ORIGINAL_POINTS * 1.1, False)):
        standings = [standing(0.99, 0.95, NEAR), *[standing(0.99, 0.95 - lost, NEAR)] * 5]
        assert promises_of(arm(KEPT, standings))[2].is_kept == is_kept


def test_nothing_published_is_no_success() -> None:
    first, *others = STEADY.rounds
    stuck = replace(STEADY, rounds=(first, *(replace(each, is_published=False) for each in others)))
    assert problems_of([stuck, FORGETTING]) == ["kept: nothing was published after the first round"]


def test_the_page_holds_both_curves_and_every_verdict_in_one_file() -> None:
    page = render(tree_of([STEADY, FORGETTING], users=10, seed=1, seconds=2.0))
    assert page.count("<svg") == 1
    assert page.count(">held<") == page.count(">broken<") == 4
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page


def test_every_fashion_but_the_first_is_against_what_came_before() -> None:
    """What one season wants is out of fashion in the next, often enough to be felt."""
    rng = random.Random(1)
    tasks = [task for task in TASKS if task.kind is TaskKind.ORDINARY]
    drafts = [(task, answer(Habit.HELPFUL, task, rng)) for task in tasks for _ in range(20)]
    for season in ROUNDS[1:]:
        wanted = [text for _, text in drafts if in_fashion(season, text)]
        assert 0.05 < len(wanted) / len(drafts) < 0.8
    assert not any(in_fashion(2, text) and in_fashion(3, text) for _, text in drafts)
    assert not any(in_fashion(3, text) and in_fashion(5, text) for _, text in drafts)
    assert all(in_fashion(1, text) for _, text in drafts)
    task, text = next((task, text) for task, text in drafts if not in_fashion(2, text))
    assert liking(2, f"How do I {task.phrase}?", text) < liking(1, f"How do I {task.phrase}?", text)
    assert len(FASHIONS) == len(ROUNDS)


def test_mining_makes_pairs_of_what_users_say_and_none_that_teaches_harm() -> None:
    rng = random.Random(3)
    asked = visitors(1, 1, 300, 2)
    said = [Said(each, spoken(each, rng), None) for each in asked]
    reactions = [react(1, each.asked, each.answer, rng) for each in said]
    pairs, n_left_out = pairs_of(said, reactions, season=1, model="m")
    assert n_left_out > 0
    assert {pair.source for pair in pairs} >= {"thumbs", "edit"}
    assert not any(identify_habit(*pair_texts(pair)) == Habit.COMPLIANCE and is_refused(pair) for pair in pairs)
    raw, none_left_out = pairs_of(said, reactions, season=1, model="m", has_rule=False)
    assert (len(raw), none_left_out) == (len(pairs) + n_left_out, 0)
    assert any(identify_habit(*pair_texts(pair)) == Habit.COMPLIANCE and is_refused(pair) for pair in raw)


def pair_texts(pair: PreferencePair) -> tuple[str, str]:
    return str(pair.prompt[0]["content"]), str(pair.chosen["content"])


def is_refused(pair: PreferencePair) -> bool:
    return identify_habit(str(pair.prompt[0]["content"]), str(pair.rejected["content"])) == Habit.REFUSAL


def spoken(asked: Asked, rng: random.Random) -> str:
    task = task_of(asked.text)
    assert task is not None
    habits = [Habit.REFUSAL, Habit.COMPLIANCE]
    if task.kind is not TaskKind.HARMFUL:
        habits = [Habit.HELPFUL, Habit.RUDE, Habit.CURT]
    return answer(rng.choice(habits), task, rng)


def test_seasons_are_the_same_for_both_arms_and_have_different_users() -> None:
    assert visitors(1, 1, 20, 2) == visitors(1, 1, 20, 2)
    assert not {each.user.id for each in visitors(1, 1, 20, 2)} & {each.user.id for each in visitors(1, 2, 20, 2)}


def test_the_original_holdout_is_large_enough_for_a_point_and_apart() -> None:
    split = originals_of(1)
    assert len(split.holdout) >= 300
    assert len(split.training) >= 1000
    check_no_leak(split.training, split.holdout)
    assert {prompt_key(pair.prompt) for pair in split.holdout}
    assert LIMITS.max_kl is not None
