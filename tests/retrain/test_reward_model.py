"""Reward models: trained by the published equation, measured on unseen pairs, sealed, and refused when changed."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, set_seed

from pawl.errors import BadAdapter
from retrain.adapters import base_fingerprint
from retrain.answer_scores import Compared, Conversation, accuracy_of, checked_scores, wilson
from retrain.errors import BadData, PreflightFailed
from retrain.reward_model import RewardModel, headed_base, tokens_of
from retrain.reward_training import RewardResult, RewardRun, compare, train
from retrain.sealed_files import seal_files, sweep, verify_files
from tests.retrain.quick import AS_DELIVERED, REWARD
from tests.retrain.tiny_model import TOPICS, make_model, make_pair

PAIRS = [make_pair(number) for number in range(48)]
UNSEEN = [make_pair(number, text=f"what is {TOPICS[number % 5]}") for number in range(10)]


def answered(text: str, question: str = "what is tea") -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardResult:
    return train(RewardRun(str(tiny_base), tmp_path_factory.mktemp("reward"), REWARD, seed=3), PAIRS, UNSEEN)


@pytest.fixture(scope="module")
def sealed(tiny_base: Path, trained: RewardResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    holdout = {"beats_chance": trained.accuracy.beats_chance}
    fields = {"base_sha": base_fingerprint(str(tiny_base)), "max_length": 64, "holdout": holdout}
    return seal_files(trained.directory, tmp_path_factory.mktemp("rewards"), "reward", fields)


@pytest.fixture(scope="module")
def model(tiny_base: Path, sealed: Path) -> RewardModel:
    return RewardModel.load(sealed, str(tiny_base), dtype="float32", batch_size=4)


@pytest.mark.training
def test_people_are_found_right_on_pairs_that_were_not_seen(trained: RewardResult) -> None:
    assert trained.course.loss_last < trained.course.loss_first / 2
    assert trained.accuracy.n == len(UNSEEN)
    assert trained.accuracy.estimate == 1.0
    assert trained.accuracy.beats_chance
    assert trained.accuracy.by_source == {"edit": (4, 1.0), "regeneration": (6, 1.0)}


@pytest.mark.training
def test_a_loaded_model_scores_as_the_one_that_was_trained(model: RewardModel) -> None:
    assert model.beats_chance
    compared = compare(model, UNSEEN)
    assert all(one.chosen > one.rejected for one in compared)
    assert model.score([answered("tea is good kind")])[0] > model.score([answered("tea is bad rude")])[0]


@pytest.mark.training
def test_scores_do_not_depend_on_who_shares_a_batch(model: RewardModel) -> None:
    asked = [answered(" ".join(["good"] * (1 + number % 7)), f"what is {TOPICS[number % 5]}") for number in range(11)]
    alone = [model.score([one])[0] for one in asked]
    assert model.score(asked) == pytest.approx(alone, abs=1e-5)
    assert model.score(asked[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert model.score([]) == []


def test_of_a_long_conversation_the_end_is_read(model: RewardModel) -> None:
    whole = answered("good kind", "tea " * 100)
    tokens = tokens_of(whole, model.encoder, 64)
    assert len(tokens) == 64
    assert tokens == list(model.encoder.conversation(whole))[-64:]
    assert math.isfinite(model.score([whole])[0])


@pytest.mark.training
def test_the_loss_is_the_published_one(tiny_base: Path, tmp_path: Path) -> None:
    """Bradley and Terry's -log sigmoid(r_c - r_r), and centre * (r_c + r_r)^2, in the mean over pairs."""
    pairs, seed, centre = PAIRS[:8], 5, 0.5
    once = REWARD.model_copy(update={"batch_size": 8, "epochs": 1.0, "centre": centre})
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    set_seed(seed)
    untrained = RewardModel(headed_base(str(tiny_base), "float32", tokenizer), tokenizer, max_length=64, batch_size=16)
    expected = fmean(
        math.log1p(math.exp(one.rejected - one.chosen)) + centre * (one.chosen + one.rejected) ** 2
        for one in compare(untrained, pairs)
    )
    result = train(RewardRun(str(tiny_base), tmp_path, once, seed), pairs, [])
    assert result.course.loss_first == pytest.approx(expected, abs=1e-5)
    assert result.accuracy.estimate is None
    assert not result.accuracy.beats_chance


@pytest.mark.training
def test_flipped_preferences_are_found_out(tiny_base: Path, tmp_path: Path) -> None:
    flipped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in PAIRS]
    result = train(RewardRun(str(tiny_base), tmp_path, REWARD, seed=3), flipped, UNSEEN)
    assert result.accuracy.estimate == 0.0
    assert not result.accuracy.beats_chance


@pytest.mark.training
def test_half_precision_and_checkpointed_gradients_learn_as_well(tiny_base: Path, tmp_path: Path) -> None:
    settings = REWARD.model_copy(update=AS_DELIVERED)
    result = train(RewardRun(str(tiny_base), tmp_path, settings, seed=3), PAIRS, UNSEEN)
    assert result.accuracy.estimate is not None
    assert result.accuracy.estimate >= 0.9


def test_without_pairs_there_is_nothing_to_learn(tiny_base: Path, tmp_path: Path) -> None:
    same = [replace(pair, chosen=pair.rejected) for pair in PAIRS[:3]]
    for pairs in ([], same):
        with pytest.raises(PreflightFailed, match="no pair to learn from"):
            train(RewardRun(str(tiny_base), tmp_path, REWARD, seed=3), pairs, [])


def copied(sealed: Path, tmp_path: Path) -> Path:
    """Of the same name, for the name is in the manifest."""
    copy = tmp_path / sealed.name
    shutil.copytree(sealed, copy)
    for path in (copy, *copy.iterdir()):
        path.chmod(0o755)
    return copy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b"other weights"),
        ("adapter_config.json", b"{}"),
        ("adapter_model.bin", pickle.dumps({"weights": 1})),
        ("evil.py", b"raise SystemExit"),
        ("more.safetensors", b""),
    ],
)
def test_changed_and_planted_files_are_refused(
    sealed: Path, tiny_base: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    copy = copied(sealed, tmp_path)
    (copy / name).write_bytes(content)
    with pytest.raises(BadAdapter, match=name.replace(".", r"\.")):
        RewardModel.load(copy, str(tiny_base), dtype="float32")


def test_a_link_out_of_the_directory_is_refused(sealed: Path, tiny_base: Path, tmp_path: Path) -> None:
    copy = copied(sealed, tmp_path)
    weights = copy / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadAdapter, match="neither weights nor"):
        RewardModel.load(copy, str(tiny_base), dtype="float32")


def test_a_missing_file_another_base_and_what_is_no_reward_model_are_refused(
    sealed: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy = copied(sealed, tmp_path)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(BadAdapter, match=r"not what was sealed: adapter_config\.json"):
        RewardModel.load(copy, str(tiny_base), dtype="float32")
    other = make_model(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(BadAdapter, match="another base model"):
        RewardModel.load(sealed, str(other), dtype="float32")
    with pytest.raises(BadAdapter, match="cannot read"):
        RewardModel.load(tmp_path, str(tiny_base), dtype="float32")
    with pytest.raises(BadAdapter, match="not a sealed base"):
        verify_files(sealed, "base")


def test_what_a_killed_sealing_left_is_removed_but_not_what_is_being_sealed(tmp_path: Path) -> None:
    for name, at in ((".sealing-old", 1000.0), (".sealing-new", 9000.0), ("reward-0123456789ab", 1000.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text("half")
        os.utime(tmp_path / name, (at, at))
    sweep(tmp_path, now=9100.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sealing-new", "reward-0123456789ab"]
    sweep(tmp_path / "nothing was sealed yet", now=9100.0)


def test_sealing_again_changes_nothing(trained: RewardResult, tmp_path: Path) -> None:
    first = seal_files(trained.directory, tmp_path, "reward", {"a": 1})
    before = (first / "manifest.json").read_bytes()
    assert seal_files(trained.directory, tmp_path, "reward", {"a": 2}) == first
    assert (first / "manifest.json").read_bytes() == before
    assert json.loads(before)["name"] == first.name
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@given(st.lists(st.tuples(st.sampled_from(["edit", "thumbs"]), st.floats(-5, 5), st.floats(-5, 5)), max_size=30))
def test_accuracy_lies_in_its_interval_and_adds_up(rows: list[tuple[str, float, float]]) -> None:
    compared = [Compared(*row) for row in rows]
    found = accuracy_of(compared)
    assert found.n == len(rows) == sum(n for n, _ in found.by_source.values())
    if found.estimate is not None:
        assert found.ci_lower <= found.estimate + 1e-9
        assert found.estimate <= found.ci_upper + 1e-9
        assert found.estimate * found.n == pytest.approx(sum(n * share for n, share in found.by_source.values()))
    turned = accuracy_of([Compared(one.source, one.rejected, one.chosen) for one in compared])
    assert not (found.beats_chance and turned.beats_chance)


def test_a_coin_does_not_beat_chance() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert accuracy_of([Compared("edit", 1.0, 0.0)] * 60 + [Compared("edit", 0.0, 1.0)] * 50).beats_chance is False
    assert accuracy_of([Compared("edit", 1.0, 1.0)]).estimate == 0.5


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [1.0, "high"], [1.0, math.inf], [1.0, None]])
def test_scores_must_be_one_finite_number_each(scores: list[float]) -> None:
    with pytest.raises(BadData, match="score"):
        checked_scores(lambda _: scores, [answered("a"), answered("b")])
