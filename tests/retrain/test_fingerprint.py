"""The trainer's own models on the fixed texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pawl.adapter_files import check_contents
from pawl.fingerprints import distance, places_of, why_not
from retrain.adapters import rewrite_base
from retrain.base_layers import linear_layers
from retrain.base_model import load_base, quiet_renames
from retrain.fingerprint import MAX_TOKENS, fixed_texts, take_fingerprint, token_logps


def export_random(base: Path, directory: Path, seed: int) -> Path:
    """An adapter as a trainer exports it, with random weights."""
    torch.manual_seed(seed)
    shape = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with quiet_renames():
        model = get_peft_model(load_base(str(base), "float32"), shape)
    model.save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)
    rewrite_base(directory, str(base))
    return directory


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("exported")
    return export_random(tiny_base, directory / "adapter", 1), export_random(tiny_base, directory / "parent", 2)


def test_what_the_trainer_exports_passes_every_check(tiny_base: Path, exported: tuple[Path, Path]) -> None:
    for path in exported:
        check_contents(path, 8, linear_layers(str(tiny_base)))


def test_it_is_of_the_base_the_adapter_and_its_parent(tiny_base: Path, exported: tuple[Path, Path]) -> None:
    adapter, parent = exported
    taken = take_fingerprint(str(tiny_base), adapter, parent, dtype="float32", tolerance=0.1)
    assert list(taken.logps) == ["adapter", "base", "parent"]
    alone = take_fingerprint(str(tiny_base), parent, None, dtype="float32", tolerance=0.1)
    assert list(alone.logps) == ["adapter", "base"]
    assert alone.logps["base"] == pytest.approx(taken.logps["base"], abs=1e-6)
    assert alone.logps["adapter"] == pytest.approx(taken.logps["parent"], abs=1e-6)
    assert distance(taken.logps["adapter"], taken.logps["parent"]) > 0.01
    assert why_not(taken, list(taken.logps["adapter"]), list(taken.logps["base"])) is None
    assert why_not(taken, list(alone.logps["adapter"]), list(taken.logps["base"]))


def test_it_is_what_the_model_says_of_every_third_token(tiny_base: Path) -> None:
    texts = fixed_texts(str(tiny_base))
    model = load_base(str(tiny_base), "float32").eval()
    with torch.inference_mode():
        whole = [model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
    expected = [
        float(logps[place - 1][text[place]])
        for text, logps in zip(texts, whole, strict=True)
        for place in range(1, len(text), 3)
    ]
    assert token_logps(model, texts) == pytest.approx(expected, abs=1e-5)
    assert len(expected) == len(places_of(texts)) > 15
    assert max(map(len, texts)) <= MAX_TOKENS
