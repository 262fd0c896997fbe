"""Sealed adapters: complete, immutable, and refused when they cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pawl.adapter_files import check_servable, verify_adapter
from pawl.errors import BadAdapter
from pawl.fingerprints import fingerprint_of
from retrain.adapters import Adapter, adapter_name, base_fingerprint, delete_files, seal, sha256_of
from retrain.base_layers import linear_layers
from tests.retrain.sealed_samples import (
    BASE,
    CONFIG,
    LAYERS,
    factors,
    fingerprint,
    provenance,
    safetensors,
    sealed_adapter,
    write_adapter,
)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "trained")


def sealed(trained: Path, adapters: Path, **more: Any) -> Adapter:
    given = {"base_served": BASE, "run_number": 42, "max_rank": 32, "provenance": provenance(), **more}
    return seal(trained, adapters, **given)


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
    (trained / "adapter_model.safetensors").write_bytes(safetensors(factors(2.0)))
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


def test_what_lies_beside_a_trained_adapter_stays_there(trained: Path, tmp_path: Path) -> None:
    (trained / "optimizer.pt").write_bytes(b"\x80")
    (trained / "chat_template.jinja").write_text("{{ 1 }}")
    assert len(list(sealed(trained, tmp_path / "adapters").path.iterdir())) == 3


def test_an_adapter_must_fit_the_base_it_was_trained_on(trained: Path, tmp_path: Path) -> None:
    assert sealed(trained, tmp_path / "adapters", layers=LAYERS).path.is_dir()
    with pytest.raises(BadAdapter, match="16 x 12; the base has 64 x 12"):
        sealed(trained, tmp_path / "others", layers=dict.fromkeys(LAYERS, (64, 12)))
    with pytest.raises(BadAdapter, match="names the base 'org/base', the engines serve 'org/other'"):
        sealed(trained, tmp_path / "others", provenance=provenance("org/other"))
    assert not (tmp_path / "others").exists()


def test_layer_sizes_come_from_the_configuration(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    layers = linear_layers(str(tmp_path))
    assert layers["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert layers["model.layers.0.mlp.down_proj"] == (64, 128)


def test_the_fingerprint_goes_into_the_manifest(trained: Path, tmp_path: Path) -> None:
    assert fingerprint_of(sealed(trained, tmp_path / "plain").manifest) is None
    kept = fingerprint_of(sealed(trained, tmp_path / "adapters", fingerprint=fingerprint()).manifest)
    assert kept is not None
    assert kept.texts == fingerprint().texts
    assert kept.logps["adapter"] == pytest.approx(fingerprint().logps["adapter"], abs=1e-6)


def test_files_go_as_a_whole(tmp_path: Path) -> None:
    adapter = sealed_adapter(tmp_path / "adapters")
    delete_files(adapter.path)
    delete_files(adapter.path)
    assert list(adapter.path.parent.iterdir()) == []


def test_a_base_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = base_fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("irrelevant")
    assert base_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert base_fingerprint(str(tmp_path)) != before != base_fingerprint("org/base")
