"""Training on a tiny model: fresh, continued, and what comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from feedback.interactions import Message
from pawl.settings import Settings, TrainingSettings
from practice.world import CONTINUED_LEARNING_RATE, at_full_rate
from practice.world import TRAINING as PRACTICE_TRAINING
from retrain import dpo
from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, TrainingResult, train
from retrain.errors import TrainingFailed
from retrain.logprobs import implicit_rewards
from retrain.preflight import check, encoder_of
from retrain.progress import LoggedStep
from tests.retrain.tiny_model import TRAINING, make_pair
from tests.retrain.tool_model import make_tool_model

pytestmark = pytest.mark.training

EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(48)]
UNSEEN = [make_pair(number, text=f"what is {topic}") for number, topic in enumerate(("tea", "rain", "bread", "music"))]
SLOWER = TRAINING.model_copy(update={"continued_learning_rate": 1e-4})
DPO_ALONE = TRAINING.model_copy(update={"loss_type": ["sigmoid"], "loss_weights": [1.0]})


def run_on(base: Path, output: Path, training: TrainingSettings = TRAINING, parent: Path | None = None) -> DPORun:
    return DPORun(str(base), "served/tiny", parent, output, training, seed=3)


@pytest.fixture(scope="module")
def fresh(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(run_on(tiny_base, tmp_path_factory.mktemp("fresh")), EXAMPLES)


def preferred_share(base: Path, adapter: Path) -> float:
    rewards = implicit_rewards(str(base), {"m": adapter}, UNSEEN, dtype="float32", max_length=64, batch_size=3)["m"]
    return sum(r.score for r in rewards) / len(rewards)


def test_a_fresh_adapter_learns_the_preference(tiny_base: Path, fresh: TrainingResult) -> None:
    assert fresh.n_steps == 12
    assert fresh.loss_last < fresh.loss_first
    assert fresh.history[-1]["rewards/accuracies"] == 1.0
    assert preferred_share(tiny_base, fresh.adapter_dir) == 1.0


def test_only_the_two_files_of_the_adapter_are_exported(fresh: TrainingResult) -> None:
    assert sorted(p.name for p in fresh.adapter_dir.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((fresh.adapter_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "served/tiny"
    assert "lm_head" not in config["target_modules"]
    assert set(config["target_modules"]) >= {"q_proj", "o_proj", "down_proj"}


def test_a_fresh_adapter_starts_where_the_base_is(tiny_base: Path, tmp_path: Path) -> None:
    result = train(run_on(tiny_base, tmp_path, DPO_ALONE), EXAMPLES[:8])
    assert result.loss_first == pytest.approx(math.log(2), abs=1e-4)


def test_a_single_step_learns_something(tiny_base: Path, tmp_path: Path) -> None:
    """It would not if it were the first of a warm-up."""
    result = train(run_on(tiny_base, tmp_path), EXAMPLES[:4])
    assert result.n_steps == 1
    with safe_open(result.adapter_dir / "adapter_model.safetensors", "pt") as weights:
        assert any(weights.get_tensor(name).any() for name in weights.keys() if "lora_B" in name)  # noqa: SIM118


def test_a_continued_adapter_may_have_a_rate_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    for training, continued in ((TRAINING, TRAINING.learning_rate), (SLOWER, 1e-4)):
        rates = [
            dpo._arguments(run_on(tiny_base, tmp_path, training, one), 16)["learning_rate"] for one in (None, parent)
        ]
        assert rates == [TRAINING.learning_rate, continued]


def test_the_practice_world_is_slower_to_continue_but_for_its_drill(tmp_path: Path) -> None:
    training = {**PRACTICE_TRAINING, "continued_learning_rate": CONTINUED_LEARNING_RATE}
    settings = Settings.model_validate({"retrain": {"training": training}})
    rates = [
        run_on(tmp_path, tmp_path, each.retrain.training, tmp_path / "parent").learning_rate
        for each in (settings, at_full_rate(settings))
    ]
    assert rates == [CONTINUED_LEARNING_RATE, PRACTICE_TRAINING["learning_rate"]]
    assert rates[0] < rates[1]


def test_a_continued_adapter_starts_where_its_parent_is(tiny_base: Path, fresh: TrainingResult, tmp_path: Path) -> None:
    before = (fresh.adapter_dir / "adapter_model.safetensors").read_bytes()
    result = train(run_on(tiny_base, tmp_path, DPO_ALONE, fresh.adapter_dir), EXAMPLES[:16])

    assert result.loss_first == pytest.approx(math.log(2), abs=1e-4)
    assert result.loss_last < result.loss_first
    assert result.n_trainable == fresh.n_trainable
    assert (fresh.adapter_dir / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in result.adapter_dir.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(result.adapter_dir / "adapter_model.safetensors", "np") as weights:
        assert not any(".ref" in name for name in weights.keys())  # noqa: SIM118


def test_the_same_seed_gives_the_same_weights_and_every_logged_step_is_reported(
    tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[LoggedStep] = []
    one = train(run_on(tiny_base, tmp_path / "one"), EXAMPLES[:8], seen.append)
    two = train(run_on(tiny_base, tmp_path / "two"), EXAMPLES[:8])
    files = [result.adapter_dir / "adapter_model.safetensors" for result in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()

    assert [logged.step for logged in seen] == [1, 2]
    assert all(logged.n_steps == 2 and "rewards/margins" in logged.values for logged in seen)
    assert len(one.history) == 2


def test_answers_that_only_call_tools_are_told_apart(tmp_path: Path) -> None:
    """Without the calls the two sides would be one text, and nothing could be learned."""

    def call(day: str) -> Message:
        function = {"name": "get_weather", "arguments": f'{{"city": "Oslo", "day": "{day}"}}'}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    asked: list[Message] = [
        {"role": "user", "content": "Is it cold?"},
        call("monday"),
        {"role": "tool", "content": "-3"},
    ]
    example = replace(EXAMPLES[0], prompt=tuple(asked), chosen=call("sunday"), rejected=call("friday"))
    tools = ({"type": "function", "function": {"name": "get_weather"}},)
    examples = [replace(example, pair_id=str(n), tools=tools if n % 2 else None) for n in range(8)]
    base = make_tool_model(tmp_path / "base")
    training = DPO_ALONE.model_copy(update={"max_length": 1024, "batch_size": 2})

    report = check(examples, encoder_of(AutoTokenizer.from_pretrained(base)), max_length=1024)
    assert (report.problems, report.n_same_sides) == ((), 0)
    result = train(run_on(base, tmp_path / "out", training), examples)
    assert result.history[-1]["rewards/margins"] > 0
    assert result.loss_last < result.loss_first


def test_an_exploding_training_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    wild = TRAINING.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingFailed):
        train(run_on(tiny_base, tmp_path, wild), EXAMPLES[:16])


def test_a_parent_that_is_the_base_ties_on_every_pair(tiny_base: Path, fresh: TrainingResult) -> None:
    rewards = implicit_rewards(
        str(tiny_base),
        {"parent": None, "candidate": fresh.adapter_dir, "again": fresh.adapter_dir},
        UNSEEN,
        dtype="float32",
        max_length=64,
        batch_size=3,
    )
    assert [r.score for r in rewards["parent"]] == [0.5] * len(UNSEEN)
    assert rewards["candidate"] == rewards["again"]
    assert all(r.chosen > 0 > r.rejected for r in rewards["candidate"])
