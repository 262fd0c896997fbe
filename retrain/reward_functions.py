"""Rewards for training on the model's own answers: a reward model or a Python function, and what length costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pawl.errors import ConfigurationError
from retrain.answer_scores import Conversation, ScoreAnswers, checked_scores
from retrain.errors import BadData

TRLReward = Callable[..., list[float]]
"""As `trl.GRPOTrainer` calls it: by keywords, with whatever else it knows."""


def named_function(name: str) -> ScoreAnswers:
    """The function that `module:function` names; importing runs the module.

    Raises:
        ConfigurationError: there is none.
    """
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ConfigurationError(f"a reward function is named as module:function, not {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as exc:
        raise ConfigurationError(f"there is no reward function {name}: {type(exc).__name__}: {exc}") from exc
    if not callable(found):
        raise ConfigurationError(f"{name} is not a function")
    return _guarded(name, found)


def _guarded(name: str, score: ScoreAnswers) -> ScoreAnswers:
    def guarded(conversations: Sequence[Conversation]) -> Sequence[float]:
        try:
            return score(conversations)
        except Exception as exc:
            raise BadData(f"the reward function {name} failed: {type(exc).__name__}: {exc}") from exc

    return guarded


def overlong_cost(n_tokens: int, limit: int, buffer: int) -> float:
    """0 for an answer that is short enough, rising over the last `buffer` tokens to 1 for one that is cut off.

    DAPO's soft overlong punishment (Yu et al. 2025, "DAPO", eq. 13), with the sign turned.

    >>> [overlong_cost(n, 100, 20) for n in (80, 90, 100)]
    [0.0, 0.5, 1.0]
    """
    if buffer <= 0:
        return 0.0
    return min(1.0, max(0.0, (n_tokens - (limit - buffer)) / buffer))


def for_trl(score: ScoreAnswers, *, limit: int, buffer: int, weight: float) -> TRLReward:
    """The reward of a completion: its score, less what its length costs.

    Args:
        limit: tokens of an answer at which it is cut off.
    """

    def reward(
        prompts: Sequence[Sequence[Mapping[str, Any]]],
        completions: Sequence[Sequence[Mapping[str, Any]]],
        completion_ids: Sequence[Sequence[int]],
        **_rest: object,
    ) -> list[float]:
        conversations: list[Conversation] = [
            [*prompt, *said] for prompt, said in zip(prompts, completions, strict=True)
        ]
        costs = [weight * overlong_cost(len(ids), limit, buffer) for ids in completion_ids]
        return [one - cost for one, cost in zip(checked_scores(score, conversations), costs, strict=True)]

    return reward
