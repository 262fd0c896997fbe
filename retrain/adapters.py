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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pawl.durability import sync_directory
from retrain.errors import BadAdapter

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
UNSERVABLE = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "alora_invocation_tokens",
    "trainable_token_indices",
)
"""Options of PEFT that vLLM's LoRA loader refuses, or would silently leave out."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""Ways to start the weights that leave the base as it is; PiSSA, OLoRA and the like do not."""


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


@dataclass(frozen=True)
class Adapter:
    """A sealed adapter."""

    name: str
    path: Path
    """Absolute: the engine takes anything else for a name on a model hub."""
    sha256: str
    """Of the weights."""
    manifest: Mapping[str, Any]


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
    source: Path, adapters_dir: Path, *, base_served: str, run_number: int, max_rank: int, provenance: Provenance
) -> Adapter:
    """Copy a trained adapter to its final place; sealing the same weights again finds them there.

    Raises:
        BadAdapter: it cannot be served, or another adapter has its place.
    """
    check_servable(_config(source), max_rank)
    sha = sha256_of(source / ADAPTER_WEIGHTS)
    name = adapter_name(base_served, run_number, sha)
    parent = adapters_dir.absolute() / provenance.base_sha[:8]
    if (parent / name).exists():
        return _same(verify_adapter(parent / name), sha)
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=parent, prefix=".sealing-"))
    _fill(work, source, name, provenance)
    work.chmod(0o755)
    work.rename(parent / name)
    sync_directory(parent)
    return verify_adapter(parent / name)


def verify_adapter(path: Path, max_rank: int | None = None) -> Adapter:
    """Recompute an adapter's hashes before anything is done with it.

    Raises:
        BadAdapter: it is incomplete, changed since it was sealed, under another name, or cannot be served.
    """
    manifest = _read_json(path / MANIFEST)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if manifest.get("files", {}).get(name) != sha256_of(path / name):
            raise BadAdapter(f"adapter {path.name}: {name} is not the file that was sealed")
    if manifest.get("name") != path.name:
        raise BadAdapter(f"adapter {path.name}: its manifest belongs to {manifest.get('name')}")
    check_servable(_config(path), max_rank)
    return Adapter(path.name, path.absolute(), manifest["files"][ADAPTER_WEIGHTS], manifest)


def check_servable(config: Mapping[str, Any], max_rank: int | None) -> None:
    """Refuse what the engine would refuse, or serve wrongly.

    Raises:
        BadAdapter: the reason.
    """
    if config.get("peft_type") != "LORA":
        raise BadAdapter(f"not a LoRA adapter: peft_type is {config.get('peft_type')!r}")
    if used := [option for option in UNSERVABLE if config.get(option)]:
        raise BadAdapter(f"the engine cannot serve adapters with {', '.join(used)}")
    if config.get("bias", "none") != "none":
        raise BadAdapter("the engine cannot serve adapters with trained biases")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise BadAdapter(f"init_lora_weights={config['init_lora_weights']!r} changes the base; it cannot be served")
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    if max_rank is not None and not 0 < rank <= max_rank:
        raise BadAdapter(f"rank {rank} is over the engine's max_lora_rank of {max_rank}")


def rewrite_base(directory: Path, base: str) -> None:
    """Make an adapter's configuration name its base the way the engine does."""
    config = _config(directory) | {"base_model_name_or_path": base, "inference_mode": True}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits.

    Raises:
        BadAdapter: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as exc:
        raise BadAdapter(f"cannot read {path}: {exc.strerror}") from exc
    return digest.hexdigest()


def _fill(work: Path, source: Path, name: str, provenance: Provenance) -> None:
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source / file, work / file)
        _sync(work / file)
    manifest = {
        "name": name,
        "files": {file: sha256_of(work / file) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
        **vars(provenance),
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    _sync(work / MANIFEST)
    for path in work.iterdir():
        path.chmod(0o444)
    sync_directory(work)


def _same(found: Adapter, sha: str) -> Adapter:
    if found.sha256 != sha:
        raise BadAdapter(f"another adapter already has the name {found.name}")
    return found


def _config(directory: Path) -> dict[str, Any]:
    return _read_json(directory / ADAPTER_CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as exc:
        raise BadAdapter(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadAdapter(f"{path} is not JSON") from exc
    if not isinstance(content, dict):
        raise BadAdapter(f"{path} does not hold a JSON object")
    return content


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
