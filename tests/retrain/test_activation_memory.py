"""Recomputation is left out where there is room, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM, PreTrainedModel

from pawl.settings import TrainingSettings
from retrain import activation_memory
from retrain.activation_memory import bytes_per_token, free_bytes, has_room
from retrain.dpo import DPORun, train
from tests.retrain.test_training_speed import EXAMPLES
from tests.retrain.tiny_model import TRAINING

pytestmark = pytest.mark.training


def saved_by(model: Any, n_tokens: int) -> int:
    """Bytes that autograd really keeps for a batch of two rows, weights left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = model(input_ids=torch.ones((2, n_tokens), dtype=torch.long), use_cache=False)
        answer.logits.float().log_softmax(-1)
    return sum(size for place, size in kept.items() if place not in own)


def test_a_short_pass_tells_what_a_batch_takes(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert saved_by(model, 200) == pytest.approx(400 * bytes_per_token(model), rel=0.15)


def test_half_of_what_is_free_may_be_taken(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    needed = int(100 * bytes_per_token(model)) + 1
    monkeypatch.setattr(activation_memory, "free_bytes", lambda _device: 2 * needed)
    assert has_room(model, 100)
    assert not has_room(model, 110)
    assert not has_room(model, 100, n_processes=2)


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(activation_memory, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == 0
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert free_bytes(cpu) == 500 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, left in (("max", 500 * 1024), ("3000", 2000), ("500", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_bytes(cpu) == left


def test_auto_trains_the_same_either_way(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training: TrainingSettings = TRAINING.model_copy(update={"gradient_checkpointing": "auto", "batch_size": 8})
    recomputed = []
    enable = PreTrainedModel.activation_checkpointing_enable

    def enable_noted(model: PreTrainedModel, *args: Any, **given: Any) -> None:
        recomputed.append(free)
        enable(model, *args, **given)

    monkeypatch.setattr(PreTrainedModel, "activation_checkpointing_enable", enable_noted)
    weights = []
    for free in (0, 1 << 40):
        monkeypatch.setattr(activation_memory, "free_bytes", lambda _device, free=free: free)
        run = DPORun(str(tiny_base), "served/tiny", None, tmp_path / str(free), training, seed=3)
        with capture_logs() as logs:
            weights.append((train(run, EXAMPLES).adapter_dir / "adapter_model.safetensors").read_bytes())
        assert [one["kept"] for one in logs if one["event"] == "activations"] == [free > 0]
    assert set(recomputed) == {0}
    assert weights[0] == weights[1]
