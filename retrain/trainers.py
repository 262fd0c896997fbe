"""TRL's preference trainers with what Pawl asks of them besides: guards, whole checkpoints, a way out on SIGTERM.

Also the objectives without a reference on TRL's own DPO trainer: the same tokens, the same batches, no reference pass.
TRL has trainers for these as experiments, which tokenise in another way and may change in any release.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer it builds unless told not to.

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer, KTOTrainer

from pawl.settings import TrainingGuardSettings
from retrain import checkpoints
from retrain.checkpoints import Spent
from retrain.errors import TrainingFailed
from retrain.losses import odds_ratio_loss, simpo_loss
from retrain.objectives import Objective
from retrain.termination import Termination
from retrain.training_guards import budget, displacement, fault, noted

Batch = Mapping[str, Any]
CHOSEN_PER_TOKEN = "logps/chosen_per_token"


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Decides after every step whether there is another one.

    A fault raises at once. An order to leave and a used-up budget end the training in order, with a checkpoint; whoever
    called `train` then raises for them.
    """

    def __init__(
        self,
        guards: TrainingGuardSettings,
        termination: Termination,
        spent: Spent,
        *,
        n_first: int,
    ) -> None:
        self.guards = guards
        self.termination = termination
        self.spent = spent
        self.over_budget: str | None = None
        self.is_leaving = False
        self.tokens = spent.tokens
        self.grad_norm = 0.0
        self.agree: Callable[[bool], bool] = bool
        """Whether any of the processes that train together says so."""
        self._n_first = n_first
        self._losses: list[Tensor] = []
        self._measures: list[float] = []
        self._since = time.monotonic()

    def saw_loss(self, loss: Tensor) -> None:
        """Of a part of a step; the parts add up."""
        self._losses.append(loss.detach())

    def saw_chosen(self, per_token: float) -> None:
        """How likely the preferred answers of a part of a step are."""
        self._measures.append(per_token)

    def on_pre_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        loss = float(sum(self._losses))
        if why := fault(state.global_step + 1, loss, self.grad_norm, self.guards):
            raise TrainingFailed(why)

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        passed = replace(self.spent, seconds=self.spent.seconds + now - self._since, tokens=self.tokens)
        self.spent, self._since = noted(passed, self._measures, n_first=self._n_first), now
        self._losses, self._measures = [], []
        if why := displacement(state.global_step, self.spent, self.guards):
            raise TrainingFailed(why)
        self.over_budget = budget(state.global_step, state.max_steps, self.spent, self.guards)
        self.is_leaving = self.termination.is_requested
        if self.agree(self.is_leaving or self.over_budget is not None):
            control.should_save = True
            control.should_training_stop = True


class Watched:
    """Goes before one of TRL's trainers in a class; `observe` must have been called before `train`."""

    fingerprint: str
    watch: Watch

    def observe(self, watch: Watch, fingerprint: str) -> None:
        """Tell `watch` of every step, and mark checkpoints with what they belong to."""
        self.watch, self.fingerprint = watch, fingerprint
        self._total_train_tokens = watch.spent.tokens  # So that what TRL logs goes on counting as well.
        watch.agree = self._any_process
        self.add_callback(watch)  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.watch.tokens = self._total_train_tokens
        n_chosen, n_tokens = _chosen_size(inputs)
        logged = self._metrics["train"]  # type: ignore[attr-defined]
        if n_tokens and logged["logps/chosen"]:
            logged[CHOSEN_PER_TOKEN].append(logged["logps/chosen"][-1] * n_chosen / n_tokens)
            self.watch.saw_chosen(self._chosen_measure(logged) * n_chosen / n_tokens)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.watch.saw_loss(loss)
        return loss

    def _chosen_measure(self, logged: Mapping[str, list[float]]) -> float:
        """Relative to the reference: the same for every batch as long as nothing was learned."""
        return logged["rewards/chosen"][-1] / self.beta  # type: ignore[attr-defined,no-any-return]

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        self.watch.grad_norm = float(norm)
        return self.watch.grad_norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The trainer's files, then the manifest that says they are whole, then away with what is older."""
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            home, step = Path(self.args.output_dir), self.state.global_step  # type: ignore[attr-defined]
            filled = home / f"{checkpoints.PREFIX}{step}"
            checkpoints.seal(filled, step=step, fingerprint=self.fingerprint, spent=self.watch.spent)
            checkpoints.prune(home)
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def _any_process(self, is_so: bool) -> bool:
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.num_processes == 1:
            return is_so
        return bool(accelerator.gather(torch.tensor([is_so], device=accelerator.device)).any())


class PairTrainer(Watched, DPOTrainer):  # type: ignore[misc]
    """DPO and its relatives."""


class ThumbsTrainer(Watched, KTOTrainer):  # type: ignore[misc]
    """KTO."""


class ReferenceFreeTrainer(Watched, DPOTrainer):  # type: ignore[misc]
    """SimPO and ORPO, on the batches and log-probabilities of DPO."""

    objective: Objective

    def _chosen_measure(self, logged: Mapping[str, list[float]]) -> float:
        return logged["logps/chosen"][-1]

    def _compute_loss(self, model: Any, inputs: Batch, _return_outputs: bool) -> Tensor:
        mask = inputs["completion_mask"][:, 1:]
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        per_token = model(**given, use_cache=False, labels=labels, fused_lm_head=True).log_probs[:, -mask.size(1) :]
        chosen, rejected = per_token.sum(dim=1).chunk(2)
        n_chosen, n_rejected = mask.sum(dim=1).clamp(min=1).chunk(2)
        nll = -chosen.sum() / n_chosen.sum()
        self._log_pairs(inputs, chosen.detach() / n_chosen, rejected.detach() / n_rejected, chosen.detach())
        return self._preference(chosen, rejected, (n_chosen, n_rejected), nll)

    def _preference(self, chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], nll: Tensor) -> Tensor:
        objective = self.objective
        if objective.losses[0] == "orpo":
            # Equation 6: the likelihood of the chosen answer, and lambda times the odds ratio.
            weighted: Tensor = nll + objective.beta * odds_ratio_loss(chosen, rejected, lengths).mean()
            return objective.weights[0] * weighted
        preference = simpo_loss(chosen, rejected, lengths, beta=objective.beta, gamma=objective.gamma).mean()
        terms = (preference, nll)
        return sum((w * term for w, term in zip(objective.weights, terms, strict=False)), torch.zeros_like(nll))

    def _log_pairs(self, inputs: Batch, chosen_mean: Tensor, rejected_mean: Tensor, chosen: Tensor) -> None:
        """What DPO logs under the same names; a reward is the mean per token, times beta for SimPO."""
        scale = self.objective.beta if self.objective.losses[0] == "simpo" else 1.0
        better, worse = (self.accelerator.gather(each) * scale for each in (chosen_mean, rejected_mean))
        n_tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum()
        self._total_train_tokens += int(n_tokens)
        values = {
            "rewards/chosen": better.mean(),
            "rewards/rejected": worse.mean(),
            "rewards/margins": (better - worse).mean(),
            "rewards/accuracies": (better > worse).float().mean(),
            "logps/chosen": self.accelerator.gather(chosen).mean(),
        }
        for name, value in values.items():
            self._metrics["train"][name].append(value.item())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def _chosen_size(inputs: Batch) -> tuple[int, int]:
    """How many preferred answers a batch has, and their tokens."""
    mask = inputs["completion_mask"][:, 1:]
    if "label" in inputs:
        liked = mask[torch.as_tensor(inputs["label"], dtype=torch.bool, device=mask.device)]
    else:
        liked = mask[: len(mask) // 2]
    return len(liked), int(liked.sum())
