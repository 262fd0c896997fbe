"""Supervised training on the tiny model: it says what it was shown, and stops."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from pawl.settings import SFTSettings
from retrain.demonstrations import Demonstration
from retrain.errors import PreflightFailed, TrainingFailed
from retrain.progress import LoggedStep
from retrain.sft import SFTResult, SFTRun, train
from tests.retrain.quick import AS_DELIVERED, SFT, greedy_answer
from tests.retrain.tiny_model import make_pair

pytestmark = pytest.mark.training

DEMONSTRATIONS = [
    Demonstration(str(number), "demonstration", (*pair.prompt, pair.chosen), 0)
    for number, pair in enumerate(map(make_pair, range(40)))
]


def run_on(base: Path, output: Path, settings: SFTSettings = SFT, parent: Path | None = None) -> SFTRun:
    return SFTRun(str(base), "served/tiny", parent, output, settings, seed=3)


@pytest.fixture(scope="module")
def shown(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SFTResult:
    return train(run_on(tiny_base, tmp_path_factory.mktemp("sft")), DEMONSTRATIONS)


def test_the_model_imitates_what_it_was_shown_and_ends_its_turn(tiny_base: Path, shown: SFTResult) -> None:
    assert shown.course.loss_last < shown.course.loss_first - 0.5
    assert shown.adapter_dir is not None
    said, before = (greedy_answer(tiny_base, adapter, "tell me about tea") for adapter in (shown.adapter_dir, None))
    assert said.endswith("is good kind <end>")
    assert not before.endswith("<end>")


def test_the_adapter_alone_is_exported(shown: SFTResult) -> None:
    assert shown.adapter_dir is not None
    assert shown.model_dir is None
    assert sorted(path.name for path in shown.adapter_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_continued_adapter_starts_where_its_parent_is_and_leaves_it_alone(
    tiny_base: Path, shown: SFTResult, tmp_path: Path
) -> None:
    assert shown.adapter_dir is not None
    weights = shown.adapter_dir / "adapter_model.safetensors"
    before = weights.read_bytes()
    seen: list[LoggedStep] = []
    short = SFT.model_copy(update={"epochs": 1.0})
    result = train(run_on(tiny_base, tmp_path, short, shown.adapter_dir), DEMONSTRATIONS[:16], seen.append)
    assert result.course.loss_first == pytest.approx(shown.course.loss_last, abs=0.3)
    assert result.course.method == "sft continued"
    assert weights.read_bytes() == before
    assert [logged.step for logged in seen] == [1, 2]


def test_all_weights_make_a_base_model_of_safetensors(tiny_base: Path, tmp_path: Path) -> None:
    full = SFT.model_copy(update={"full": True, "learning_rate": 3e-3})
    result = train(run_on(tiny_base, tmp_path, full), DEMONSTRATIONS)
    assert result.adapter_dir is None
    assert result.model_dir is not None
    assert greedy_answer(result.model_dir, None, "what is rain").endswith("is good kind <end>")
    assert {path.suffix for path in result.model_dir.iterdir()} <= {".safetensors", ".json", ".jinja"}
    with safe_open(result.model_dir / "model.safetensors", "np") as weights:
        assert not any("lora" in name for name in weights.keys())  # noqa: SIM118


def test_what_would_teach_nothing_is_refused_before_a_step_is_taken(tiny_base: Path, tmp_path: Path) -> None:
    tight = SFT.model_copy(update={"max_length": 8})
    with pytest.raises(PreflightFailed, match="do not fit into 8 tokens"):
        train(run_on(tiny_base, tmp_path, tight), DEMONSTRATIONS)
    with pytest.raises(PreflightFailed, match="nothing to train on"):
        train(run_on(tiny_base, tmp_path), [])


def test_half_precision_and_checkpointed_gradients_learn_as_well(tiny_base: Path, tmp_path: Path) -> None:
    result = train(run_on(tiny_base, tmp_path, SFT.model_copy(update=AS_DELIVERED)), DEMONSTRATIONS)
    assert result.course.loss_last < result.course.loss_first - 0.5


def test_an_exploding_training_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    wild = SFT.model_copy(update={"learning_rate": 1e30, "epochs": 3.0})
    with pytest.raises(TrainingFailed):
        train(run_on(tiny_base, tmp_path, wild), DEMONSTRATIONS[:16])
