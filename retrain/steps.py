"""Steps that are done once: each leaves a directory that is there whole or not at all.

A step works in `NAME.EPOCH.part`. When it is done, the sha256 of every file goes into the manifest, everything is
synced, and the directory is renamed to `NAME`: that is the moment from which the step counts as done. The epoch is that
of the lease under which the step is worked on. A process that slept through its lease goes on writing, if at all, in a
directory that nobody looks at: the next holder has renamed it, or started one of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pawl.durability import sync_directory
from pawl.errors import StaleWrite
from retrain.errors import BadData

MANIFEST = "manifest.json"
PART = ".part"
"""At the end of the name of a directory, or a file, that is being written."""
ROWS = ".jsonl"
"""Files from which erasure takes rows of people."""
OPAQUE = (".parquet", ".arrow")
"""Files that erasure deletes as a whole."""
PUT_BY_ANOTHER = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)
"""What the system says when the place is taken, or the directory is a later holder's now."""
CHUNK_BYTES = 1 << 20
ROW_DIGEST_BYTES = 8
Manifest = Mapping[str, Any]
Work = Callable[[Path], Manifest]


def nobody_was_erased() -> bool:
    """No file may have changed."""
    return False


def allow() -> None:
    """Nothing keeps a step from counting."""


@dataclass(frozen=True)
class Terms:
    """How a step is worked on."""

    epoch: int = 0
    """The lease under which it is."""
    keeps_part: bool = False
    """What a killed process had done is continued, not thrown away."""
    check_lease: Callable[[], None] = allow
    """Raises when another process has taken over; called right before the step counts as done."""
    may_be_erased: Callable[[], bool] = nobody_was_erased
    """Whether people have asked to be erased: rows of a finished step's files may be missing then, but none be new."""


def done(directory: Path) -> Manifest | None:
    """What a finished step left, or None."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: Manifest = json.loads(path.read_text())
    except ValueError as exc:
        raise BadData(f"{path} is damaged; {remedy(directory)}") from exc
    return manifest


def once(directory: Path, work: Work, terms: Terms | None = None) -> Manifest:
    """Do a step unless it was done.

    Raises:
        BadData: it was done, and its files are not what it left.
    """
    chosen = terms or Terms()
    if (manifest := done(directory)) is not None:
        check_whole(directory, manifest, chosen.may_be_erased)
    else:
        part = begin(directory, chosen.epoch, keeps_part=chosen.keeps_part)
        try:
            found = work(part)
            chosen.check_lease()
            finish(part, directory, found)
        except StaleWrite:
            shutil.rmtree(part, ignore_errors=True)  # Nobody would look at it again.
            raise
    for left in parts_of(directory, chosen.epoch):
        shutil.rmtree(left)
    return done(directory) or {}


def begin(directory: Path, epoch: int, *, keeps_part: bool) -> Path:
    """The directory to work in: new, or the one that a killed process left.

    What holders of later leases work in is left alone.
    """
    mine = directory.with_name(f"{directory.name}.{epoch}{PART}")
    parts = parts_of(directory, epoch)
    if keeps_part and parts and parts[-1] != mine:
        parts.pop().rename(mine)
    for left in parts:
        if not (keeps_part and left == mine):
            shutil.rmtree(left)
    mine.mkdir(parents=True, exist_ok=True)
    return mine


def finish(part: Path, directory: Path, found: Manifest) -> None:
    """Make a step count as done.

    Raises:
        StaleWrite: another process has done it meanwhile; what that left stays.
    """
    files = sorted(path for path in part.rglob("*") if path.is_file() and path != part / MANIFEST)
    for path in files:
        _sync(path)
    hashes = {path.relative_to(part).as_posix(): sha256_of(path) for path in files}
    rows = {path.relative_to(part).as_posix(): "".join(row_digests(path)) for path in files if path.suffix == ROWS}
    write_json(part / MANIFEST, {**found, "files": hashes, "rows": rows})
    for inner in [*(path for path in part.rglob("*") if path.is_dir()), part]:
        sync_directory(inner)
    _put_in_place(part, directory)
    sync_directory(directory.parent)


def _put_in_place(part: Path, directory: Path) -> None:
    """Give it its name, which only one process can: the system refuses to replace a directory that is not empty."""
    if directory.exists() and not (directory / MANIFEST).exists():
        shutil.rmtree(directory)  # As versions before this one left it half-done.
    try:
        part.rename(directory)
    except OSError as exc:
        if exc.errno not in PUT_BY_ANOTHER:
            raise  # A volume that is read-only, say: what was done is kept, to be put in place another time.
        raise StaleWrite(f"{directory} has been put there by another process meanwhile") from exc


def check_whole(directory: Path, manifest: Manifest, may_be_erased: Callable[[], bool] = nobody_was_erased) -> None:
    """Make sure that a finished step's files are those it left, but for what people had erased.

    Raises:
        BadData: a file is missing or another one; the text says which, and what to do.
    """
    for name, sha in manifest.get("files", {}).items():
        path = directory / name
        if path.is_file() and sha256_of(path) == sha:
            continue
        if not (may_be_erased() and is_what_erasure_leaves(path, manifest.get("rows", {}).get(name, ""))):
            raise BadData(f"{path} is not the file that the step left; {remedy(directory)}")


def is_what_erasure_leaves(path: Path, rows: str) -> bool:
    """Whether a file is gone as a whole, or has lost rows and got no other ones."""
    if not path.exists():
        return path.suffix in (ROWS, *OPAQUE)
    if path.suffix != ROWS:
        return False
    size = 2 * ROW_DIGEST_BYTES
    left = iter(rows[start : start + size] for start in range(0, len(rows), size))
    return all(digest in left for digest in row_digests(path))  # `in` moves on: the order must be the same.


def digest_of(manifest: Manifest) -> str:
    """What a manifest says, in one number, but for the mark that pairs were erased, which may come later."""
    told = {name: value for name, value in manifest.items() if name != "erased"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def remedy(directory: Path) -> str:
    """What a person does about a damaged step."""
    return f"delete {directory}, and the steps that came after it, to repeat them"


def row_digests(path: Path) -> Iterator[str]:
    """A short digest of each line."""
    with path.open("rb") as file:
        for line in file:
            yield hashlib.blake2b(line, digest_size=ROW_DIGEST_BYTES).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + PART)
    with part.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def parts_of(directory: Path, epoch: int) -> list[Path]:
    """Where processes have worked on this step up to this epoch, the newest last."""
    found = directory.parent.glob(f"{directory.name}.*{PART}")
    return sorted((path for path in found if _epoch(path) <= epoch), key=_epoch)


def _epoch(part: Path) -> int:
    digits = part.name.removesuffix(PART).rpartition(".")[2]
    return int(digits) if digits.isdecimal() else -1


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
