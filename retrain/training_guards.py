"""When a training must stop: pure decisions, each a sentence that says what, at which step, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pawl.settings import TrainingGuardSettings
from retrain.checkpoints import Spent

WINDOW = 10
"""Steps whose mean is compared: a single batch may be of another kind than the first."""


def fault(step: int, loss: float, grad_norm: float, guards: TrainingGuardSettings) -> str | None:
    """Why the weights must not take this step; None if they may."""
    if not math.isfinite(loss):
        return (
            f"the loss is {_named(loss)} at step {step}, and no weight was changed by it: lower"
            " retrain.training.learning_rate, or look for broken examples"
        )
    if not math.isfinite(grad_norm):
        return (
            f"the gradient is {_named(grad_norm)} at step {step}, and no weight was changed by it: lower"
            " retrain.training.learning_rate"
        )
    if grad_norm > guards.max_grad_norm:
        return (
            f"the gradient norm is {grad_norm:.4g} at step {step}, over the bound of {guards.max_grad_norm:g}: lower"
            " retrain.training.learning_rate or beta, or raise retrain.training.guards.max_grad_norm if that is usual"
        )
    return None


def displacement(step: int, spent: Spent, guards: TrainingGuardSettings) -> str | None:
    """Why training must not go on after this step, for what it does to the preferred answers; None if it may."""
    fallen = chosen_fall(spent)
    if fallen is None or fallen <= guards.max_chosen_fall:
        return None
    return (
        f"the preferred answers became {fallen:.2f} nats per token less likely by step {step}, over the bound of"
        f" {guards.max_chosen_fall:g}: raise retrain.training.sft_weight or beta, or lower learning_rate"
    )


def budget(step: int, n_steps: int, spent: Spent, guards: TrainingGuardSettings) -> str | None:
    """Which budget is used up while there are steps left; None if none is."""
    if step >= n_steps:
        return None
    if spent.seconds > guards.max_hours * 3600:
        what, setting = f"{spent.seconds / 3600:.2f} hours of {guards.max_hours:g}", "max_hours"
    elif guards.max_tokens is not None and spent.tokens >= guards.max_tokens:
        what, setting = f"{spent.tokens} tokens of {guards.max_tokens}", "max_tokens"
    else:
        return None
    return (
        f"{what} are used up at step {step} of {n_steps}: raise retrain.training.guards.{setting}, and the run goes on"
        " from its checkpoint, or lower retrain.max_pairs"
    )


def noted(spent: Spent, measures: Sequence[float], *, n_first: int) -> Spent:
    """With a step's measures of the preferred answers, as far as there are any.

    Args:
        n_first: how many steps are the start. One is enough where the measure is relative to a reference: before the
            first step it is the same for every batch.
    """
    if not measures:
        return spent
    mean = sum(measures) / len(measures)
    first = spent.first if len(spent.first) >= n_first else (*spent.first, mean)
    return replace(spent, first=first, last=(*spent.last, mean)[-WINDOW:])


def chosen_fall(spent: Spent) -> float | None:
    """By how many nats per token the preferred answers fell from the start; None while there is too little to tell.

    >>> chosen_fall(Spent(first=(0.0,), last=(-0.5,) * WINDOW))
    0.5
    """
    if not spent.first or len(spent.last) < WINDOW:
        return None
    return sum(spent.first) / len(spent.first) - sum(spent.last) / len(spent.last)


def _named(value: float) -> str:
    return "not a number" if math.isnan(value) else "infinite"
