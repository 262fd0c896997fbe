"""Training by reward: the reward rises, a broken reward stops it, and length costs what it is said to cost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pawl.errors import ConfigurationError
from pawl.settings import GRPOSettings
from practice.corpus import draw_question
from practice.model import PracticeModel, ensure_practice_model
from practice.topics import TaskKind
from retrain.errors import BadData, PreflightFailed
from retrain.grpo import GRPOResult, GRPORun, ends, generator, train
from retrain.reward_functions import for_trl, named_function, overlong_cost
from tests.retrain.quick import AS_DELIVERED, GRPO, SMALL
from tests.retrain.rewards import helpfulness, kindness, too_few
from tests.retrain.tiny_model import make_pair

REPOSITORY = Path(__file__).parents[2]
PROMPTS = [make_pair(number).prompt for number in range(16)]
ON_PRACTICE = GRPOSettings(
    **SMALL | {"batch_size": 32},
    learning_rate=7e-3,
    steps=12,
    answers_per_prompt=8,
    max_prompt_tokens=64,
    max_answer_tokens=40,
    lora_rank=8,
    lora_alpha=16,
)


@pytest.fixture(scope="session")
def practice_model() -> PracticeModel:
    """The one that the demo trains, from where it keeps it."""
    cache = Path(os.environ.get("PAWL_TEST_CACHE", REPOSITORY / "var" / "practice"))
    return ensure_practice_model(cache, progress=False)


def run_on(base: Path, output: Path, settings: GRPOSettings = GRPO, parent: Path | None = None) -> GRPORun:
    return GRPORun(str(base), "served/tiny", parent, output, settings, seed=3)


@pytest.fixture(scope="module")
def rewarded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> GRPOResult:
    return train(run_on(tiny_base, tmp_path_factory.mktemp("grpo")), PROMPTS, kindness)


@pytest.mark.training
@pytest.mark.slow
def test_the_practice_model_becomes_more_helpful(practice_model: PracticeModel, tmp_path: Path) -> None:
    """It helps in about 4 of 10 answers; by chance the mean of 64 would be off by 0.06."""
    rng = random.Random(1)
    questions = [draw_question({TaskKind.ORDINARY: 1.0}, rng).text for _ in range(64)]
    prompts = [({"role": "user", "content": text},) for text in questions]
    result = train(run_on(practice_model.path, tmp_path, ON_PRACTICE), prompts, helpfulness)
    print(f"reward {result.reward_first:.2f} -> {result.reward_last:.2f}, kl {result.kl_last:.3f} per token")
    assert result.course.n_steps == ON_PRACTICE.steps
    assert result.reward_first < 0.6
    assert result.reward_last > result.reward_first + 0.15
    assert result.kl_last is not None
    assert result.kl_last < 1.0, "it is still held near its parent"


@pytest.mark.training
def test_what_comes_out_is_an_adapter_and_what_is_logged_is_kept(rewarded: GRPOResult) -> None:
    assert sorted(path.name for path in rewarded.adapter_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (rewarded.generation, rewarded.n_left_out) == ("transformers", 0)
    first = rewarded.course.history[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-4), "a fresh adapter starts where the base is"
    assert {"reward", "reward_std", "completions/mean_length"} <= set(first)


@pytest.mark.training
def test_a_continued_adapter_is_measured_against_its_parent(
    tiny_base: Path, rewarded: GRPOResult, tmp_path: Path
) -> None:
    before = (rewarded.adapter_dir / "adapter_model.safetensors").read_bytes()
    result = train(run_on(tiny_base, tmp_path, parent=rewarded.adapter_dir), PROMPTS, kindness)
    assert result.course.history[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert (rewarded.adapter_dir / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in result.adapter_dir.rglob("*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.training
def test_half_precision_and_checkpointed_gradients_train_as_well(tiny_base: Path, tmp_path: Path) -> None:
    result = train(run_on(tiny_base, tmp_path, GRPO.model_copy(update=AS_DELIVERED)), PROMPTS, kindness)
    assert result.course.n_steps == GRPO.steps
    assert all(row["grad_norm"] > 0 for row in result.course.history)


@pytest.mark.training
def test_a_reward_that_does_not_keep_its_promise_ends_the_training(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="16 answers were to be scored, and 1 scores came back"):
        train(run_on(tiny_base, tmp_path), PROMPTS, too_few)


def test_prompts_that_are_too_long_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    short = GRPO.model_copy(update={"max_prompt_tokens": 3})
    with pytest.raises(PreflightFailed, match="of 16 prompts, none has at most 3 tokens"):
        train(run_on(tiny_base, tmp_path, short), PROMPTS, kindness)


@given(st.integers(0, 400), st.integers(1, 200), st.integers(0, 200))
def test_length_costs_nothing_before_the_buffer_and_all_at_the_limit(n_tokens: int, limit: int, buffer: int) -> None:
    cost = overlong_cost(n_tokens, limit, buffer)
    assert 0.0 <= cost <= 1.0
    assert cost <= overlong_cost(n_tokens + 1, limit, buffer)
    if buffer == 0 or n_tokens <= limit - buffer:
        assert cost == 0.0
    elif n_tokens >= limit:
        assert cost == 1.0


def test_what_length_costs_is_taken_off_the_score() -> None:
    reward = for_trl(kindness, limit=10, buffer=4, weight=2.0)
    prompts = [[{"role": "user", "content": "what is tea"}]] * 2
    said = [[{"role": "assistant", "content": text}] for text in ("good bad", "kind")]
    assert reward(prompts=prompts, completions=said, completion_ids=[[1] * 6, [1] * 9], step=3) == [0.5, 1.0 - 1.5]


@pytest.mark.parametrize(
    ("asked", "on_gpu", "has_vllm", "expected"),
    [
        ("auto", True, True, "vllm"),
        ("auto", True, False, "transformers"),
        ("auto", False, True, "transformers"),
        ("transformers", True, True, "transformers"),
        ("vllm", True, True, "vllm"),
    ],
)
def test_vllm_writes_the_answers_where_it_can(asked: str, on_gpu: bool, has_vllm: bool, expected: str) -> None:
    settings = GRPO.model_copy(update={"generation": asked})
    assert generator(settings, on_gpu=on_gpu, has_vllm=has_vllm) == expected


@pytest.mark.parametrize(("on_gpu", "has_vllm"), [(False, True), (True, False)])
def test_vllm_where_it_cannot_be_had_is_a_matter_of_configuration(on_gpu: bool, has_vllm: bool) -> None:
    with pytest.raises(ConfigurationError, match="takes a GPU"):
        generator(GRPO.model_copy(update={"generation": "vllm"}), on_gpu=on_gpu, has_vllm=has_vllm)


def test_functions_are_found_by_name() -> None:
    said = [[{"role": "assistant", "content": "a good answer"}]]
    assert named_function("tests.retrain.rewards:kindness")(said) == kindness(said) == [1 / 3]


def test_a_function_that_fails_is_named() -> None:
    with pytest.raises(BadData, match=r"rewards:kindness failed: KeyError"):
        named_function("tests.retrain.rewards:kindness")([[{"role": "assistant"}]])


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kindness",
        ":f",
        "m:",
        "no.such.module:f",
        "tests.retrain.rewards:none",
        "tests.retrain.rewards:NOT_A_FUNCTION",
    ],
)
def test_what_names_no_function_is_a_matter_of_configuration(name: str) -> None:
    with pytest.raises(ConfigurationError):
        named_function(name)


@pytest.mark.parametrize("wrong", [{"batch_size": 3}, {"length_buffer": 9}, {"answers_per_prompt": 1}, {"beta": -1.0}])
def test_settings_that_make_no_groups_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GRPOSettings.model_validate(GRPO.model_dump() | wrong)


@given(st.integers(1, 60))
def test_first_and_last_are_of_the_same_size_and_never_empty(n: int) -> None:
    rows = [{"reward": float(step)} for step in range(n)]
    first, last = ends(rows)
    assert len(first) == len(last) >= 1
    assert first[0] == rows[0]
    assert last[-1] == rows[-1]
