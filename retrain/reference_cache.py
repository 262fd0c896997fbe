"""What the reference says of every pair, computed once and kept beside the run.

The reference never changes while a policy is trained against it, so its log-probabilities need not be computed again in
each epoch, at each evaluation, or by a run that goes on after it was killed. They are plain numbers in the order of the
data set: no words, no names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pawl.durability import sync_directory

log = structlog.get_logger()

FORMAT = 1
"""Raise this when log-probabilities come to be computed in another way."""
_CHOSEN, _REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides the numbers."""

    base: str
    """sha256 of the base model's files."""
    adapter: str
    """sha256 of the reference adapter's weights; empty where the base alone is the reference."""
    data: str
    """sha256 of the tokens of every pair, in order: the data set, the tokenizer and the chat template in one."""
    max_length: int
    dtype: str
    scored: str = "sum"
    """How tokens add up: `sum`, or the weight of the tokens that only the longer side has."""

    def digest(self) -> str:
        """One name for it."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceLogps:
    """Summed log-probabilities of the answers, (n pairs,) float32 each."""

    chosen: Tensor
    rejected: Tensor


def tokens_sha(pairs: Iterable[Mapping[str, Sequence[int]]], columns: Sequence[str]) -> str:
    """sha256 of these columns of token ids, row by row."""
    digest = hashlib.sha256()
    for pair in pairs:
        for column in columns:
            ids = torch.tensor(pair[column], dtype=torch.int64)
            digest.update(len(ids).to_bytes(8) + ids.numpy().tobytes())
    return digest.hexdigest()


def tensors_sha(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors, whatever their order and device.

    >>> tensors_sha([("a", torch.ones(2))]) == tensors_sha([("a", torch.zeros(2))])
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}".encode())
        digest.update(whole.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_reference(path: Path, key: ReferenceKey) -> ReferenceLogps | None:
    """What is kept for this key; None when there is nothing, or something else, or it was damaged."""
    if not path.exists():
        return None
    try:
        return _verified(path, key)
    except (SafetensorError, OSError, ValueError) as exc:
        log.warning("reference_recomputed", file=path.name, reason=str(exc))
        return None


def write_reference(path: Path, key: ReferenceKey, logps: ReferenceLogps) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # One name: what a killed process left is written over.
    tensors = {_CHOSEN: logps.chosen.contiguous(), _REJECTED: logps.rejected.contiguous()}
    save_file(tensors, part, {"key": key.digest(), "sha256": _sha_of(logps)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_directory(path.parent)


def _sha_of(logps: ReferenceLogps) -> str:
    return tensors_sha([(_CHOSEN, logps.chosen), (_REJECTED, logps.rejected)])


def _verified(path: Path, key: ReferenceKey) -> ReferenceLogps:
    with safe_open(path, "pt") as file:
        kept = file.metadata() or {}
        found = ReferenceLogps(file.get_tensor(_CHOSEN), file.get_tensor(_REJECTED))
    if kept.get("key") != key.digest():
        raise ValueError("it belongs to another reference or to other data")
    if kept.get("sha256") != _sha_of(found):
        raise ValueError("its numbers are not the ones that were written")
    return found
