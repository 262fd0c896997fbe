"""`pawl retrain sft | reward | grpo | best`: what comes of them, who is told what, and how they end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_orders import end_rollout
from feedback.tombstones import Subject
from pawl import leases, registry
from pawl.cli.context import current_settings
from pawl.cli.erasing import eraser_of
from pawl.cli.learning import retrain_lease
from pawl.clock import now
from pawl.database import Database
from pawl.registry import ModelState
from pawl.settings import RolloutSettings
from retrain.adapters import verify_adapter
from retrain.sealed_files import verify_files
from tests.pawl.conftest import Cli
from tests.pawl.records import feedback, save, served
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.quick import GRPO, REWARD, SFT
from tests.retrain.tiny_model import TOPICS, make_model

SILENT = "http://127.0.0.1:9"
COMMANDS = ["retrain sft", "retrain reward", "retrain grpo", "retrain best"]
DEMONSTRATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {topic}"},
            {"role": "assistant", "content": f"{topic} is good"},
        ]
    }
    for topic in TOPICS
]
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": f"tell me about {' '.join([topic] * n)}"}],
        "chosen": [{"role": "assistant", "content": f"{topic} is good kind"}],
        "rejected": [{"role": "assistant", "content": f"{topic} is bad rude"}],
    }
    for n in range(1, 13)
    for topic in TOPICS
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(cli: Cli, base: Path, tmp_path: Path) -> Path:  # noqa: ARG001 - `cli` writes the configuration.
    """A directory whose configuration trains the tiny model quickly."""
    tree = yaml.safe_load((tmp_path / "pawl.yaml").read_text())
    tree["engine"] = {"model": str(base), "served_name": "base-model"}
    tree["worker"] = {"scoring": {"toxicity_checkpoint": str(tmp_path / "none")}}
    tree["retrain"] = {
        "adapters_dir": str(tmp_path / "adapters"),
        "runs_dir": str(tmp_path / "runs"),
        "holdout_share": 0.3,
        "sft": SFT.model_dump(mode="json") | {"epochs": 1.0},
        "reward": REWARD.model_dump(mode="json") | {"rewards_dir": str(tmp_path / "rewards")},
        "grpo": GRPO.model_dump(mode="json"),
    }
    (tmp_path / "pawl.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def edit_answers(database: Database, n: int) -> None:
    """As many people as answers, each of whom writes what they would have liked."""
    people = [f"user{number}" for number in range(1, n + 1)]
    answers = [
        served(
            number,
            question=f"tell me about {TOPICS[number % 5]} " + "day " * number,
            completion={"role": "assistant", "content": "bad rude"},
            user_id=user,
            unit_id=user,
        )
        for number, user in enumerate(people, 1)
    ]
    edits = [
        feedback(one.id, "edit", f"{TOPICS[number % 5]} is good kind", user_id=user, created_at=number + 0.5)
        for number, (one, user) in enumerate(zip(answers, people, strict=True), 1)
    ]
    save(database, answers, edits)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    said = cli(*command.split(), "--help")
    assert said.code == 0
    assert f"Usage: pawl {command}" in said.out
    assert "--json" in said.out


@pytest.mark.training
def test_demonstrations_make_a_candidate(cli: Cli, shared: Database, place: Path) -> None:
    file = write_lines(place / "shown.jsonl", DEMONSTRATIONS)
    said = cli("retrain", "sft", "--demonstrations", file, "--json")
    assert said.code == 0, said.err
    told = said.json()
    assert (told["demonstrations"], told["edits"], told["parent"]) == (5, 0, "base-model")
    model = registry.get_model(shared, told["model"])
    assert (model.state, model.parent, model.run_id) == (ModelState.CANDIDATE, "base-model", told["run"])
    assert verify_adapter(Path(told["path"])).manifest["run"] == told["run"]
    assert '"event": "training_step"' in said.err
    child = cli("retrain", "sft", "--demonstrations", file, "--parent", told["model"], "--json")
    assert child.code == 0, child.err
    assert cli("models", "show", child.json()["model"], "--json").json()["lineage"] == [
        child.json()["model"],
        told["model"],
    ]


@pytest.mark.training
def test_all_weights_make_a_base_model_that_nobody_is_served(cli: Cli, shared: Database, place: Path) -> None:
    file = write_lines(place / "shown.jsonl", DEMONSTRATIONS)
    said = cli("retrain", "sft", "--demonstrations", file, "--full", "--json")
    assert said.code == 0, said.err
    assert (Path(said.json()["path"]) / "model.safetensors").exists()
    assert registry.list_models(shared, "assistant") == []
    refused = cli("retrain", "sft", "--demonstrations", file, "--full", "--parent", "base-model")
    assert (refused.code, "no --parent" in refused.err) == (2, True)


@pytest.mark.training
def test_edits_are_learned_and_who_made_one_can_be_erased(cli: Cli, shared: Database, place: Path) -> None:
    edit_answers(shared, 12)
    assert cli("pairs", "mine", "--json").json()["by_source"] == {"edit": 12}
    said = cli("retrain", "sft", "--json")
    assert said.code == 0, said.err
    told = said.json()
    assert told["demonstrations"] == 0
    assert told["edits"] > 3
    run = place / "runs" / told["run"]
    rows = [json.loads(line) for line in (run / "mine" / "new.jsonl").read_text().splitlines()]
    manifest = json.loads((run / "build" / "manifest.json").read_text())
    assert sorted(manifest["pair_ids"]) == sorted(row["id"] for row in rows)

    gone = rows[0]
    user = gone["principals"][0].partition("/")[2]
    at_work = eraser_of(current_settings(), shared, actor="tester")
    grave = at_work.bury(at_work.tombstone(Subject(user), ""))
    report = at_work.erase(grave, Subject(user)).as_json()
    assert report["runs"] == {told["run"]: 1}
    assert gone["id"] not in (run / "mine" / "new.jsonl").read_text()
    assert json.loads((run / "build" / "manifest.json").read_text())["erased"]["pair_ids"] == [gone["id"]]
    assert registry.get_model(shared, told["model"]).manifest["erased"]["pairs"] == 1


@pytest.mark.training
def test_a_reward_model_is_trained_measured_and_then_used(
    cli: Cli, shared: Database, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = cli("retrain", "reward", "--data", write_lines(place / "data.jsonl", PREFERENCES), "--json")
    assert said.code == 0, said.err
    told = said.json()
    assert told["holdout"]["beats_chance"]
    assert told["holdout"]["n"] > 5
    manifest = verify_files(Path(told["path"]), "reward")
    assert (manifest["run"], manifest["name"]) == (told["run"], told["model"])
    assert registry.list_models(shared, "assistant") == []

    monkeypatch.setenv("PAWL_RETRAIN__REWARD__MODEL", told["path"])
    prompts = write_lines(place / "prompts.jsonl", ["what is tea", "what is rain"])
    better = cli("retrain", "grpo", "--prompts", prompts, "--json")
    assert better.code == 0, better.err
    assert (better.json()["reward"], better.json()["generation"]) == (told["model"], "transformers")

    turns = itertools.count()

    def kind_at_times(_model: str, _prompt: str) -> str:
        return "tea is " + ("bad rude", "good kind")[next(turns) % 2]

    with serving(FakeEngine(base="base-model", answer=kind_at_times)) as engine:
        config = place / "pawl.yaml"
        config.write_text(config.read_text().replace(SILENT, engine.url))
        best = cli(
            "retrain", "best", "--prompts", prompts, "--n", "4", "--out", "out.jsonl", "--pairs", "p.jsonl", "--json"
        )
    assert best.code == 0, best.err
    assert best.json()["mean_best"] > best.json()["mean"]
    ranked = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in ranked] == ["what is tea", "what is rain"]
    pairs = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"] for row in pairs] == ["tea is good kind"] * best.json()["pairs"] != []


@pytest.mark.training
def test_a_reward_model_that_cannot_be_measured_is_not_used(cli: Cli, shared: Database, place: Path) -> None:
    assert registry.list_models(shared, "assistant") == []
    same = [PREFERENCES[0] | {"pair_id": str(number)} for number in range(3)]
    said = cli("retrain", "reward", "--data", write_lines(place / "data.jsonl", same), "--json")
    told = said.json()
    n_held = told["holdout"]["n"]
    assert said.code == 1
    assert f"no better than a coin on {n_held} pairs" in said.err
    prompts = write_lines(place / "prompts.jsonl", ["what is tea"])
    refused = cli("retrain", "grpo", "--prompts", prompts, "--reward", told["path"])
    assert (refused.code, "--force overrides this" in refused.err) == (1, True)


@pytest.mark.training
def test_a_function_of_ones_own_rewards_and_what_comes_out_can_be_promoted(
    cli: Cli, shared: Database, place: Path
) -> None:
    (place / "my_reward.py").write_text(
        "def short(conversations):\n    return [-len(one[-1]['content']) for one in conversations]\n"
    )
    prompts = write_lines(place / "prompts.jsonl", ["what is tea", "what is rain"])
    said = cli("retrain", "grpo", "--prompts", prompts, "--reward-function", "my_reward:short", "--json")
    assert said.code == 0, said.err
    name = said.json()["model"]
    assert said.json()["reward"] == "my_reward:short"
    assert registry.get_model(shared, name).state == ModelState.CANDIDATE

    epoch = leases.epoch_of(shared, "rollout/assistant")
    route = Route("assistant", 0, "base-model")
    begun = start_rollout(shared, RolloutSettings(), route, name, now=1.0, epoch=epoch, actor="tester")
    registry.set_state(shared, name, ModelState.CHALLENGER, now=2.0)
    end_rollout(shared, replace(begun, state=replace(begun.state, status="promoted")), now=3.0)
    champion = registry.promoted(shared, "assistant")
    assert champion is not None
    assert champion.name == name


@pytest.mark.training
def test_a_candidate_that_learned_nothing_is_none(
    cli: Cli, shared: Database, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(place / "shown.jsonl", DEMONSTRATIONS)
    parent = cli("retrain", "sft", "--demonstrations", file, "--json").json()["model"]
    monkeypatch.setenv("PAWL_RETRAIN__SFT__LEARNING_RATE", "1e-40")
    said = cli("retrain", "sft", "--demonstrations", file, "--parent", parent)
    assert (said.code, f"the weights are those of {parent}" in said.err) == (1, True), said.err
    assert [model.name for model in registry.list_models(shared, "assistant")] == [parent]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["sft"], 1, "nothing to train on"),
        (["sft", "--demonstrations", "none.jsonl"], 2, "none.jsonl"),
        (["sft", "--demonstrations", "bad.jsonl"], 1, "line 1"),
        (["sft", "--demonstrations", "pawl.yaml", "--parent", "nobody"], 1, "line 1"),
        (["sft", "--parent", "nobody"], 1, "no model is registered as nobody"),
        (["reward"], 1, "no pair to learn from"),
        (["grpo", "--prompts", "prompts.json"], 2, "nothing to score with"),
        (
            ["grpo", "--prompts", "prompts.json", "--reward-function", "no_such:one"],
            2,
            "no reward function no_such:one",
        ),
        (["grpo", "--prompts", "prompts.json", "--reward-function", "a:b", "--reward", "c"], 2, "either --reward or"),
        (["grpo", "--prompts", "prompts.json", "--reward", "runs"], 1, "cannot read"),
        (["grpo", "--reward-function", "os:getcwd"], 1, "there is no prompt"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    cli: Cli, place: Path, arguments: list[str], code: int, why: str
) -> None:
    (place / "bad.jsonl").write_text("{}\n")
    (place / "prompts.json").write_text('["what is tea"]')
    said = cli("retrain", *arguments)
    complaint = [line for line in said.err.splitlines() if line.startswith("pawl:")]
    assert (said.code, len(complaint)) == (code, 1), said.err
    assert why in complaint[0]
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("place")
def test_one_training_at_a_time_works_on_an_alias(cli: Cli, shared: Database) -> None:
    assert leases.acquire(shared, retrain_lease("assistant"), "another", ttl_s=600.0, now=now()) is not None
    said = cli("retrain", "sft")
    assert said.code == 1
    assert "another" in said.err
