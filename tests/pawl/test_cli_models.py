"""`pawl models`: what is told of versions, and what is done to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pawl import registry
from pawl.audit import latest_events
from pawl.clock import now
from pawl.database import Database
from pawl.registry import Model, ModelState
from tests.pawl.conftest import Cli
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter

SILENT = "http://127.0.0.1:9"
LONG_AGO = 1.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    """Behind the alias of `cli`'s configuration."""
    with serving(FakeEngine(base="base-model")) as fake:
        config = tmp_path / "pawl.yaml"
        config.write_text(config.read_text().replace(SILENT, fake.url))
        yield fake


def add(
    database: Database, tmp_path: Path, number: int, state: ModelState, *, at: float = LONG_AGO, parent: str = "base"
) -> str:
    name = f"base-model--r{number:04d}-aaaaaaaa"
    path = str(place_adapter(tmp_path / "adapters", name, seed=float(number)))
    model = Model(name, "assistant", "base-model", parent, None, path, None, None, state, {"rank": 8}, at, at)
    registry.register_model(database, model)
    return name


def test_versions_are_listed_by_their_state(cli: Cli, shared: Database, tmp_path: Path) -> None:
    champion = add(shared, tmp_path, 1, ModelState.CHAMPION)
    retired = add(shared, tmp_path, 2, ModelState.RETIRED)
    assert [row["name"] for row in cli("models", "list", "--state", "retired", "--json").json()] == [retired]
    assert champion in cli("models", "list", "--model", "assistant").out
    for wrong in (("--state", "gone"), ("--model", "nobody")):
        said = cli("models", "list", *wrong)
        assert (said.code, said.out) == (2, "")


def test_a_version_is_shown_with_everything_that_was_done_to_it(cli: Cli, shared: Database, tmp_path: Path) -> None:
    name = add(shared, tmp_path, 1, ModelState.CANDIDATE)
    assert cli("models", "retire", name, "--json").json()["state"] == "retired"
    shown = cli("models", "show", name, "--json").json()
    assert [event["action"] for event in shown["history"]] == ["model.register", "model.retire"]
    assert shown["history"][1]["actor"].startswith("operator:")
    assert "model.retire" in cli("models", "show", name).out


def test_promoting_tells_the_rollout(cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine) -> None:
    name = add(shared, tmp_path, 1, ModelState.CANDIDATE)
    told = cli("models", "promote", name, "--json").json()
    assert told["candidate"] == name
    assert told["rollout"].startswith("ro_")
    assert list(engine.adapters) == [name]


def test_what_is_served_is_verified_and_changed_by_nothing(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine
) -> None:
    name = add(shared, tmp_path, 1, ModelState.CHAMPION)
    said = cli("models", "verify", "--json")
    assert said.code == 1
    assert [(found["place"], found["is_right"]) for found in said.json()] == [("files", True), (engine.url, False)]
    assert "served from nowhere" in said.json()[1]["reason"]
    assert engine.loads == []
    engine.adapters[name] = str(tmp_path / "adapters" / name)
    assert cli("models", "verify").code == 0
    assert cli("models", "verify", name, "--json").code == 0
    (tmp_path / "adapters" / name / "adapter_model.bin").write_bytes(b"\x80")
    said = cli("models", "verify", name)
    assert (said.code, "is a pickle" in said.out) == (1, True)
    assert said.err == "pawl: 1 of 2 are not as they should be\n"


def test_only_files_that_nothing_needs_are_deleted(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine
) -> None:
    parent = add(shared, tmp_path, 1, ModelState.RETIRED)
    kept = [
        parent,
        add(shared, tmp_path, 2, ModelState.CHAMPION, parent=parent),
        add(shared, tmp_path, 3, ModelState.CANDIDATE),
        add(shared, tmp_path, 4, ModelState.RETIRED, at=now()),
        add(shared, tmp_path, 5, ModelState.REJECTED),
    ]
    engine.adapters["under-another-name"] = str(tmp_path / "adapters" / kept[4])
    unused = [add(shared, tmp_path, number, ModelState.RETIRED) for number in (6, 7)]
    assert {row["name"] for row in cli("models", "prune", "--dry-run", "--json").json()} == set(unused)
    assert len(list((tmp_path / "adapters").iterdir())) == 7
    assert cli("models", "prune").code == 0
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == set(kept)
    assert latest_events(shared, subject=unused[0])[0].action == "model.delete_files"
    assert cli("models", "prune").out == "none\n"
    said = cli("models", "promote", unused[0])
    assert (said.code, "have been deleted" in said.err) == (1, True)


def test_while_an_engine_is_away_no_files_are_deleted(cli: Cli, shared: Database, tmp_path: Path) -> None:
    name = add(shared, tmp_path, 1, ModelState.RETIRED)
    said = cli("models", "prune")
    assert (said.code, SILENT in said.err) == (3, True)
    assert (tmp_path / "adapters" / name).is_dir()


def test_a_version_s_files_are_copied_once_they_have_been_looked_through(
    cli: Cli, shared: Database, tmp_path: Path
) -> None:
    name = add(shared, tmp_path, 1, ModelState.CANDIDATE)
    told = cli("models", "export", name, "--to", str(tmp_path / "out"), "--json").json()
    assert sorted(path.name for path in Path(told["path"]).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip
    assert cli("models", "export", name, "--to", str(tmp_path / "out")).code == 2
    assert cli("models", "export", name, "--to", "http://127.0.0.1:9").code == 3
    (tmp_path / "adapters" / name / "tokenizer.json").write_text("{}")
    said = cli("models", "export", name, "--to", str(tmp_path / "elsewhere"))
    assert (said.code, "tokenizer or chat template" in said.err) == (1, True)
