"""Training states on disk that a killed run continues from: whole or not there at all.

The trainer fills a directory; sealing it syncs every file and writes the manifest last, by renaming it into place. What
has no manifest, or files that differ from it, was being written when its process died, and is never continued from.
Nothing older is deleted before the newer one is sealed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pawl.durability import sync_directory
from retrain.steps import write_json

MANIFEST = "checkpoint.json"
PREFIX = "checkpoint-"
KEPT = 2
"""The newest, and the one before it: a disk that loses the newest does not lose the round."""
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Spent:
    """What a training has used up and seen so far, over all its processes."""

    seconds: float = 0.0
    tokens: int = 0
    first: tuple[float, ...] = ()
    """The measure that the fall of the chosen answers is told from, of its first steps."""
    last: tuple[float, ...] = ()
    """The same of the latest steps."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole training state."""

    path: Path
    step: int
    """Optimiser steps taken."""
    fingerprint: str
    """Of everything that the weights depend on; another one belongs to another training."""
    spent: Spent = field(default_factory=Spent)


def seal(directory: Path, *, step: int, fingerprint: str, spent: Spent) -> Checkpoint:
    """Declare a filled directory whole."""
    files = {str(path.relative_to(directory)): _settle(path) for path in _files(directory)}
    for each in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync_directory(each)
    manifest = {"step": step, "fingerprint": fingerprint, "spent": asdict(spent), "files": files}
    write_json(directory / MANIFEST, manifest)
    sync_directory(directory)
    return Checkpoint(directory, step, fingerprint, spent)


def newest_whole(directory: Path, fingerprint: str) -> Checkpoint | None:
    """The furthest state of this very training that was written to its end; None where it starts from the beginning."""
    ours = (one for one in map(read, _directories(directory)) if one and one.fingerprint == fingerprint)
    return max(ours, key=lambda one: one.step, default=None)


def read(directory: Path) -> Checkpoint | None:
    """A sealed state, or None if it is not whole."""
    try:
        manifest: Mapping[str, Any] = json.loads((directory / MANIFEST).read_text())
        files, spent = manifest["files"], manifest["spent"]
        is_whole = all(_digest(directory / name) == digest for name, digest in files.items())
        seen = Spent(spent["seconds"], spent["tokens"], tuple(spent["first"]), tuple(spent["last"]))
        found = Checkpoint(directory, manifest["step"], manifest["fingerprint"], seen)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_whole else None


def prune(directory: Path, *, keep: int = KEPT) -> None:
    """Delete all but the newest sealed states; those that are not sealed go as well, so call it when one just was."""
    sealed = [path for path in _directories(directory) if (path / MANIFEST).exists()]
    kept = sorted(sealed, key=_step)[-keep:] if keep else []
    for path in _directories(directory):
        if path not in kept:
            _delete(path)


def discard(directory: Path, *, but: Checkpoint | None = None) -> None:
    """Delete every state but one: what else is here is broken, or was left by another training."""
    for path in _directories(directory):
        if but is None or path != but.path:
            _delete(path)


def _delete(path: Path) -> None:
    """The manifest first: half a deletion must not leave what looks whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def _directories(directory: Path) -> list[Path]:
    return [path for path in directory.glob(f"{PREFIX}*") if path.is_dir()]


def _step(path: Path) -> int:
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() else -1


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _settle(path: Path) -> str:
    """Have a file on the disk, and say what is in it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hashed.update(chunk)
    return hashed.hexdigest()
