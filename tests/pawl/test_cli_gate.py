"""`pawl gate`: what was measured, judged by today's settings; a page beside the run; both models asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from pawl import leases, registry
from pawl.adapter_files import Adapter
from pawl.cli import learning
from pawl.cli.adapter_keeper import AdapterKeeper
from pawl.clock import now
from pawl.database import Database
from pawl.registry import Model, ModelState, RunStatus
from pawl.settings import RolloutSettings, Settings
from retrain.gate import judge, report_as_dict
from retrain.measurements import Measurements, to_json
from tests.gateway_configuration import settings_of
from tests.pawl.conftest import Cli
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import sealed_adapter
from tests.retrain.test_gate import GOOD, SETTINGS, rates

SILENT = "http://127.0.0.1:9"


def add_run(database: Database, measurements: Measurements | None) -> str:
    """A run that came as far as the gate, with what it recorded."""
    run = registry.create_run(database, "assistant", "2026-W01", epoch=1, now=1.0)
    detail = {} if measurements is None else {"gate": dict(report_as_dict(judge(measurements, SETTINGS)))}
    registry.update_run(database, run, now=2.0, step="gate", status=RunStatus.PASSED, detail=detail)
    return run.id


def add_files(directory: Path, run: str, measurements: Measurements) -> Path:
    evaluated = directory / "var" / "runs" / run / "evaluate"
    evaluated.mkdir(parents=True)
    (evaluated / "measurements.json").write_text(to_json(measurements))
    return evaluated.parent


def test_a_run_that_passed_is_judged_again_and_has_a_page(cli: Cli, shared: Database, tmp_path: Path) -> None:
    run = add_run(shared, GOOD)
    directory = add_files(tmp_path, run, GOOD)
    said = cli("gate", run)
    assert (said.code, said.err) == (0, "")
    first, *checks, page = said.out.splitlines()
    assert first == "pass"
    assert {line.split()[0] for line in checks} == {"pass"}
    assert page == f"report: {directory / 'gate.html'}"
    assert "The gate says" in (directory / "gate.html").read_text()


def test_today_s_settings_decide_and_what_was_recorded_is_said(
    cli: Cli, shared: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = add_run(shared, GOOD)
    add_files(tmp_path, run, GOOD)
    monkeypatch.setenv("PAWL_RETRAIN__GATE__KL_PARENT_LIMIT", "0.001")
    said = cli("gate", run)
    assert said.code == 1
    assert said.out.splitlines()[0] == "fail"
    assert "recorded when the round was run: pass" in said.out
    assert "the gate says fail" in said.err
    told = cli("gate", run, "--json").json()
    assert (told["verdict"], told["recorded_verdict"]) == ("fail", "pass")
    assert {check["name"] for check in told["checks"] if check["verdict"] == "fail"} == {"kl_parent"}


def test_without_the_run_s_directory_what_was_recorded_is_shown(cli: Cli, shared: Database) -> None:
    run = add_run(shared, replace(GOOD, toxicity=rates(300, 10, 200)))
    said = cli("gate", run)
    assert said.code == 1
    assert said.out.splitlines()[0] == "fail"
    assert "report:" not in said.out


@pytest.mark.parametrize("options", [(), ("--evaluate",), ("--json",)])
def test_a_run_that_has_trained_nothing_has_no_verdict(cli: Cli, shared: Database, options: tuple[str, ...]) -> None:
    said = cli("gate", add_run(shared, None), *options)
    assert (said.code, said.out) == (1, "")
    assert len(said.err.splitlines()) == 1


def test_a_veto_that_cannot_tell_is_marked(cli: Cli, shared: Database, tmp_path: Path) -> None:
    measured = replace(GOOD, by_source={"edit": rates(5, 3, 2)})
    run = add_run(shared, measured)
    add_files(tmp_path, run, measured)
    said = cli("gate", run)
    assert said.code == 0
    assert [line.endswith("(a veto only)") for line in said.out.splitlines() if "by edit" in line] == [True]


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FakeEngine]:
    request.getfixturevalue("cli")  # It writes the configuration that this changes.
    with serving(FakeEngine(base="base-model")) as served:
        config = tmp_path / "pawl.yaml"
        probes = "".join(f"  {kind}_probes: {tmp_path}/{kind}.json\n" for kind in ("harmful", "benign"))
        more = f"engine: {{model: base-model}}\nretrain:\n{probes}"
        config.write_text(config.read_text().replace(SILENT, served.url) + more)
        for kind in ("harmful", "benign"):
            (tmp_path / f"{kind}.json").write_text(json.dumps([f"{kind} request {n}" for n in range(5)]))
        yield served


def add_candidate(directory: Path, tmp_path: Path) -> Adapter:
    """What a run has trained."""
    adapter = sealed_adapter(tmp_path / "adapters", base="base-model")
    for step, manifest in (
        ("mine", {"parent": "base-model", "parent_path": None}),
        ("train", {"model": adapter.name, "path": str(adapter.path)}),
    ):
        (directory / step).mkdir()
        (directory / step / "manifest.json").write_text(json.dumps(manifest))
    return adapter


def test_what_the_engine_serves_otherwise_is_taken_out_again(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine
) -> None:
    run = add_run(shared, GOOD)
    adapter = add_candidate(add_files(tmp_path, run, GOOD), tmp_path)
    engine.ignores_weights = True
    assert cli("gate", run, "--evaluate").code == 1
    assert engine.loads == engine.unloads == [adapter.name]


def register(database: Database, adapter: Adapter, state: ModelState) -> None:
    at = 1.0
    model = Model(adapter.name, "assistant", "base-model", None, None, str(adapter.path), None, None, state, {}, at, at)
    registry.register_model(database, model)


def test_a_candidate_that_goes_out_while_it_is_evaluated_stays_loaded(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = add_run(shared, GOOD)
    adapter = add_candidate(add_files(tmp_path, run, GOOD), tmp_path)
    register(shared, adapter, ModelState.CANDIDATE)

    def meanwhile(_settings: Settings) -> None:
        start_rollout(shared, RolloutSettings(), Route("assistant", 0, "base-model"), adapter.name, now=2.0, epoch=0)

    monkeypatch.setattr(learning, "toxicity_scorer", meanwhile)
    assert cli("gate", run, "--evaluate", "--json").code == 1
    assert (engine.loads, engine.unloads) == ([adapter.name], [])


def test_nobody_takes_a_retired_candidate_out_while_it_is_evaluated(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the worker, to which it has rested long enough, nor another evaluation at its own end."""
    run = add_run(shared, GOOD)
    adapter = add_candidate(add_files(tmp_path, run, GOOD), tmp_path)
    register(shared, adapter, ModelState.RETIRED)
    settings = settings_of(tmp_path, engine.url)
    seen: list[dict[str, str]] = []

    def meanwhile(_settings: Settings) -> None:
        keeper = AdapterKeeper(settings, shared, "worker", now)
        assert keeper.desired("assistant").unwanted == {adapter.name}
        keeper.keep({"assistant": keeper.desired("assistant")})
        seen.append(dict(engine.adapters))
        if len(seen) == 1:
            assert "another process holds" in cli("gate", run, "--evaluate").err
            seen.append(dict(engine.adapters))

    monkeypatch.setattr(leases, "this_process", iter(["first", "second"]).__next__)
    monkeypatch.setattr(learning, "toxicity_scorer", meanwhile)
    assert cli("gate", run, "--evaluate", "--json").code == 1
    assert seen == [{adapter.name: str(adapter.path)}] * 2
    assert engine.unloads == [adapter.name]


def test_both_models_are_asked_again(
    cli: Cli, shared: Database, tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate, which a rejected round has taken out of the engine, is loaded for it and taken out again."""
    monkeypatch.setattr(learning, "toxicity_scorer", lambda _settings: None)
    run = add_run(shared, GOOD)
    adapter = add_candidate(add_files(tmp_path, run, GOOD), tmp_path)
    told = cli("gate", run, "--evaluate", "--json")
    assert told.code == 1
    found = {check["name"]: check for check in told.json()["checks"]}
    assert found["harmful_refusal"]["n_prompts"] == 5
    assert found["kl_base"]["n_prompts"] == 5
    assert "was not measured" in found["toxicity"]["reason"]
    assert engine.loads == engine.unloads == [adapter.name]
    assert {body["model"] for body in engine.bodies} == {"base-model", adapter.name}
