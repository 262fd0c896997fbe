"""Small adapters that are as they should be, for tests that spoil them or have engines serve them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pawl.adapter_files import SEALED, Adapter
from pawl.fingerprints import Fingerprint, places_of
from retrain.adapters import Provenance, seal, sha256_of

BASE = "org/base"
RANK = 8
LAYER = "model.layers.0.self_attn.q_proj"
LAYERS = {LAYER: (16, 12)}
CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": BASE,
    "r": RANK,
    "lora_alpha": RANK,
    "bias": "none",
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}
TEXTS = (tuple(range(1, 17)), tuple(range(21, 31)))
N_PLACES = len(places_of(TEXTS))


def provenance(base: str = BASE) -> Provenance:
    return Provenance(base, "ab" * 32, base, "r0042", "cd" * 32, {"trl": "1.16.0"})


def factors(seed: float = 1.0, *, layer: str = LAYER, rank: int = RANK) -> dict[str, np.ndarray[Any, Any]]:
    """The two matrices of one layer."""
    inner, outer = np.full((rank, 12), seed, "<f4"), np.full((16, rank), seed / 2, "<f4")
    return {f"base_model.model.{layer}.lora_A.weight": inner, f"base_model.model.{layer}.lora_B.weight": outer}


def safetensors(tensors: Mapping[str, np.ndarray[Any, Any]], **changes: Mapping[str, Any]) -> bytes:
    """A file's bytes; `changes` are laid over the header's entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        start, data = len(data), data + values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, len(data)]}
    text = json.dumps({name: {**entry, **changes.get(name, {})} for name, entry in header.items()}).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_adapter(directory: Path, *, seed: float = 1.0, base: str = BASE) -> Path:
    """As a trainer exports it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": base}))
    (directory / "adapter_model.safetensors").write_bytes(safetensors(factors(seed)))
    return directory


def fingerprint(seed: float = 1.0, *, tolerance: float = 0.2) -> Fingerprint:
    """The adapter is some tenths of a nat from its base, in a direction of its own; its parent lies between them."""
    base = tuple(-1.0 - place / 10 for place in range(N_PLACES))
    shift = [0.4 * math.sin(seed * (place + 1)) for place in range(N_PLACES)]
    moved = {name: tuple(b + part * s for b, s in zip(base, shift, strict=True)) for name, part in (("adapter", 1.0),
             ("base", 0.0), ("parent", 0.5))}  # fmt: skip
    return Fingerprint(TEXTS, moved, tolerance)


def place_adapter(directory: Path, name: str, *, base: str = "base-model", seed: float = 1.0) -> Path:
    """A sealed adapter of any name."""
    path = write_adapter(directory / name, seed=seed, base=base)
    files = {file: sha256_of(path / file) for file in SEALED}
    manifest = {"name": name, "files": files, **vars(provenance(base)), "fingerprint": fingerprint(seed).to_json()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def sealed_adapter(adapters: Path, *, seed: float = 1.0, base: str = "tiny", number: int = 42) -> Adapter:
    """In its place, with a fingerprint."""
    source = write_adapter(adapters.parent / f"exported-{seed}", seed=seed, base=base)
    return seal(
        source,
        adapters,
        base_served=base,
        run_number=number,
        max_rank=32,
        provenance=provenance(base),
        layers=LAYERS,
        fingerprint=fingerprint(seed),
    )
