"""What makes training faster changes nothing that is learned."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from pawl.settings import DistributedSettings, TrainingSettings
from retrain import distributed, dpo, shared_prompts, training_speed
from retrain.dataset import Origin, TrainingExample, example_of
from retrain.distributed import join
from retrain.dpo import DPORun, TrainingResult, train
from retrain.progress import LoggedStep
from retrain.reference_cache import (
    ReferenceKey,
    ReferenceLogps,
    read_reference,
    tensors_sha,
    tokens_sha,
    write_reference,
)
from retrain.shared_prompts import lay_out, share_prompts, supports_sharing
from tests.retrain.tiny_model import TRAINING, make_pair
from tests.servers import free_port

pytestmark = pytest.mark.training

KEY = ReferenceKey(base="b", adapter="", data="d", max_length=64, dtype="float32")
LOGPS = ReferenceLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.5]))
SLOW: Mapping[str, Any] = {"bucket_steps": 0, "share_prompts": False, "cache_reference": False}
STEPWISE = TRAINING.model_copy(update={"batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 2.0})


def example(number: int) -> TrainingExample:
    """Answers of many lengths, so that there is something to sort."""
    plain = example_of(make_pair(number), Origin.NEW)
    longer = " ".join([str(plain.chosen["content"])] * (1 + number * 7 % 5))
    return replace(plain, chosen={"role": "assistant", "content": longer})


EXAMPLES = [example(number) for number in range(24)]


def trained(base: Path, output: Path, parent: Path | None = None, **changed: object) -> TrainingResult:
    training: TrainingSettings = STEPWISE.model_copy(update=changed)
    return train(DPORun(str(base), "served/tiny", parent, output, training, seed=3), EXAMPLES)


def losses(result: TrainingResult) -> list[float]:
    return [row["loss"] for row in result.history]


def weights(result: TrainingResult) -> Mapping[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(result.adapter_dir / "adapter_model.safetensors")
    return found


def farthest(one: TrainingResult, other: TrainingResult) -> float:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def moved_by(result: TrainingResult) -> float:
    """How far training took a weight that starts at zero."""
    return max(float(weight.abs().max()) for name, weight in weights(result).items() if "lora_B" in name)


@pytest.fixture(scope="module")
def slow(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return trained(tiny_base, tmp_path_factory.mktemp("slow"), **SLOW)


@pytest.fixture(scope="module")
def fast(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return trained(tiny_base, tmp_path_factory.mktemp("fast"))


def test_all_of_it_together_trains_the_same_adapter_step_by_step(slow: TrainingResult, fast: TrainingResult) -> None:
    assert len(losses(fast)) == 6
    assert losses(fast) == pytest.approx(losses(slow), abs=2e-3)
    assert farthest(fast, slow) < 0.05 * moved_by(slow)


def test_an_adapter_that_goes_on_is_compared_with_its_frozen_self(
    tiny_base: Path, fast: TrainingResult, tmp_path: Path
) -> None:
    without = trained(tiny_base, tmp_path / "slow", fast.adapter_dir, epochs=1.0, **SLOW)
    result = trained(tiny_base, tmp_path / "fast", fast.adapter_dir, epochs=1.0)
    assert result.history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert losses(result) == pytest.approx(losses(without), abs=2e-3)


def test_two_nodes_of_one_process_each_train_what_one_process_trains(
    tiny_base: Path, fast: TrainingResult, tmp_path: Path
) -> None:
    leader = DistributedSettings(nodes=2, port=free_port(), timeout_s=600)
    second = leader.model_copy(update={"node_rank": 1, "join_hours": 0.5})
    seen: list[LoggedStep] = []
    run = DPORun(str(tiny_base), "served/tiny", None, tmp_path / "together", STEPWISE, seed=3)
    with ThreadPoolExecutor(1) as other_node:
        joined = other_node.submit(join, second, tmp_path / "ranks")
        result = distributed.train(run, EXAMPLES, seen.append, settings=leader)
        joined.result()

    assert [logged.step for logged in seen] == list(range(1, fast.n_steps + 1))
    assert losses(result) == pytest.approx(losses(fast), abs=2e-3)
    assert weights(result).keys() == weights(fast).keys()
    assert farthest(result, fast) < 0.05 * moved_by(fast)
    files = sorted(path.relative_to(run.output_dir).as_posix() for path in result.adapter_dir.iterdir())
    assert files == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    ours, alone = (load_file(each / "reference.safetensors") for each in (run.output_dir, fast.adapter_dir.parent))
    torch.testing.assert_close(ours["chosen"], alone["chosen"], atol=1e-4, rtol=1e-4)
    assert not (run.output_dir / "ranks").exists()


@pytest.mark.parametrize(("losses", "steps"), [(["sigmoid", "sft"], 1), (["sigmoid", "aot"], 0)])
def test_losses_that_compare_the_answers_of_a_batch_get_it_as_it_was_drawn(
    tiny_base: Path, tmp_path: Path, losses: list[str], steps: int
) -> None:
    training = STEPWISE.model_copy(update={"loss_type": losses})
    run = DPORun(str(tiny_base), "served/tiny", None, tmp_path, training, seed=3)
    assert dpo._speed(run, dpo.read_contents(run)).bucket_steps == steps


def test_the_reference_is_asked_once_and_kept(
    tiny_base: Path, fast: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = fast.adapter_dir.parent
    kept = load_file(output / "reference.safetensors")
    assert kept["chosen"].shape == kept["rejected"].shape == (len(EXAMPLES),)

    def refuse(*_: Any) -> ReferenceLogps:
        raise AssertionError("asked again")

    monkeypatch.setattr(training_speed, "_ask", refuse)
    assert losses(trained(tiny_base, output)) == losses(fast)
    with pytest.raises(AssertionError, match="asked again"):
        trained(tiny_base, output, max_length=48)


@pytest.mark.parametrize("field", ["base", "adapter", "data", "max_length", "dtype", "scored"])
def test_what_is_kept_for_another_key_is_not_used(tmp_path: Path, field: str) -> None:
    path = tmp_path / "reference.safetensors"
    write_reference(path, KEY, LOGPS)
    found = read_reference(path, KEY)
    assert found is not None
    assert torch.equal(found.rejected, LOGPS.rejected)
    other = 65 if field == "max_length" else "other"
    assert read_reference(path, replace(KEY, **{field: other})) is None  # type: ignore[arg-type]
    assert [each.name for each in tmp_path.iterdir()] == ["reference.safetensors"]


def test_numbers_that_were_changed_or_cut_off_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    assert read_reference(path, KEY) is None
    write_reference(path, KEY, LOGPS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert read_reference(path, KEY) is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_reference(path, KEY) is None
    save_file({"chosen": LOGPS.chosen}, path)
    assert read_reference(path, KEY) is None


def test_the_key_tells_every_token_and_weight_apart() -> None:
    row = {"a": [1, 2], "b": [3]}
    shas = {
        tokens_sha(rows, ("a", "b")) for rows in ([row], [row, row], [{"a": [1], "b": [2, 3]}], [{**row, "b": [4]}])
    }
    assert len(shas) == 4
    ones = torch.ones(2, 3)
    assert tensors_sha([("x", ones), ("y", ones)]) == tensors_sha([("y", ones), ("x", ones.clone())])
    assert len({tensors_sha([("x", each)]) for each in (ones, ones.T, ones.double(), ones * 2)}) == 4


def test_what_a_prompt_is_followed_by_sees_the_prompt_and_itself() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 10, 11]])
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, 9, 10, 11]])
    rows = lay_out(tokens, (tokens != 0).long(), labels)
    assert rows is not None
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    seen = [row.nonzero().flatten().tolist() for row in rows.attention[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert rows.scored_at[1].tolist() == [1, 2, 1, 4, 5]
    assert rows.targets.tolist() == [7, 8, 9, 10, 11]


def test_rows_that_are_no_pairs_or_would_save_nothing_stay_as_they_are() -> None:
    tokens = torch.arange(1, 13).reshape(2, 6)
    whole, ignored = torch.ones_like(tokens), torch.full_like(tokens, -100)
    assert lay_out(tokens, whole, tokens) is None  # No prompt.
    assert lay_out(tokens, whole, torch.where(tokens < 9, ignored, tokens)) is None  # Prompts of two lengths.
    one_token = torch.where(torch.arange(6) < 1, ignored, tokens)
    assert lay_out(tokens, whole, one_token) is None  # 11 positions for 12.


@pytest.fixture
def tiny(tiny_base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="sdpa")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def batch_of(generator: torch.Generator) -> dict[str, Any]:
    """Three pairs with prompts and answers of random lengths."""
    sizes = torch.randint(1, 9, (3, 3), generator=generator).tolist()
    prompts = [torch.randint(5, 20, (prompt + 4,), generator=generator) for prompt, _, _ in sizes]
    answers = [torch.randint(5, 20, (size[side],), generator=generator) for side in (1, 2) for size in sizes]
    rows = [torch.cat([prompts[number % 3], answer]) for number, answer in enumerate(answers)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    starts = torch.tensor([len(prompts[number % 3]) for number in range(6)]).unsqueeze(1)
    is_scored = attention.bool() & (torch.arange(tokens.shape[1]) >= starts)
    return {"input_ids": tokens, "attention_mask": attention, "labels": tokens.masked_fill(~is_scored, -100)}


def test_shared_prompts_give_the_same_log_probabilities_and_gradients(tiny: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [batch_of(generator) for _ in range(5)]
    assert all(lay_out(each["input_ids"], each["attention_mask"], each["labels"]) for each in batches)
    plain = [scored(tiny, batch) for batch in batches]
    assert share_prompts(tiny) is None
    for batch, (logps, entropy, gradient) in zip(batches, plain, strict=True):
        found = scored(tiny, batch)
        torch.testing.assert_close(found[0], logps, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], entropy, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2], gradient, atol=1e-5, rtol=1e-3)


def scored(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model.zero_grad()
    output = model(**batch, fused_lm_head=True, use_cache=False)
    (output.log_probs.sum(1) * torch.arange(1.0, 7.0)).sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    return output.log_probs.detach(), output.entropy.detach(), gradient


def test_a_model_that_shares_wrongly_is_found_out(
    tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not keep to the attention it is given, say."""
    batch = batch_of(torch.Generator().manual_seed(2))
    expected = scored(tiny, batch)[0]
    see_all = shared_prompts._attention
    monkeypatch.setattr(shared_prompts, "_attention", lambda parts: see_all(torch.zeros_like(parts)))
    assert share_prompts(tiny) is None
    torch.testing.assert_close(scored(tiny, batch)[0], expected, atol=1e-6, rtol=1e-5)
    assert "prompts_not_shared" in capsys.readouterr().out


def test_models_that_do_not_see_the_whole_text_are_left_alone(tiny: Any) -> None:
    assert supports_sharing(tiny.config) is None
    tiny.config.sliding_window = 16
    assert supports_sharing(tiny.config) == "not all of its layers see the whole text"
    tiny.config.sliding_window, tiny.config._attn_implementation = None, "eager"
    assert share_prompts(tiny) == "its attention takes no mask of ours"
