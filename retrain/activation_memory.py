"""Is there room to keep a training's activations, or must they be computed again on the way back?

Recomputation (gradient checkpointing) gives the same numbers and takes about a third more time. What keeping them takes
is measured, not guessed: one short forward pass tells how many bytes a token leaves behind for the way back, and that
grows with the tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

log = structlog.get_logger()

MOST_OF_FREE = 0.5
"""Of the memory that is free; the other half is for gradients, kernels' scratch and what else runs."""
PROBE_TOKENS = 64
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
KIB = 1024


def has_room(model: nn.Module, batch_tokens: int, *, n_processes: int = 1) -> bool:
    """Whether the activations of so many tokens fit into half of the memory that is free.

    Args:
        model: a causal language model on the device that it is trained on.
        n_processes: how many share the memory of this machine, where it is the CPU's.
    """
    device = next(model.parameters()).device
    free = free_bytes(device) // (1 if device.type == "cuda" else n_processes)
    needed = bytes_per_token(model) * batch_tokens
    fits = needed <= MOST_OF_FREE * free
    log.info("activations", kept=fits, needed_gb=round(needed / 1e9, 2), free_gb=round(free / 1e9, 2))
    return fits


def bytes_per_token(model: nn.Module) -> float:
    """What a token leaves behind for the way back, the probabilities of all tokens that could follow included."""
    device = next(model.parameters()).device
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _noted() as saved:
        answer: Any = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        answer.logits.float().log_softmax(-1)
    return sum(size for place, size in saved.items() if place not in own) / PROBE_TOKENS


def free_bytes(device: torch.device) -> int:
    """What can still be allocated; 0 where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if not MEMINFO.exists():
        return 0
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    free = next((KIB * int(line[1]) for line in lines if line[0] == "MemAvailable:"), 0)
    return min(free, _left_in_cgroup(CGROUP, free))


def _left_in_cgroup(directory: Path, otherwise: int) -> int:
    """What a container may still use; `otherwise` where it has no limit of its own."""
    try:
        limit = (directory / "memory.max").read_text().strip()
        used = int((directory / "memory.current").read_text())
    except (OSError, ValueError):
        return otherwise
    return otherwise if limit == "max" else max(0, int(limit) - used)


@contextmanager
def _noted() -> Iterator[dict[int, int]]:
    """Bytes of everything that autograd keeps meanwhile, by where it lies: views of one tensor are one."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
