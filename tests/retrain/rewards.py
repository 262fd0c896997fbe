"""Reward functions for tests, as a user would write them."""

from __future__ import annotations

from collections.abc import Sequence

from practice.corpus import Habit, identify_habit
from retrain.answer_scores import Conversation

WANTED = ("good", "kind")


def kindness(conversations: Sequence[Conversation]) -> list[float]:
    """The share of an answer's words that are wanted."""
    words = [str(conversation[-1]["content"]).split() for conversation in conversations]
    return [sum(word in WANTED for word in said) / max(1, len(said)) for said in words]


def helpfulness(conversations: Sequence[Conversation]) -> list[float]:
    """1 for an answer that helps with what was asked in the practice world."""
    asked_and_said = ((str(one[0]["content"]), str(one[-1]["content"])) for one in conversations)
    return [float(identify_habit(asked, said) is Habit.HELPFUL) for asked, said in asked_and_said]


def too_few(_conversations: Sequence[Conversation]) -> list[float]:
    return [1.0]


NOT_A_FUNCTION = 3
