"""Adapters on disk: named by their content, complete or absent, and never changed.

`<adapters>/<base sha8>/<name>/{adapter_config.json, adapter_model.safetensors, manifest.json}`. The engine keys its
prefix cache by an adapter's name and path; a name that came to mean other weights could be answered from stale blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pawl.adapter_files import ADAPTER_CONFIG as ADAPTER_CONFIG
from pawl.adapter_files import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from pawl.adapter_files import MANIFEST as MANIFEST
from pawl.adapter_files import SEALED, LayerSizes, check_contents, read_json
from pawl.adapter_files import Adapter as Adapter
from pawl.adapter_files import check_servable as check_servable
from pawl.adapter_files import verify_adapter as verify_adapter
from pawl.durability import sync_directory
from pawl.errors import BadAdapter
from pawl.fingerprints import Fingerprint


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from."""

    base: str
    """The base model as the engine calls it."""
    base_sha: str
    parent: str
    run: str
    dataset_sha: str
    libraries: Mapping[str, str]
    tokenizer_sha: str = ""
    incremental: Mapping[str, Any] = field(default_factory=dict)
    """`retrain.drift.RoundRecord`: what it started as, and how far it is from the base."""


def adapter_name(base_served: str, run_number: int, weights_sha: str) -> str:
    """The one name of these weights.

    >>> adapter_name("org/Llama 3", 42, "0123456789abcdef")
    'org-Llama-3--r0042-01234567'
    """
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", base_served).strip("-.") or "base"
    return f"{plain}--r{run_number:04d}-{weights_sha[:8]}"


def base_fingerprint(base: str) -> str:
    """sha256 of the base model's files; of the name alone when it is not a directory here."""
    directory = Path(base)
    if not directory.is_dir():
        return hashlib.sha256(base.encode()).hexdigest()
    names = sorted(p.name for p in directory.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    listing = [(name, sha256_of(directory / name)) for name in names]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def seal(
    source: Path,
    adapters_dir: Path,
    *,
    base_served: str,
    run_number: int,
    max_rank: int,
    provenance: Provenance,
    layers: LayerSizes | None = None,
    fingerprint: Fingerprint | None = None,
) -> Adapter:
    """Copy a trained adapter to its final place; sealing the same weights again finds them there.

    Only its two files are copied, whatever else lies beside them.

    Args:
        layers: the base's, which the adapter's must fit.
        fingerprint: what the trainer makes of fixed texts with it; engines are held to that.

    Raises:
        BadAdapter: it cannot be served, or another adapter has its place.
    """
    check_contents(source, max_rank, layers)
    if (base := read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path")) != provenance.base:
        raise BadAdapter(f"the adapter's configuration names the base {base!r}, the engines serve {provenance.base!r}")
    sha = sha256_of(source / ADAPTER_WEIGHTS)
    name = adapter_name(base_served, run_number, sha)
    parent = adapters_dir.absolute() / provenance.base_sha[:8]
    if (parent / name).exists():
        return _same(verify_adapter(parent / name, max_rank, layers=layers), sha)
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=parent, prefix=".sealing-"))
    _fill(work, source, name, provenance, fingerprint)
    work.chmod(0o755)
    work.rename(parent / name)
    sync_directory(parent)
    return verify_adapter(parent / name, max_rank, sha256=sha, layers=layers)


def delete_files(path: Path) -> None:
    """Remove a sealed adapter that no engine has any more: its name first, so that it is never there in part."""
    if not path.is_dir() or path.is_symlink():
        return
    grave = path.with_name(f".deleting-{path.name}")
    path.rename(grave)
    sync_directory(path.parent)
    shutil.rmtree(grave)


def sweep(adapters_dir: Path, before: float) -> None:
    """Remove what killed processes left half sealed or half deleted before a moment."""
    for pattern in (".sealing-*", ".deleting-*"):
        for path in adapters_dir.glob(f"*/{pattern}"):
            if path.lstat().st_mtime < before:
                shutil.rmtree(path, ignore_errors=True)


def rewrite_base(directory: Path, base: str) -> None:
    """Make an adapter's configuration name its base the way the engine does."""
    config = read_json(directory / ADAPTER_CONFIG) | {"base_model_name_or_path": base, "inference_mode": True}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits.

    Raises:
        BadAdapter: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise BadAdapter(f"cannot read {path}: {exc.strerror}") from exc


def _fill(work: Path, source: Path, name: str, provenance: Provenance, fingerprint: Fingerprint | None) -> None:
    for file in SEALED:
        shutil.copyfile(source / file, work / file, follow_symlinks=False)
        _sync(work / file)
    manifest = {"name": name, "files": {file: sha256_of(work / file) for file in SEALED}, **vars(provenance)}
    if fingerprint is not None:
        manifest["fingerprint"] = fingerprint.to_json()
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    _sync(work / MANIFEST)
    for path in work.iterdir():
        path.chmod(0o444)
    sync_directory(work)


def _same(found: Adapter, sha: str) -> Adapter:
    if found.sha256 != sha:
        raise BadAdapter(f"another adapter already has the name {found.name}")
    return found


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
