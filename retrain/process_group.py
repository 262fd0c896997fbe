"""What a training process asks of those it trains with; alone, it is the first of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from retrain.errors import TrainingFailed


@contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """Join the processes that the environment names. No exchange between them then takes longer than this."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cuda:nccl,cpu:gloo"  # Whole state dicts of sharded models are gathered on the CPU.
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not _is_grouped() or distributed.get_rank() == 0


def n_processes() -> int:
    """How many train together."""
    return distributed.get_world_size() if _is_grouped() else 1


def from_first(value: Any) -> Any:
    """What the first process has; the others' values are not looked at."""
    if not _is_grouped():
        return value
    shared = [value]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def trained_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, each whole; where they are sharded, every process must ask at the same time."""
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in trained}


def check_ranks_agree(weights: Mapping[str, Tensor]) -> None:
    """Every process ended with the same weights, bit for bit.

    Raises:
        TrainingFailed: not so. What each then holds was not trained on the whole batch.
    """
    if not _is_grouped():
        return
    digests: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(digests, _digest(weights))
    if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise TrainingFailed(f"the processes ended with different weights: ranks {odd} differ from rank 0")


def _is_grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
