"""An adapter's directory, looked through before anything loads it: three plain files that are what they were sealed as.

vLLM falls back to unpickling `adapter_model.bin` where there is no safetensors file, and other programs render a chat
template that lies beside an adapter. So nothing else may lie there, and nothing may lead elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from pawl.errors import BadAdapter
from pawl.tensor_file import Tensor, check_finite, read_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MANIFEST = "manifest.json"
SEALED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
MAX_JSON_BYTES = 4 * 1024**2
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
CODE = {".py", ".pyc", ".so", ".sh"}
TEMPLATES = re.compile(r"chat_template|.*\.jinja2?$|tokeniz|special_tokens|added_tokens|vocab|merges", re.IGNORECASE)
CHANGES_MORE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
    "megatron_config",
    "monteclora_config",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "auto_mapping",
)
"""Options of PEFT that vLLM's LoRA loader refuses or would silently leave out, or that name code to import."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""Ways to start the weights that leave the base as it is; PiSSA, OLoRA and the like do not."""
WEIGHT_NAME = re.compile(r"base_model\.model\.(?P<layer>[\w.]+)\.lora_(?P<side>[AB])\.weight")

LayerSizes = Mapping[str, tuple[int, int]]
"""The base's linear layers by their full names: how many values go out, and how many come in."""


@dataclass(frozen=True)
class Adapter:
    """A sealed adapter."""

    name: str
    path: Path
    """Absolute: the engine takes anything else for a name on a model hub."""
    sha256: str
    """Of the weights."""
    manifest: Mapping[str, Any]


class Factor(NamedTuple):
    """One of the two small matrices of an adapted layer."""

    layer: str
    side: str
    """A, which comes first, or B."""
    shape: tuple[int, ...]


def verify_adapter(
    path: Path, max_rank: int | None = None, *, sha256: str | None = None, layers: LayerSizes | None = None
) -> Adapter:
    """Look through a sealed adapter before anything is done with it.

    Args:
        path: its directory.
        max_rank: the largest rank that the engines take.
        sha256: what its weights are registered as; a manifest that came with the files could be rewritten with them.
        layers: the base's, if they are known.

    Raises:
        BadAdapter: it is incomplete, changed since it was sealed, under another name, or cannot be served.
    """
    _check_directory(path, {*SEALED, MANIFEST})
    manifest = read_json(path / MANIFEST)
    found = _check_hashes(path, manifest)
    if sha256 is not None and found != sha256:
        raise BadAdapter(f"adapter {path.name}: these are not the weights that were registered")
    if manifest.get("name") != path.name:
        raise BadAdapter(f"adapter {path.name}: its manifest belongs to {manifest.get('name')}")
    config = read_json(path / ADAPTER_CONFIG)
    if config.get("base_model_name_or_path") != manifest.get("base"):
        raise BadAdapter(f"adapter {path.name}: its configuration and its manifest name different base models")
    check_contents(path, max_rank, layers)
    return Adapter(path.name, path.absolute(), found, manifest)


def check_contents(path: Path, max_rank: int | None, layers: LayerSizes | None = None) -> None:
    """Refuse a configuration and weights that the engine would refuse, serve wrongly, or should not see.

    Raises:
        BadAdapter: the reason.
    """
    config = read_json(path / ADAPTER_CONFIG)
    check_servable(config, max_rank)
    with plain_file(path / ADAPTER_WEIGHTS) as file:
        tensors = read_tensors(file, os.fstat(file.fileno()).st_size)
        check_factors([_factor(tensor) for tensor in tensors], config, max_rank, layers)
        check_finite(file, tensors)


def check_servable(config: Mapping[str, Any], max_rank: int | None) -> None:
    """Refuse a configuration that the engine would refuse, or serve wrongly.

    Raises:
        BadAdapter: the reason.
    """
    if config.get("peft_type") != "LORA":
        raise BadAdapter(f"not a LoRA adapter: peft_type is {config.get('peft_type')!r}")
    if used := [option for option in CHANGES_MORE if config.get(option)]:
        raise BadAdapter(f"the engine cannot serve adapters with {', '.join(used)}")
    if config.get("bias", "none") != "none":
        raise BadAdapter("the engine cannot serve adapters with trained biases")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise BadAdapter(f"init_lora_weights={config['init_lora_weights']!r} changes the base; it cannot be served")
    if not _is_names(config.get("target_modules")):
        raise BadAdapter("target_modules is not a list of layer names")
    if not isinstance(patterns := config.get("rank_pattern") or {}, dict):
        raise BadAdapter("rank_pattern is not an object of ranks by layer")
    for rank in (config.get("r"), *patterns.values()):
        if not isinstance(rank, int) or rank < 1:
            raise BadAdapter(f"{rank!r} is no rank")
        if max_rank is not None and rank > max_rank:
            raise BadAdapter(f"rank {rank} is over the engine's max_lora_rank of {max_rank}")


def check_factors(
    factors: Sequence[Factor], config: Mapping[str, Any], max_rank: int | None, layers: LayerSizes | None
) -> None:
    """Make sure that the weights are the two factors of every layer that the configuration names, and nothing else.

    Raises:
        BadAdapter: names the first layer that is wrong.
    """
    sides = {(factor.layer, factor.side): factor.shape for factor in factors}
    targets = set(config["target_modules"])
    if missing := targets - {_target(layer, targets) for layer, _ in sides}:
        raise BadAdapter(f"there are no weights for the target module {min(missing)}")
    for layer in sorted({factor.layer for factor in factors}):
        if _target(layer, targets) is None:
            raise BadAdapter(f"{layer} has weights but is not among the target modules")
        inner, outer = sides.get((layer, "A")), sides.get((layer, "B"))
        if inner is None or outer is None:
            raise BadAdapter(f"{layer} has only one of its two factors")
        _check_layer(layer, inner, outer, _rank_of(layer, config), max_rank)
        if layers is not None:
            _check_fits(layer, (outer[0], inner[1]), layers)


def read_json(path: Path) -> dict[str, Any]:
    """A small file with a JSON object.

    Raises:
        BadAdapter: it cannot be read, is too large, or holds something else.
    """
    with plain_file(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise BadAdapter(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadAdapter(f"{path} is not JSON") from exc
    if not isinstance(content, dict):
        raise BadAdapter(f"{path} does not hold a JSON object")
    return content


@contextmanager
def plain_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file that is where it seems to be.

    Raises:
        BadAdapter: it is a link, something else than a file, or cannot be read.
    """
    try:
        # Non-blocking, or a named pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadAdapter(f"{path} is not a plain file")
            yield file
    except OSError as exc:
        reason = "it is a symbolic link" if path.is_symlink() else exc.strerror
        raise BadAdapter(f"cannot read {path}: {reason}") from exc


def _check_directory(path: Path, allowed: set[str]) -> None:
    if path.is_symlink():
        raise BadAdapter(f"{path} is a symbolic link, not an adapter's directory")
    try:
        entries = list(os.scandir(path))
    except OSError as exc:
        raise BadAdapter(f"cannot read {path}: {exc.strerror}") from exc
    for entry in sorted(entries, key=lambda entry: entry.name):
        _check_entry(path, entry, allowed)


def _check_entry(path: Path, entry: os.DirEntry[str], allowed: set[str]) -> None:
    where = f"adapter {path.name}: {entry.name}"
    if entry.is_symlink():
        raise BadAdapter(f"{where} is a symbolic link; what it leads to was not sealed")
    if entry.name not in allowed:
        raise BadAdapter(f"{where} {_why_not_here(entry.name)}")
    found = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise BadAdapter(f"{where} is not a plain file")
    if found.st_nlink != 1:
        raise BadAdapter(f"{where} is a hard link: it can be changed under another name")


def _why_not_here(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in PICKLED:
        return "is a pickle, which runs code when it is loaded; weights are safetensors only"
    if suffix in CODE:
        return "is code; an adapter has none"
    if TEMPLATES.match(name):
        return "would replace the base model's tokenizer or chat template"
    return "does not belong into an adapter"


def _check_hashes(path: Path, manifest: Mapping[str, Any]) -> str:
    """The weights' hash, once every file is the one that was sealed."""
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or set(hashes) != set(SEALED):
        raise BadAdapter(f"adapter {path.name}: its manifest lists other files than {' and '.join(SEALED)}")
    found = {name: _sha256(path / name) for name in SEALED}
    for name in SEALED:
        if hashes[name] != found[name]:
            raise BadAdapter(f"adapter {path.name}: {name} is not the file that was sealed")
    return found[ADAPTER_WEIGHTS]


def _sha256(path: Path) -> str:
    with plain_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _factor(tensor: Tensor) -> Factor:
    parts = WEIGHT_NAME.fullmatch(tensor.name)
    if parts is None:
        raise BadAdapter(f"{tensor.name} is no factor of a LoRA layer")
    return Factor(parts["layer"], parts["side"], tensor.shape)


def _check_layer(layer: str, inner: tuple[int, ...], outer: tuple[int, ...], rank: int, max_rank: int | None) -> None:
    if len(inner) != 2 or len(outer) != 2:
        raise BadAdapter(f"{layer} has factors of the shapes {inner} and {outer}; they are matrices")
    if max_rank is not None and inner[0] > max_rank:
        raise BadAdapter(f"{layer} has rank {inner[0]}, over the engine's max_lora_rank of {max_rank}")
    if inner[0] != rank or outer[1] != rank:
        raise BadAdapter(f"{layer} has factors of ranks {inner[0]} and {outer[1]}; the configuration says {rank}")


def _check_fits(layer: str, sizes: tuple[int, int], layers: LayerSizes) -> None:
    if layer not in layers:
        raise BadAdapter(f"the base model has no layer {layer}")
    if layers[layer] != sizes:
        raise BadAdapter(f"{layer} is {sizes[0]} x {sizes[1]}; the base has {layers[layer][0]} x {layers[layer][1]}")


def _rank_of(layer: str, config: Mapping[str, Any]) -> int:
    """PEFT's rule: the first pattern that the end of the layer's name matches, from a dot on."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if _ends_in(layer, pattern):
            return int(rank)
    return int(config["r"])


def _target(layer: str, targets: set[str]) -> str | None:
    return next((target for target in targets if _ends_in(layer, target)), None)


def _ends_in(layer: str, name: str) -> bool:
    """Names only: a pattern of an adapter's is never compiled, it could be made to take for ever.

    >>> _ends_in("model.layers.0.q_proj", "q_proj"), _ends_in("model.layers.0.q_proj", "proj")
    (True, False)
    """
    return layer == name or layer.endswith(f".{name}")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)
