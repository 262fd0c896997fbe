"""Directories of weights that no engine loads by name: complete or absent, named by their content, never changed.

Weights are safetensors, which are numbers and nothing that runs. Whatever else lies in such a directory, or is not what
the manifest says, makes the whole of it refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pawl.durability import sync_directory
from pawl.errors import BadAdapter
from retrain.adapters import MANIFEST, sha256_of
from retrain.steps import write_json

UNFINISHED = ".sealing-"
"""How the name of a directory begins that is being filled."""
ABANDONED_S = 3600.0
"""Nobody fills a directory so long without adding a file to it."""
PLAIN_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt")
"""Files that are only read, never run. Vocabularies and merges of tokenizers are among them."""


def seal_files(source: Path, parent: Path, kind: str, fields: Mapping[str, Any]) -> Path:
    """Copy the files of `source` to a directory of `parent` that is named by them; again, they are found there.

    Args:
        kind: what it is; the first part of the name.
        fields: for the manifest, beside the name and the hashes.

    Raises:
        BadAdapter: a file is of a kind that could run, or another directory has the name.
    """
    hashes = _hashes(source)
    digest = hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
    name = f"{kind}-{digest[:12]}"
    final = parent.absolute() / name
    if final.exists():
        return _same(final, hashes)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=final.parent, prefix=UNFINISHED))
    for file in hashes:
        shutil.copyfile(source / file, work / file)
        _sync(work / file)
    write_json(work / MANIFEST, {**fields, "kind": kind, "name": name, "files": hashes})
    for path in work.iterdir():
        path.chmod(0o444)
    sync_directory(work)
    work.chmod(0o755)
    work.rename(final)
    sync_directory(final.parent)
    return final


def sweep(parent: Path, now: float) -> None:
    """Remove what processes that were killed left half sealed."""
    for path in parent.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # Its process puts it in place at this moment.
            if path.lstat().st_mtime < now - ABANDONED_S:
                shutil.rmtree(path)


def verify_files(path: Path, kind: str) -> Mapping[str, Any]:
    """The manifest of a sealed directory whose every file was read and is what it was.

    Raises:
        BadAdapter: it is incomplete or of another kind, a file was changed, or there is one more.
    """
    manifest = _manifest(path)
    if manifest.get("kind") != kind or not isinstance(manifest.get("files"), dict):
        raise BadAdapter(f"{path} is not a sealed {kind}")
    hashes = _hashes(path)
    if hashes != manifest["files"]:
        odd = sorted({name for name, _ in set(hashes.items()) ^ set(manifest["files"].items())})
        raise BadAdapter(f"{path} is not what was sealed: {', '.join(odd)}")
    return manifest


def _hashes(directory: Path) -> dict[str, str]:
    if not directory.is_dir():
        raise BadAdapter(f"{directory} is not a directory")
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
    if odd := [name for name in names if not _is_plain(directory / name)]:
        raise BadAdapter(f"{directory} holds what is neither weights nor their description: {', '.join(odd)}")
    return {name: sha256_of(directory / name) for name in names}


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.suffix in PLAIN_SUFFIXES


def _same(final: Path, hashes: Mapping[str, str]) -> Path:
    if _hashes(final) != hashes:
        raise BadAdapter(f"another directory has the name {final.name}")
    return final


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MANIFEST).read_text())
    except OSError as exc:
        raise BadAdapter(f"cannot read {path / MANIFEST}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadAdapter(f"{path / MANIFEST} is not JSON") from exc
    if not isinstance(found, dict):
        raise BadAdapter(f"{path / MANIFEST} does not hold a JSON object")
    return found


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
