"""What may not lie in an adapter's directory, and what its files may not say: each refused for its own reason."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl.adapter_files import check_contents, verify_adapter
from pawl.errors import BadAdapter
from pawl.tensor_file import MAX_HEADER_BYTES
from tests.retrain.sealed_samples import CONFIG, LAYER, LAYERS, factors, safetensors, sealed_adapter, write_adapter

WEIGHTS = "adapter_model.safetensors"
INNER = f"base_model.model.{LAYER}.lora_A.weight"
OUTER = f"base_model.model.{LAYER}.lora_B.weight"
SENTINEL = "touched"


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return sealed_adapter(tmp_path / "adapters").path


def spoiled(directory: Path, weights: bytes | None = None, **config: Any) -> Path:
    """An exported adapter with other weights, or with another configuration."""
    write_adapter(directory)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if weights is not None:
        (directory / WEIGHTS).write_bytes(weights)
    return directory


def refused(directory: Path, reason: str) -> None:
    with pytest.raises(BadAdapter, match=reason):
        check_contents(directory, 32, LAYERS)


def test_a_sealed_adapter_is_fine(adapter: Path) -> None:
    found = verify_adapter(adapter, 32, layers=LAYERS)
    assert verify_adapter(adapter, sha256=found.sha256) == found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_model.bin", "is a pickle, which runs code"),
        ("adapter_model.pt", "is a pickle, which runs code"),
        ("optimizer.PKL", "is a pickle, which runs code"),
        ("chat_template.jinja", "tokenizer or chat template"),
        ("tokenizer_config.json", "tokenizer or chat template"),
        ("special_tokens_map.json", "tokenizer or chat template"),
        ("modeling_llama.py", "is code"),
        ("ref", "does not belong"),
        ("README.md", "does not belong"),
        (".hidden", "does not belong"),
    ],
)
def test_nothing_else_may_lie_there(adapter: Path, tmp_path: Path, name: str, reason: str) -> None:
    (adapter / name).write_bytes(pickle.dumps(Bomb(tmp_path / SENTINEL)))
    with pytest.raises(BadAdapter, match=reason):
        verify_adapter(adapter)
    assert not (tmp_path / SENTINEL).exists()


def test_a_pickle_under_the_name_of_safetensors_is_told_for_what_it_is(tmp_path: Path) -> None:
    refused(spoiled(tmp_path / "a", pickle.dumps(Bomb(tmp_path / SENTINEL))), "are a pickle under the name")
    refused(spoiled(tmp_path / "b", b"PK\x03\x04" + bytes(100)), "are a zip archive")
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "manifest.json"])
def test_no_file_may_be_a_link(adapter: Path, tmp_path: Path, name: str) -> None:
    same = tmp_path / "same"
    (adapter / name).rename(same)
    (adapter / name).symlink_to(same)
    with pytest.raises(BadAdapter, match=f"{name} is a symbolic link"):
        verify_adapter(adapter)
    (adapter / name).unlink()
    (adapter / name).hardlink_to(same)
    with pytest.raises(BadAdapter, match=f"{name} is a hard link"):
        verify_adapter(adapter)


def test_the_directory_itself_may_not_be_a_link(adapter: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / adapter.name
    elsewhere.symlink_to(adapter)
    with pytest.raises(BadAdapter, match="is a symbolic link, not an adapter's directory"):
        verify_adapter(elsewhere)


def test_a_pipe_is_not_waited_for(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    with pytest.raises(BadAdapter, match="not a plain file"):
        verify_adapter(adapter)


def rewrite_manifest(adapter: Path, **changes: Any) -> None:
    path = adapter / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_that_lies_is_found_out(adapter: Path) -> None:
    files = verify_adapter(adapter).manifest["files"]
    rewrite_manifest(adapter, files={**files, WEIGHTS: "0" * 64})
    with pytest.raises(BadAdapter, match="not the file that was sealed"):
        verify_adapter(adapter)
    rewrite_manifest(adapter, files={**files, "../../secrets": "0" * 64})
    with pytest.raises(BadAdapter, match="lists other files"):
        verify_adapter(adapter)
    rewrite_manifest(adapter, files=files, base="org/other")
    with pytest.raises(BadAdapter, match="name different base models"):
        verify_adapter(adapter)


def test_weights_that_were_replaced_together_with_their_manifest_are_found_out(adapter: Path, tmp_path: Path) -> None:
    registered = verify_adapter(adapter).sha256
    other = sealed_adapter(tmp_path / "others", seed=2.0)
    files = verify_adapter(other.path).manifest["files"]
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).write_bytes((other.path / WEIGHTS).read_bytes())
    rewrite_manifest(adapter, files=files)
    assert verify_adapter(adapter).sha256 != registered
    with pytest.raises(BadAdapter, match="not the weights that were registered"):
        verify_adapter(adapter, sha256=registered)


@pytest.mark.parametrize("text", ["[]", "{", "\x00", "[" * 100_000, '{"a": ' + '"x"' * 2_000_000 + "}"])
def test_a_configuration_that_is_none_is_refused(adapter: Path, text: str) -> None:
    (adapter / "manifest.json").unlink()
    (adapter / "manifest.json").write_text(text)
    with pytest.raises(BadAdapter, match=r"manifest.json (is not JSON|does not hold|is larger)"):
        verify_adapter(adapter)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 64}, "rank 64 is over"),
        ({"r": 0}, "0 is no rank"),
        ({"r": "8"}, "'8' is no rank"),
        ({"r": 4}, "factors of ranks 8 and 8; the configuration says 4"),
        ({"rank_pattern": {"q_proj": 4}}, "the configuration says 4"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not an object"),
        ({"target_modules": ["q_proj", "k_proj"]}, "no weights for the target module k_proj"),
        ({"target_modules": ["k_proj"]}, "no weights for the target module k_proj"),
        ({"target_modules": ".*q_proj"}, "not a list of layer names"),
        ({"target_modules": []}, "not a list of layer names"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    refused(spoiled(tmp_path, **config), reason)


def other_shape(shape: tuple[int, int]) -> bytes:
    return safetensors({**factors(), OUTER: np.ones(shape, "<f4")})


def renamed(name: str) -> bytes:
    found = factors()
    return safetensors({INNER: found[INNER], name: found[OUTER]})


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (other_shape((20, 8)), "20 x 12; the base has 16 x 12"),
        (other_shape((16, 64)), "ranks 8 and 64"),
        (safetensors({**factors(), OUTER: np.ones((16, 8, 1), "<f4")}), "they are matrices"),
        (safetensors(factors(layer="model.layers.9.self_attn.q_proj")), "the base model has no layer model.layers.9"),
        (safetensors(factors() | factors(layer="lm_head")), "lm_head has weights but is not among"),
        (safetensors({INNER: factors()[INNER]}), "only one of its two factors"),
        (renamed("base_model.model.lm_head.weight"), "is no factor of a LoRA layer"),
        (renamed(f"base_model.model.{LAYER}.lora_magnitude_vector"), "is no factor of a LoRA layer"),
        (renamed(f"{LAYER}.lora_B.weight"), "is no factor of a LoRA layer"),
        (safetensors({**factors(), OUTER: np.full((16, 8), np.nan, "<f4")}), "infinite or not a number"),
        (safetensors({**factors(), INNER: np.full((8, 12), -np.inf, "<f4")}), "infinite or not a number"),
        (safetensors(factors()) + b"more", "the file has"),
        (safetensors(factors())[:-1], "should end at byte"),
        (safetensors(factors())[:20], "end before their header"),
        (b"", "end before their header"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(100), "header is 33554433 bytes long"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"{x", "not JSON"),
        ((14).to_bytes(8, "little") + b'{"a":1,"a":2} ', "names something twice"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "does not describe 'a'"),
        (safetensors(factors(), **{INNER: {"dtype": "I64"}}), "of type I64"),
        (safetensors(factors(), **{INNER: {"shape": [8, 13]}}), "is not its shape"),
        (safetensors(factors(), **{INNER: {"shape": [-8, -12]}}), "has the shape"),
        (safetensors(factors(), **{INNER: {"shape": [True, 96]}}), "has the shape"),
        (safetensors(factors(), **{OUTER: {"data_offsets": [0, 512]}}), "overlaps another tensor"),
        (safetensors(factors(), **{INNER: {"data_offsets": [-384, 0]}}), "overlaps another tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: bytes, reason: str) -> None:
    refused(spoiled(tmp_path, weights), reason)


@pytest.mark.parametrize(
    ("dtype", "bits", "is_finite"),
    [
        ("BF16", 0x7F80, False), ("BF16", 0xFFC1, False), ("BF16", 0x7F7F, True), ("BF16", 0x0001, True),
        ("F16", 0x7C00, False), ("F16", 0xFE01, False), ("F16", 0x7BFF, True),
    ],
)  # fmt: skip
def test_half_precision_is_looked_through_too(tmp_path: Path, dtype: str, bits: int, is_finite: bool) -> None:
    inner, outer = np.zeros((8, 12), "<u2"), np.zeros((16, 8), "<u2")
    outer[3, 5] = bits
    weights = safetensors({INNER: inner, OUTER: outer}, **{INNER: {"dtype": dtype}, OUTER: {"dtype": dtype}})
    directory = spoiled(tmp_path, weights)
    if is_finite:
        check_contents(directory, 32, LAYERS)
    else:
        refused(directory, "lora_B.weight has values that are infinite")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 700), st.binary(min_size=1, max_size=40))
def test_bytes_that_were_overwritten_are_refused_or_are_still_an_adapter(
    tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes
) -> None:
    """Whatever a file holds, the only error is the one that callers expect."""
    whole = safetensors(factors())
    directory = tmp_path_factory.mktemp("junk")
    try:
        check_contents(spoiled(directory, whole[:place] + junk + whole[place + len(junk) :]), 32, LAYERS)
    except BadAdapter:
        assert place < len(whole)
