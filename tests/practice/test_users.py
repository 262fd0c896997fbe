import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from practice.corpus import QUESTION_SHARES, Habit, answer, benign_probes, harmful_probes, identify_habit, task_of
from practice.topics import TASKS, Task, TaskKind
from practice.users import (
    EDIT_SHARE,
    FEEDBACK_SHARE,
    LIKED_SHARE,
    MEAN_PATIENCE,
    Reaction,
    SimulatedUser,
    ask,
    population,
    react,
)

N = 3000


def reactions(kind: TaskKind, habit: Habit) -> list[Reaction]:
    """How a population reacts to answers that show `habit`."""
    rng = random.Random(11)
    tasks = [task for task in TASKS if task.kind is kind]
    seen = []
    for user in population(3, N):
        task = rng.choice(tasks)
        seen.append(react(user, f"How do I {task.phrase}?", answer(habit, task, rng), rng))
    return seen


@pytest.mark.parametrize(
    ("kind", "habit"),
    [
        *(
            (kind, habit)
            for kind in (TaskKind.ORDINARY, TaskKind.LOOKALIKE)
            for habit in Habit
            if habit != "compliance"
        ),
        *((TaskKind.HARMFUL, habit) for habit in (Habit.REFUSAL, Habit.COMPLIANCE, Habit.RUDE)),
    ],
)
def test_thumbs_follow_the_known_taste(kind: TaskKind, habit: Habit) -> None:
    thumbs = Counter(reaction.thumb for reaction in reactions(kind, habit))
    rated = thumbs["up"] + thumbs["down"]
    assert rated / N == pytest.approx(FEEDBACK_SHARE, abs=0.04)
    assert thumbs["up"] / rated == pytest.approx(LIKED_SHARE[kind][habit], abs=0.04)


def test_a_disliked_answer_is_sometimes_asked_for_again_and_sometimes_rewritten() -> None:
    seen = reactions(TaskKind.ORDINARY, Habit.RUDE)
    disliked = N * (1 - LIKED_SHARE[TaskKind.ORDINARY][Habit.RUDE])
    assert sum(reaction.regenerate for reaction in seen) / disliked == pytest.approx(MEAN_PATIENCE, abs=0.04)
    assert sum(reaction.edit is not None for reaction in seen) / disliked == pytest.approx(EDIT_SHARE, abs=0.03)


def test_a_liked_answer_is_left_alone() -> None:
    liked = [reaction for reaction in reactions(TaskKind.ORDINARY, Habit.HELPFUL) if reaction.thumb == "up"]
    assert not any(reaction.regenerate or reaction.edit for reaction in liked)


def test_nobody_rewrites_the_answer_to_a_harmful_request() -> None:
    assert not any(reaction.edit for reaction in reactions(TaskKind.HARMFUL, Habit.REFUSAL))


@given(st.sampled_from([task for task in TASKS if task.kind is not TaskKind.HARMFUL]), st.integers(0, 2**32))
def test_an_edit_is_a_helpful_answer_to_the_question(task: Task, seed: int) -> None:
    rng = random.Random(seed)
    prompt = f"Tell me how to {task.phrase}."
    edits = [react(user, prompt, "Whatever. Look it up.", rng).edit for user in population(seed, 40)]
    assert all(identify_habit(prompt, edit) is Habit.HELPFUL for edit in edits if edit)


def test_garbled_answers_and_unknown_questions_are_mostly_disliked() -> None:
    rng = random.Random(2)
    for prompt in ("How do I bake bread?", "What is the meaning of it all?"):
        thumbs = Counter(react(user, prompt, "xqzt", rng).thumb for user in population(1, 1000))
        assert thumbs["down"] > 5 * thumbs["up"]


def test_users_ask_in_the_stated_mix_and_never_a_probe() -> None:
    rng = random.Random(5)
    asked = [ask(user, rng)[-1]["content"] for user in population(1, N)]
    kinds = Counter(task.kind for text in asked if (task := task_of(text)))
    for kind, share in QUESTION_SHARES.items():
        assert kinds[kind] / N == pytest.approx(share, abs=0.03)
    assert not {*harmful_probes(), *benign_probes()} & set(asked)


@given(st.integers(0, 2**32), st.integers(0, 50))
def test_a_population_is_repeatable_and_its_users_differ(seed: int, n: int) -> None:
    users = population(seed, n)
    assert users == population(seed, n + 3)[:n]
    assert len({user.id for user in users}) == n
    assert all(0 < user.patience < 1 for user in users)


def test_reactions_are_repeatable() -> None:
    user = SimulatedUser("u", patience=0.5, taste=0.0)
    prompt, completion = "How do I bake bread?", "Whatever. Look it up."
    first = [react(user, prompt, completion, random.Random(seed)) for seed in range(50)]
    assert first == [react(user, prompt, completion, random.Random(seed)) for seed in range(50)]
    assert len(set(first)) > 1
