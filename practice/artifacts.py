"""Directories that are built once: complete when their manifest exists, named after what went into them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

Manifest = Mapping[str, str | int | float]

MANIFEST_NAME = "manifest.json"


def content_key(*ingredients: object) -> str:
    """Return a short name for everything that decides what a build gives; the ingredients must have a stable `repr`."""
    return hashlib.sha256(repr(ingredients).encode()).hexdigest()[:12]


def build_once(directory: Path, build: Callable[[Path], Manifest]) -> Manifest:
    """Return the manifest of `directory`, building it first if it is not there.

    `build` fills an empty directory next to the final one and returns the manifest. That is written last and the
    directory then renamed, so a killed build leaves nothing that looks complete.
    """
    manifest_file = directory / MANIFEST_NAME
    if not manifest_file.exists():
        _build(directory, build)
    manifest: dict[str, str | int | float] = json.loads(manifest_file.read_text())
    return manifest


def _build(directory: Path, build: Callable[[Path], Manifest]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        manifest = dict(build(work))
        (work / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        # mkdtemp makes the directory private; an engine may run as another user.
        work.chmod(0o755)
        _move_into_place(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_into_place(work: Path, directory: Path) -> None:
    try:
        os.rename(work, directory)
    except OSError:
        # Somebody else built the same thing meanwhile; theirs is as good as ours.
        if not (directory / MANIFEST_NAME).exists():
            raise
