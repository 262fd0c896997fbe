"""Sealed adapters: complete, immutable, and refused when they cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrain.adapters import (
    Adapter,
    Provenance,
    adapter_name,
    base_fingerprint,
    check_servable,
    seal,
    sha256_of,
    verify_adapter,
)
from retrain.errors import BadAdapter

CONFIG = {"peft_type": "LORA", "r": 8, "bias": "none", "target_modules": ["q_proj"], "init_lora_weights": True}
PROVENANCE = Provenance("org/base", "ab" * 32, "org/base", "r0042", "cd" * 32, {"trl": "1.16.0"})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    directory = tmp_path / "trained"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG))
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


def sealed(trained: Path, adapters: Path) -> Adapter:
    return seal(trained, adapters, base_served="org/base", run_number=42, max_rank=32, provenance=PROVENANCE)


def test_an_adapter_is_named_by_its_content(trained: Path, tmp_path: Path) -> None:
    adapter = sealed(trained, tmp_path / "adapters")
    assert adapter.name == adapter_name("org/base", 42, sha256_of(trained / "adapter_model.safetensors"))
    assert adapter.path == tmp_path / "adapters" / "abababab" / adapter.name
    assert sorted(p.name for p in adapter.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    manifest = json.loads((adapter.path / "manifest.json").read_text())
    assert manifest["parent"] == "org/base"
    assert manifest["run"] == "r0042"
    assert manifest["dataset_sha"] == "cd" * 32
    assert [p.name for p in adapter.path.parent.iterdir()] == [adapter.name]


def test_sealing_again_changes_nothing(trained: Path, tmp_path: Path) -> None:
    first = sealed(trained, tmp_path / "adapters")
    before = (first.path / "manifest.json").stat().st_mtime_ns
    assert sealed(trained, tmp_path / "adapters") == first
    assert (first.path / "manifest.json").stat().st_mtime_ns == before


def test_other_weights_get_another_name(trained: Path, tmp_path: Path) -> None:
    first = sealed(trained, tmp_path / "adapters")
    (trained / "adapter_model.safetensors").write_bytes(b"other weights")
    assert sealed(trained, tmp_path / "adapters").name != first.name


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_is_found_out(trained: Path, tmp_path: Path, name: str) -> None:
    adapter = sealed(trained, tmp_path / "adapters")
    (adapter.path / name).chmod(0o644)
    (adapter.path / name).write_bytes(b"{}")
    with pytest.raises(BadAdapter, match="not the file that was sealed"):
        verify_adapter(adapter.path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
def test_a_missing_file_is_found_out(trained: Path, tmp_path: Path, name: str) -> None:
    adapter = sealed(trained, tmp_path / "adapters")
    (adapter.path / name).unlink()
    with pytest.raises(BadAdapter, match="cannot read"):
        verify_adapter(adapter.path)


def test_an_adapter_under_another_name_is_found_out(trained: Path, tmp_path: Path) -> None:
    adapter = sealed(trained, tmp_path / "adapters")
    moved = adapter.path.rename(adapter.path.with_name("tiny--r0001-00000000"))
    with pytest.raises(BadAdapter, match="its manifest belongs to"):
        verify_adapter(moved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trained biases"),
        ({"r": 64}, "rank 64 is over"),
        ({"rank_pattern": {"q_proj": 128}}, "rank 128 is over"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"peft_type": "IA3"}, "not a LoRA"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused(change: dict[str, Any], reason: str) -> None:
    check_servable(CONFIG, 32)
    with pytest.raises(BadAdapter, match=reason):
        check_servable({**CONFIG, **change}, 32)


def test_nothing_is_left_of_a_refused_adapter(trained: Path, tmp_path: Path) -> None:
    (trained / "adapter_config.json").write_text(json.dumps({**CONFIG, "use_dora": True}))
    with pytest.raises(BadAdapter):
        sealed(trained, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_base_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = base_fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("irrelevant")
    assert base_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert base_fingerprint(str(tmp_path)) != before != base_fingerprint("org/base")
