"""What makes TRL's preference trainer faster without changing what it learns.

Batches of like length, prompts that go through the model once for both answers, and a reference that is asked once.
All of it is put on a trainer that was built as usual, so the losses stay TRL's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from trl import DPOTrainer

from retrain.activation_memory import has_room
from retrain.batching import Batching, epoch_order
from retrain.process_group import from_first, n_processes
from retrain.reference_cache import (
    ReferenceKey,
    ReferenceLogps,
    read_reference,
    tensors_sha,
    tokens_sha,
    write_reference,
)
from retrain.shared_prompts import share_prompts

log = structlog.get_logger()

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""What TRL makes of a pair."""
CHOSEN_LOGPS, REJECTED_LOGPS = "ref_chosen_logps", "ref_rejected_logps"
"""The columns that TRL's loss takes the reference from."""
REFERENCE_BATCHES = 2
"""The reference is asked for this many batches at once: without gradients they take less memory."""


@dataclass(frozen=True)
class Speed:
    """Which of it to use."""

    bucket_steps: int
    share_prompts: bool
    reference_file: Path | None
    """Where the reference's log-probabilities are kept; None asks it again at every batch."""
    base_sha: str
    """sha256 of the base model's files; only looked at where they are kept."""


def speed_up(trainer: DPOTrainer, speed: Speed) -> None:
    """Put it on a trainer that has its data set and its reference, and has not trained yet."""
    if speed.share_prompts and (reason := share_prompts(trainer.model.get_base_model())):
        log.info("prompts_not_shared", reason=reason)
    sides = _lengths_of(trainer)
    lengths = [prompt + chosen + rejected for prompt, chosen, rejected in sides]
    _bucket(trainer, lengths, speed.bucket_steps)
    _weigh_tokens_alike(trainer, [chosen for _, chosen, _ in sides])
    if speed.reference_file is not None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        _ask_reference_once(trainer, lengths, speed.reference_file, speed.base_sha)


def keep_activations_if_they_fit(trainer: DPOTrainer) -> None:
    """Do without recomputation where there is room for the largest batch, its rows all as long as the longest.

    The first process decides for all. A model that is spread over devices is left as it is.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in _lengths_of(trainer))
    batch_tokens = 2 * trainer.args.per_device_train_batch_size * longest
    with trainer.compute_loss_context_manager():
        fits = has_room(trainer.model, batch_tokens, n_processes=n_processes())
    trainer.args.activation_checkpointing = not from_first(fits)


class LengthSampler(Sampler[int]):
    """Gives a data loader the examples in the order of `epoch_order`; which epoch it is, the trainer's state says.

    A loader's `set_epoch` does not reach a sampler through the layers that a resumed, distributed training puts round
    it, and the second epoch would see the order of the first.
    """

    def __init__(self, lengths: Sequence[int], batching: Batching, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.batching = batching
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batching, self.epoch()))

    def __len__(self) -> int:
        return len(self.lengths)


def _bucket(trainer: DPOTrainer, lengths: Sequence[int], bucket_steps: int) -> None:
    batching = Batching(
        batch_size=trainer.args.per_device_train_batch_size,
        n_processes=trainer.accelerator.num_processes,
        accumulation=trainer.args.gradient_accumulation_steps,
        window_steps=bucket_steps,
        seed=trainer.args.seed,
    )
    sampler = LengthSampler(lengths, batching, lambda: math.floor(trainer.state.epoch or 0))
    trainer._get_train_sampler = lambda _dataset=None: sampler


def _weigh_tokens_alike(trainer: DPOTrainer, chosen_lengths: Sequence[int]) -> None:
    """Let a token count the same in the likelihood term whatever batch it is in.

    TRL takes the mean over a batch's tokens. In batches of like length that would let the tokens of short answers count
    for more; with this weight the sum over an optimiser step does not depend on how its examples are batched.
    """
    if "sft" not in trainer.loss_types:
        return
    plain_loss, plain_weights = trainer.compute_loss, list(trainer.loss_weights)
    mean_tokens = sum(chosen_lengths) / len(chosen_lengths)

    def compute_loss(model: Any, inputs: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        chosen, _ = inputs["completion_mask"].chunk(2)
        share = float(chosen.sum()) / (mean_tokens * len(chosen)) if trainer.model.training else 1.0
        pairs = zip(trainer.loss_types, plain_weights, strict=True)
        trainer.loss_weights = [weight * share if name == "sft" else weight for name, weight in pairs]
        return plain_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


def _ask_reference_once(trainer: DPOTrainer, lengths: Sequence[int], path: Path, base_sha: str) -> None:
    """Give the data set the reference's log-probabilities, and make every later one that is evaluated get its own."""
    key = _reference_key(trainer, trainer.train_dataset, base_sha)
    trainer.train_dataset = _with_reference(trainer, trainer.train_dataset, lengths, path, key)
    trainer.precompute_ref_logps = True
    trainer._precompute_ref_logps = lambda dataset, *_: _with_columns(dataset, _ask(trainer, dataset, None))
    if isinstance(trainer.eval_dataset, Dataset):
        trainer.eval_dataset = trainer._precompute_ref_logps(trainer.eval_dataset)
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = {
            name: trainer._precompute_ref_logps(dataset) for name, dataset in trainer.eval_dataset.items()
        }


def _with_reference(
    trainer: DPOTrainer, dataset: Dataset, lengths: Sequence[int], path: Path, key: ReferenceKey
) -> Dataset:
    found = read_reference(path, key)
    # Whether to ask is decided by all together: those who ask wait for one another.
    if all(gather_object([found is not None and len(found.chosen) == len(dataset)])):
        assert found is not None
        return _with_columns(dataset, found)
    asked = _ask(trainer, dataset, lengths)
    if trainer.accelerator.is_main_process:
        write_reference(path, key, asked)
    trainer.accelerator.wait_for_everyone()
    return _with_columns(dataset, asked)


def _ask(trainer: DPOTrainer, dataset: Dataset, lengths: Sequence[int] | None) -> ReferenceLogps:
    """The reference's log-probabilities of every pair; each process asks for a share of the batches."""
    size = trainer.args.per_device_train_batch_size * REFERENCE_BATCHES
    order = sorted(range(len(dataset)), key=lengths.__getitem__) if lengths else list(range(len(dataset)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
    answers = [(batch, *_ask_batch(trainer, dataset, batch)) for batch in mine]
    chosen, rejected = torch.zeros(len(dataset)), torch.zeros(len(dataset))
    for batch, of_chosen, of_rejected in gather_object(answers):
        chosen[batch], rejected[batch] = torch.tensor(of_chosen), torch.tensor(of_rejected)
    return ReferenceLogps(chosen, rejected)


def _ask_batch(trainer: DPOTrainer, dataset: Dataset, batch: Sequence[int]) -> tuple[list[float], list[float]]:
    inputs = trainer._prepare_inputs(trainer.data_collator([dataset[index] for index in batch]))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
    return chosen.float().tolist(), rejected.float().tolist()


def _with_columns(dataset: Dataset, logps: ReferenceLogps) -> Dataset:
    columns = {CHOSEN_LOGPS: logps.chosen, REJECTED_LOGPS: logps.rejected}
    for name, values in columns.items():
        dataset = dataset.add_column(name, values.tolist())
    return dataset


def _lengths_of(trainer: DPOTrainer) -> list[tuple[int, int, int]]:
    return [_part_lengths(pair, trainer.args.max_length) for pair in _token_rows(trainer.train_dataset)]


def _reference_key(trainer: DPOTrainer, dataset: Dataset, base_sha: str) -> ReferenceKey:
    frozen = [(name, weight) for name, weight in trainer.model.named_parameters() if ".ref." in name]
    alpha = trainer.ld_alpha
    return ReferenceKey(
        base=base_sha,
        adapter=tensors_sha(frozen) if frozen else "",
        data=tokens_sha(_token_rows(dataset), COLUMNS),
        max_length=trainer.args.max_length,
        dtype=str(trainer.model.dtype),
        scored="sum" if alpha is None else f"{alpha:g} beyond the shorter side",
    )


def _token_rows(dataset: Dataset) -> Iterator[Mapping[str, Sequence[int]]]:
    rows: Iterator[Mapping[str, Sequence[int]]] = iter(dataset.select_columns(list(COLUMNS)))
    return rows


def _part_lengths(pair: Mapping[str, Sequence[int]], max_length: int) -> tuple[int, int, int]:
    """Tokens of the prompt and of either answer that are left when each side is cut to `max_length`."""
    prompt, chosen, rejected = (len(pair[column]) for column in COLUMNS)
    room = max(0, max_length - prompt)
    return min(prompt, max_length), min(chosen, room), min(rejected, room)
