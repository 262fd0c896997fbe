"""A training that is killed or asked to leave ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pawl.settings import TrainingSettings
from retrain import checkpoints
from retrain.checkpoints import Spent
from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, TrainingResult, fingerprint, read_contents, train
from retrain.errors import TrainingFailed, TrainingInterrupted
from retrain.progress import LoggedStep
from retrain.termination import sigterm_noted
from tests.retrain.tiny_model import TRAINING, make_pair

pytestmark = pytest.mark.training

EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(16)]
STEPS = 8
STEADY = TRAINING.model_copy(
    update={"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2.0, "checkpoint_steps": 3}
)


def run_on(base: Path, output: Path, training: TrainingSettings = STEADY, parent: Path | None = None) -> DPORun:
    return DPORun(str(base), "served/tiny", parent, output, training, seed=5)


def weights(result: TrainingResult) -> bytes:
    return (result.adapter_dir / "adapter_model.safetensors").read_bytes()


def dying_at(step: int) -> Callable[[LoggedStep], None]:
    """As kill -9 would: nothing is tidied up. The step was logged, and had it a checkpoint, that was not yet begun."""

    def report(logged: LoggedStep) -> None:
        if logged.step == step:
            raise KeyboardInterrupt

    return report


def asking_at(step: int) -> Callable[[LoggedStep], None]:
    def report(logged: LoggedStep) -> None:
        if logged.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    result = train(run_on(tiny_base, tmp_path_factory.mktemp("undisturbed")), EXAMPLES)
    assert (result.n_steps, result.resumed_at) == (STEPS, None)
    return result


@pytest.fixture
def killed(tiny_base: Path, tmp_path: Path) -> DPORun:
    """Died in step 7, the middle of the second pass; states of steps 3 and 6 are on the disk."""
    run = run_on(tiny_base, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(run, EXAMPLES, dying_at(7))
    assert sorted(path.name for path in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    return run


def test_a_killed_training_goes_on_from_its_newest_state(killed: DPORun, undisturbed: TrainingResult) -> None:
    result = train(killed, EXAMPLES)
    assert result.resumed_at == 6
    assert weights(result) == weights(undisturbed)
    assert [row["step"] for row in result.history] == [row["step"] for row in undisturbed.history]
    assert [row["loss"] for row in result.history] == [row["loss"] for row in undisturbed.history]
    assert result.history[-1]["num_tokens"] == undisturbed.history[-1]["num_tokens"]


def test_sigterm_ends_the_step_saves_and_leaves_with_143(
    tiny_base: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    run = run_on(tiny_base, tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="at step 5 of 8") as left:
        train(run, EXAMPLES, asking_at(4))
    assert left.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (run.output_dir / "adapter").exists()

    # Step 4 was over when it was asked, so that it had begun another one.
    result = train(run, EXAMPLES)
    assert result.resumed_at == 5
    assert weights(result) == weights(undisturbed)


def test_a_state_that_is_not_whole_is_never_gone_on_from(killed: DPORun, undisturbed: TrainingResult) -> None:
    optimiser = killed.checkpoints / "checkpoint-6" / "optimizer.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:-1])
    result = train(killed, EXAMPLES)
    assert result.resumed_at == 3
    assert weights(result) == weights(undisturbed)


def test_states_of_another_training_are_not_gone_on_from(killed: DPORun, undisturbed: TrainingResult) -> None:
    others = [replace(EXAMPLES[0], pair_id="another"), *EXAMPLES[1:]]
    assert checkpoints.newest_whole(killed.checkpoints, "another") is None
    guards = killed.training.guards.model_copy(update={"max_hours": 2})
    careful = killed.training.model_copy(update={"guards": guards, "gradient_checkpointing": True})
    result = train(replace(killed, training=careful), others)
    assert result.resumed_at == 6, "none of it says what is learned"
    assert weights(result) == weights(undisturbed)
    faster = killed.training.model_copy(update={"learning_rate": 6e-3})
    assert train(replace(killed, training=faster), EXAMPLES).resumed_at is None


def test_a_base_or_a_parent_that_was_replaced_in_place_begins_another_training(
    tiny_base: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    """The paths are the same; what was half learned on top of other weights would be carried on."""
    base, parent = tmp_path / "base", tmp_path / "parent"
    shutil.copytree(tiny_base, base)
    shutil.copytree(undisturbed.adapter_dir, parent)
    run = run_on(base, tmp_path / "run", parent=parent)
    before = fingerprint(run, [], read_contents(run))
    assert fingerprint(run, [], read_contents(run)) == before
    seen = {before}
    for path in (base / "model.safetensors", parent / "adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        seen.add(fingerprint(run, [], read_contents(run)))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    seen.add(fingerprint(run, [], read_contents(run)))
    assert len(seen) == 4


def test_a_finished_training_whose_result_was_lost_only_exports(killed: DPORun, undisturbed: TrainingResult) -> None:
    train(killed, EXAMPLES)
    shutil.rmtree(killed.output_dir / "adapter")
    again = train(killed, EXAMPLES)
    assert again.resumed_at == STEPS
    assert weights(again) == weights(undisturbed)
    assert train(killed, EXAMPLES, resume=False).resumed_at is None


@pytest.mark.parametrize("objective", ["kto", "simpo"])
def test_other_trainers_go_on_as_exactly_from_a_parent(
    tiny_base: Path, tmp_path: Path, undisturbed: TrainingResult, objective: str
) -> None:
    training = STEADY.model_copy(update={"objective": objective, "epochs": 1.0})
    whole = run_on(tiny_base, tmp_path / "whole", training, undisturbed.adapter_dir)
    broken = replace(whole, output_dir=tmp_path / "broken")
    with pytest.raises(TrainingInterrupted):
        train(broken, EXAMPLES, asking_at(2))
    result = train(broken, EXAMPLES)
    assert result.resumed_at == 3
    assert weights(result) == weights(train(whole, EXAMPLES))


def test_a_used_up_budget_stops_with_a_state_to_go_on_from(
    tiny_base: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    half = undisturbed.history[3]["num_tokens"]
    small = STEADY.model_copy(update={"guards": STEADY.guards.model_copy(update={"max_tokens": int(half)})})
    run = run_on(tiny_base, tmp_path, small)
    with pytest.raises(TrainingFailed, match=r"at step 4 of 8: raise retrain\.training\.guards\.max_tokens"):
        train(run, EXAMPLES)
    result = train(replace(run, training=STEADY), EXAMPLES)
    assert result.resumed_at == 4
    assert weights(result) == weights(undisturbed)


# Checkpoints by themselves


def filled(home: Path, step: int) -> Path:
    directory = home / f"checkpoint-{step}"
    (directory / "ref").mkdir(parents=True)
    (directory / "weights").write_text(f"weights {step}")
    (directory / "ref" / "weights").write_text("reference")
    return directory


def test_what_is_sealed_is_found_with_what_was_spent(tmp_path: Path) -> None:
    spent = Spent(seconds=1.5, tokens=7, first=(0.25,), last=(0.5, -1.0))
    for step in (9, 10):
        checkpoints.seal(filled(tmp_path, step), step=step, fingerprint="a", spent=spent)
    found = checkpoints.newest_whole(tmp_path, "a")
    assert found is not None
    assert (found.step, found.spent) == (10, spent)
    (tmp_path / "checkpoint-10" / "ref" / "weights").write_text("Reference")
    assert checkpoints.newest_whole(tmp_path, "a") == replace(found, path=tmp_path / "checkpoint-9", step=9)


@pytest.mark.parametrize("damage", ["no manifest", "a manifest cut short", "another manifest", "a file is missing"])
def test_half_a_state_is_none(tmp_path: Path, damage: str) -> None:
    directory = filled(tmp_path, 4)
    checkpoints.seal(directory, step=4, fingerprint="a", spent=Spent())
    manifest = directory / checkpoints.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "a manifest cut short":
        manifest.write_bytes(manifest.read_bytes()[:-10])
    elif damage == "another manifest":
        manifest.write_text("[]")
    else:
        (directory / "ref" / "weights").unlink()
    assert checkpoints.newest_whole(tmp_path, "a") is None


def test_the_older_states_go_once_a_newer_is_sealed(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        checkpoints.seal(filled(tmp_path, step), step=step, fingerprint="a", spent=Spent())
    filled(tmp_path, 11)
    checkpoints.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    checkpoints.discard(tmp_path, but=checkpoints.newest_whole(tmp_path, "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    checkpoints.discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_deletion_that_dies_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.seal(filled(tmp_path, 8), step=8, fingerprint="a", spent=Spent())

    def killed(_path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.discard(tmp_path)
    assert (tmp_path / "checkpoint-8" / "weights").exists()
    assert checkpoints.newest_whole(tmp_path, "a") is None


def test_only_the_main_thread_notes_sigterm() -> None:
    noted: list[bool] = []

    def elsewhere() -> None:
        with sigterm_noted() as termination:
            noted.append(termination.is_requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert (noted, signal.getsignal(signal.SIGTERM)) == ([False], before)
    with sigterm_noted() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.is_requested
    assert signal.getsignal(signal.SIGTERM) == before
