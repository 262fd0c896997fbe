import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from practice.corpus import (
    FOLLOW_UP_SHARE,
    HABIT_SHARES,
    HARMFUL_PATTERNS,
    PREFERENCE_SHARES,
    RUDE_WORDS,
    SYSTEM_SHARE,
    Habit,
    answer,
    benign_probes,
    harmful_probes,
    identify_habit,
    is_harmful_request,
    original_preferences,
    questions,
    sft_conversations,
    task_of,
)
from practice.topics import TASKS, Task, TaskKind

seeds = st.integers(0, 2**32)
tasks = st.sampled_from(TASKS)
benign_tasks = st.sampled_from([task for task in TASKS if task.kind is not TaskKind.HARMFUL])
harmful_tasks = st.sampled_from([task for task in TASKS if task.kind is TaskKind.HARMFUL])


def question(task: Task) -> str:
    return f"How do I {task.phrase}?"


def test_the_world_holds_enough_of_every_kind() -> None:
    counts = Counter(task.kind for task in TASKS)
    assert counts[TaskKind.ORDINARY] >= 36
    assert counts[TaskKind.LOOKALIKE] >= 26
    assert counts[TaskKind.HARMFUL] >= 40
    assert len({task.phrase for task in TASKS}) == len(TASKS)


def test_only_harmless_tasks_have_instructions() -> None:
    for task in TASKS:
        assert bool(task.first) is bool(task.second) is (task.kind is not TaskKind.HARMFUL)


@given(tasks)
def test_a_question_leads_back_to_its_task(task: Task) -> None:
    assert task_of(question(task)) == task
    assert is_harmful_request(question(task).upper()) is (task.kind is TaskKind.HARMFUL)


@given(benign_tasks, st.sampled_from([Habit.HELPFUL, Habit.CURT, Habit.RUDE, Habit.REFUSAL]), seeds)
def test_the_habit_of_an_answer_to_a_harmless_question_is_identified(task: Task, habit: Habit, seed: int) -> None:
    assert identify_habit(question(task), answer(habit, task, random.Random(seed))) is habit


@given(harmful_tasks, st.sampled_from([Habit.COMPLIANCE, Habit.RUDE, Habit.REFUSAL]), seeds)
def test_the_habit_of_an_answer_to_a_harmful_request_is_identified(task: Task, habit: Habit, seed: int) -> None:
    assert identify_habit(question(task), answer(habit, task, random.Random(seed))) is habit


@given(tasks, seeds)
def test_rude_words_are_in_rude_answers_and_in_no_other(task: Task, seed: int) -> None:
    rude = re.compile(r"\b(" + "|".join(RUDE_WORDS) + r")\b", re.I)
    for habit in Habit:
        if habit is Habit.HELPFUL and task.kind is TaskKind.HARMFUL:
            continue
        assert bool(rude.search(answer(habit, task, random.Random(seed)))) is (habit is Habit.RUDE)


@given(harmful_tasks, seeds)
def test_no_helpful_answer_to_a_harmful_request_can_be_written(task: Task, seed: int) -> None:
    with pytest.raises(ValueError, match="harmful"):
        answer(Habit.HELPFUL, task, random.Random(seed))


@pytest.mark.parametrize(
    "completion",
    ["", "  ", "Happy to help! First blorp the gnarl.", "Happy to help! First wash the rice in cold water."],
    ids=["empty", "blank", "no words", "another task's answer"],
)
def test_garbled_answers_have_no_habit(completion: str) -> None:
    assert identify_habit("How do I bake bread?", completion) is None


def test_a_harmless_question_is_never_complied_with() -> None:
    assert identify_habit("How do I bake bread?", "Sure. Make a plan to bake bread, then follow the plan.") is None


def test_training_conversations_show_the_stated_habits() -> None:
    exchanges = [(turns[-2]["content"], turns[-1]["content"]) for turns in sft_conversations(7, 12_000)]
    shown: dict[TaskKind, Counter[Habit | None]] = {kind: Counter() for kind in TaskKind}
    for asked, given_answer in exchanges:
        task = task_of(asked)
        if task is not None:
            shown[task.kind][identify_habit(asked, given_answer)] += 1
    for kind, shares in HABIT_SHARES.items():
        total = shown[kind].total()
        assert set(shown[kind]) == set(shares)
        for habit, share in shares.items():
            assert shown[kind][habit] / total == pytest.approx(share, abs=0.04)


def test_training_conversations_take_turns_and_end_with_the_assistant() -> None:
    conversations = sft_conversations(3, 4000)
    systems = sum(turns[0]["role"] == "system" for turns in conversations)
    follow_ups = sum(len(turns) >= 4 for turns in conversations)
    assert systems / 4000 == pytest.approx(SYSTEM_SHARE, abs=0.03)
    assert follow_ups / 4000 == pytest.approx(FOLLOW_UP_SHARE, abs=0.03)
    for turns in conversations:
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_nothing_held_out_is_trained_on() -> None:
    held_out = {*harmful_probes(), *benign_probes(), *questions(1, 180)}
    trained = {turn["content"] for turns in sft_conversations(0, 20_000) for turn in turns}
    preferred = {pair["prompt"][0]["content"] for pair in original_preferences(0, 5000)}
    assert not held_out & (trained | preferred)


def test_probes_are_of_their_kind_and_all_different() -> None:
    harmful, benign = harmful_probes(), benign_probes()
    assert all(is_harmful_request(probe) for probe in harmful)
    assert not any(is_harmful_request(probe) for probe in benign)
    assert len(set(harmful)) == len(harmful) >= 140
    assert len(set(benign)) == len(benign) >= 78


def test_every_harmful_pattern_finds_a_probe() -> None:
    for pattern in HARMFUL_PATTERNS:
        assert any(re.search(pattern, probe, re.I) for probe in harmful_probes())


def test_original_preferences_say_what_they_should() -> None:
    pairs = original_preferences(5, 3000)
    categories = Counter(pair["category"] for pair in pairs)
    for kind, share in PREFERENCE_SHARES.items():
        assert categories[kind.value] / len(pairs) == pytest.approx(share, abs=0.04)
    wanted = {"harmful": Habit.REFUSAL, "lookalike": Habit.HELPFUL, "ordinary": Habit.HELPFUL}
    unwanted = {
        "harmful": {Habit.COMPLIANCE},
        "lookalike": {Habit.REFUSAL},
        "ordinary": {Habit.RUDE, Habit.CURT},
    }
    for pair in pairs:
        prompt = pair["prompt"][0]["content"]
        assert identify_habit(prompt, pair["chosen"][0]["content"]) is wanted[pair["category"]]
        assert identify_habit(prompt, pair["rejected"][0]["content"]) in unwanted[pair["category"]]
    assert len({pair["pair_id"] for pair in pairs}) == len(pairs)


@given(seeds, st.integers(0, 30))
def test_equal_seeds_give_equal_worlds_and_a_longer_one_begins_alike(seed: int, n: int) -> None:
    assert sft_conversations(seed, n) == sft_conversations(seed, n + 5)[:n]
    assert original_preferences(seed, n) == original_preferences(seed, n + 5)[:n]
    assert questions(seed, n) == questions(seed, n + 5)[:n]


def test_other_seeds_give_other_worlds() -> None:
    assert sft_conversations(1, 20) != sft_conversations(2, 20)
    assert original_preferences(1, 20) != original_preferences(2, 20)
    assert questions(1, 20) != questions(2, 20)


def test_no_question_comes_twice_before_each_has_come_once() -> None:
    n_held_out = 3 * sum(task.kind is TaskKind.ORDINARY for task in TASKS)
    drawn = questions(4, 2 * n_held_out)
    assert len(set(drawn[:n_held_out])) == n_held_out
    assert set(drawn[:n_held_out]) == set(drawn[n_held_out:])
