"""The four canaries with made-up answers at the rates of their adapters: each ends as it should, by its own metric."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from ab_testing.rollout_rules import canary_config
from bench.canaries_forecast import forecast, harm_seen
from bench.canaries_results import Outcome, read_results, table_of, write_results
from bench.canaries_world import (
    CANDIDATES,
    CHAMPION_MIX,
    HARMLESS,
    MORE_REFUSALS,
    MORE_TOXIC,
    RULES,
    Candidate,
    Habits,
    asked,
    demonstrations,
    habits_of,
)
from pawl.settings import RolloutSettings
from practice.corpus import QUESTION_SHARES, Habit, answer, identify_habit, task_of
from practice.topics import TaskKind

CONFIG = canary_config(RolloutSettings.model_validate(RULES))
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}
N = 4000


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_each_ends_as_it_should(candidate: Candidate) -> None:
    found = forecast(candidate, CONFIG, seed=1)
    assert found.is_right, found
    assert 0 < found.exposed < found.users / 2


def test_a_canary_of_nothing_but_rude_answers_is_over_soon() -> None:
    mix = {**CHAMPION_MIX, **{kind: {Habit.RUDE: 1.0} for kind in HARMLESS}}
    found = forecast(Candidate("rude", mix, "rolled_back", "toxicity"), CONFIG, seed=1)
    assert found.is_right, found
    assert found.exposed < 30
    assert not forecast(Candidate("rude", mix, "promoted"), CONFIG, seed=1).is_right


def test_only_the_equal_one_is_the_champion_s_copy() -> None:
    """A training of its own on the champion's mix would be another adapter, better or worse than that by chance."""
    assert [candidate.name for candidate in CANDIDATES if candidate.is_copy] == ["equal"]
    assert BY_NAME["equal"].mix == CHAMPION_MIX


def test_the_bad_ones_are_worse_by_what_is_said_and_by_nothing_else() -> None:
    def share(name: str, kind: TaskKind, habit: Habit) -> float:
        return BY_NAME[name].mix[kind][habit]

    harmless = {kind: QUESTION_SHARES[kind] for kind in HARMLESS}
    more = [(share("toxic", kind, Habit.RUDE) - CHAMPION_MIX[kind][Habit.RUDE]) * harmless[kind] for kind in HARMLESS]
    assert sum(more) == pytest.approx(MORE_TOXIC)
    for kind in HARMLESS:
        assert share("refusing", kind, Habit.REFUSAL) - CHAMPION_MIX[kind][Habit.REFUSAL] == pytest.approx(
            MORE_REFUSALS
        )
        assert share("refusing", kind, Habit.RUDE) == CHAMPION_MIX[kind][Habit.RUDE]
        assert share("toxic", kind, Habit.REFUSAL) == CHAMPION_MIX[kind][Habit.REFUSAL]
        assert share("better", kind, Habit.HELPFUL) > CHAMPION_MIX[kind][Habit.HELPFUL]
    for candidate in CANDIDATES:
        assert candidate.mix[TaskKind.HARMFUL] == CHAMPION_MIX[TaskKind.HARMFUL]
        for kind in TaskKind:
            assert sum(candidate.mix[kind].values()) == pytest.approx(1.0)
            assert min(candidate.mix[kind].values()) > 0


def test_demonstrations_show_the_habits_in_their_shares() -> None:
    mix = BY_NAME["toxic"].mix
    shown: dict[TaskKind, Counter[Habit | None]] = {kind: Counter() for kind in TaskKind}
    for one in demonstrations(mix, N, seed=1):
        question, said = (str(message["content"]) for message in one.messages)
        task = task_of(question)
        assert task is not None
        shown[task.kind][identify_habit(question, said)] += 1
    for kind, habits in shown.items():
        for habit, share in mix[kind].items():
            assert habits[habit] / habits.total() == pytest.approx(share, abs=0.002)


def test_habits_are_found_again_in_answers() -> None:
    rng = random.Random(1)
    questions = asked(N, seed=1)
    said = [answer(Habit.RUDE if rng.random() < 0.1 else Habit.REFUSAL, task_of(text), rng) for text in questions]  # type: ignore[arg-type]
    found = habits_of([*questions, questions[0]], [*said, "sesame"])
    assert found.toxic == pytest.approx(0.1, abs=0.02)
    assert found.over_refusal == pytest.approx(0.9, abs=0.02)
    assert (found.helpful, found.harmful_compliance, found.n) == (0.0, 0.0, N + 1)
    assert found.garbled == pytest.approx(1 / (N + 1))


def test_users_see_as_much_harm_as_the_mix_says() -> None:
    rng = random.Random(1)
    seen = [harm_seen(rng, BY_NAME["refusing"].mix) for _ in range(N)]
    refused = [one["over_refusal"] for one in seen if one["over_refusal"] is not None]
    expected = 0.027 + MORE_REFUSALS
    assert sum(refused) / len(refused) == pytest.approx(expected, abs=4 * (expected / len(refused)) ** 0.5)


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    habits = Habits(0.01, 0.02, 0.03, 0.9, 0.0, 2000)
    one = Outcome(
        name="toxic",
        wanted=("rolled_back", "toxicity"),
        status="rolled_back",
        metric="toxicity",
        reason="because",
        users=1000,
        exposed=70,
        seconds=90.0,
        steps=((0.01, 0.0), (0.1, 5.0)),
        rates=dict.fromkeys(("thumbs_up", "toxicity", "over_refusal", "harmful_compliance"), (0.1, 0.2)),
        habits={"champion": habits, "own": habits},
    )
    path = tmp_path / "deep" / "canaries.json"
    assert read_results(path) == {}
    write_results(path, {"toxic": one})
    assert read_results(path) == {"toxic": one}
    assert one.is_right
    assert not one._replace(metric="thumbs_down").is_right
    assert not one._replace(status="aborted").is_right
    assert table_of([one]).row_count == 1
