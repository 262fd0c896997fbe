"""Steps that are done once: each leaves a directory whose manifest, written last, says that it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrain.errors import BadData

MANIFEST = "manifest.json"
Manifest = Mapping[str, Any]


def done(directory: Path) -> Manifest | None:
    """What a finished step left, or None."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: Manifest = json.loads(path.read_text())
    except ValueError as exc:
        raise BadData(f"{path} is damaged; delete its directory to repeat the step") from exc
    return manifest


def once(directory: Path, work: Callable[[Path], Manifest]) -> Manifest:
    """Do a step unless it was done; a half-done one starts over in an empty directory."""
    if (manifest := done(directory)) is not None:
        return manifest
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / MANIFEST, work(directory))
    return json.loads((directory / MANIFEST).read_text())  # type: ignore[no-any-return]


def write_json(path: Path, value: object) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
