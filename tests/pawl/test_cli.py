"""The command line: what a person and a script may rely on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_orders import controller_of
from ab_testing.route_store import load_route
from pawl import leases, registry
from pawl.audit import latest_events
from pawl.cli import main
from pawl.cli.context import print_rows
from pawl.cli.due_rounds import decide_now
from pawl.cli.learning import canary_opener
from pawl.cli.main import config_first, run
from pawl.clock import now
from pawl.database import Database, open_database
from pawl.registry import Model, ModelState, RunStatus
from pawl.schema import decisions
from pawl.settings import Settings, load_settings
from retrain.errors import CanaryTaken
from serving.gateway import create_app
from serving.stack import write_config
from tests.fake_vllm import FakeVLLM
from tests.pawl.conftest import Cli, newest_revision
from tests.pawl.records import interaction_id, save, served, thumb
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter
from tests.servers import free_port, running

ROOT = Path(__file__).parents[2]
SILENT = "http://127.0.0.1:9"
CANDIDATE = "base-model--r0001-1a2b3c4d"
COMMANDS = [
    "up", "serve", "worker", "engine", "doctor", "demo", "gate", "assignments", "db", "db upgrade", "db check",
    "pairs", "pairs mine", "pairs list", "pairs show", "pairs export",
    "retrain", "retrain run", "retrain status", "retrain list", "retrain explain",
    "models", "models list", "models show", "models promote", "models retire", "models verify",
    "models export", "models prune",
    "rollout", "rollout start", "rollout status", "rollout advance", "rollout hold", "rollout resume",
    "rollout approve", "rollout rollback", "rollout explain", "rollout replay",
    "rollout shadow", "rollout shadow start", "rollout shadow stop", "rollout shadow report",
    "webhooks", "webhooks test", "webhooks list", "webhooks retry",
    "experiment", "experiment start", "experiment stop", "experiment weigh",
    "experiment report", "experiment plan", "erase",
]  # fmt: skip
READING = [
    "db check", "pairs mine", "pairs list", "retrain status", "retrain list", "models list", "rollout status",
    "assignments ann", "webhooks list", "experiment plan --users-per-hour 10",
]  # fmt: skip


def register(
    database: Database,
    name: str = CANDIDATE,
    alias: str = "assistant",
    state: ModelState = ModelState.CANDIDATE,
) -> None:
    """With its files beside the database."""
    path = str(place_adapter(Path(str(database.engine.url.database)).parent / "adapters", name))
    model = Model(name, alias, "base-model", None, "r0001", path, None, None, state, {"rank": 8}, 1.0, 1.0)
    registry.register_model(database, model)


def add_run(database: Database, verdict: str = "fail") -> str:
    checks = [{"name": "toxicity", "verdict": verdict, "reason": "0.10 against 0.01"}]
    gate = {"verdict": verdict, "checks": checks}
    detail = {"gate": gate, "n_pairs": 12, "new_pair_ids": ["p1", "p2"], "reason": "too many toxic answers"}
    run = registry.create_run(database, "assistant", "2026-W01", epoch=1, now=1.0)
    registry.update_run(database, run, now=2.0, step="gate", status=RunStatus.FAILED, detail=detail)
    return run.id


def add_feedback(database: Database) -> None:
    save(database, [served(1), served(2), served(3, question="?")], [thumb(1, "up"), thumb(2, "down"), thumb(3, "up")])


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[FakeEngine]:
    """An engine that loads adapters, behind the alias of `cli`'s configuration."""
    with serving(FakeEngine(base="base-model")) as engine:
        config = tmp_path / "pawl.yaml"
        config.write_text(config.read_text().replace(SILENT, engine.url))
        yield engine


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    said = cli(*command.split(), "--help")
    assert said.code == 0
    assert "Usage: pawl" in said.out
    assert said.err == ""


@pytest.mark.parametrize("command", READING)
def test_reading_commands_speak_json(cli: Cli, shared: Database, command: str) -> None:
    add_feedback(shared)
    register(shared)
    said = cli(*command.split(), "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json() is not None


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        ("frobnicate", 2, "frobnicate"),
        ("pairs export", 2, "--out"),
        ("pairs export --out x --format csv", 2, "trl"),
        ("pairs list --limit none", 2, "--limit"),
        ("--config nowhere.yaml db check", 2, "nowhere.yaml"),
        ("pairs mine --model nobody", 2, "nobody"),
        ("assignments ann --model nobody", 2, "nobody"),
        ("engine --dry-run", 2, "--model"),
        ("pairs show 0123", 1, "0123"),
        ("retrain explain r0404", 1, "r0404"),
        ("gate r0404", 1, "r0404"),
        ("models show nobody", 1, "nobody"),
        ("models retire nobody", 1, "nobody"),
        ("rollout start nobody", 1, "nobody"),
        ("rollout explain ro_404", 1, "ro_404"),
        ("rollout explain", 1, "no rollout"),
        ("rollout hold", 1, "assistant has no running rollout"),
        ("pairs export --out nowhere/pairs.jsonl", 2, "nowhere/pairs.jsonl"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(cli: Cli, shared: Database, command: str, code: int, text: str) -> None:
    assert shared.is_sqlite
    said = cli(*command.split())
    assert said.code == code
    (line,) = said.err.splitlines()
    assert line.startswith("pawl: ")
    assert text in line
    assert said.out == ""


def pawl(directory: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A real process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PAWL_")}
    command = [sys.executable, "-m", "pawl.cli.main", *arguments]
    env = {**kept, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=120)


def test_exit_codes_of_real_processes(tmp_path: Path) -> None:
    unreachable = f"postgresql://pawl:hunter2@127.0.0.1:{free_port()}/pawl"
    unknown = pawl(tmp_path, "pairs", "list", PAWL_SERVING__PROT="1")
    without_schema = pawl(tmp_path, "pairs", "list")
    silent = pawl(tmp_path, "pairs", "list", PAWL_DATABASE__URL=unreachable, PAWL_DATABASE__CONNECT_TIMEOUT_S="1")
    done = pawl(tmp_path, "db", "upgrade")
    assert [process.returncode for process in (unknown, without_schema, silent, done)] == [2, 2, 3, 0]
    assert "serving.prot: unknown key" in unknown.stderr
    assert "pawl db upgrade" in without_schema.stderr
    assert "127.0.0.1" in silent.stderr
    assert "hunter2" not in silent.stderr
    for process in (unknown, without_schema, silent):
        assert process.stdout == ""
        assert process.stderr.startswith("pawl: ")
        assert process.stderr.count("\n") == 1


def test_the_configuration_may_be_named_anywhere() -> None:
    assert config_first(["pairs", "list", "--config=a.yaml", "--json"]) == [
        "--config=a.yaml",
        "pairs",
        "list",
        "--json",
    ]
    assert config_first(["pairs", "--config", "a.yaml"]) == ["--config", "a.yaml", "pairs"]
    assert config_first(["pairs", "--config"]) == ["pairs", "--config"]


def test_a_dry_run_prints_the_engines_command(cli: Cli) -> None:
    said = cli("engine", "--model", "my model", "--dry-run")
    assert said.code == 0
    assert "vllm.entrypoints.openai.api_server --model 'my model'" in said.out
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " in said.out


def test_the_database_is_upgraded_and_checked(cli: Cli) -> None:
    assert cli("db", "check").code == 2
    assert cli("db", "upgrade").out == f"schema at {newest_revision()}\n"
    assert cli("db", "upgrade").code == 0
    assert cli("db", "check", "--json").json()["schema"] == "current"


def test_the_doctor_says_what_is_wrong_and_what_to_do(cli: Cli) -> None:
    said = cli("doctor", "--json")
    assert said.code == 1
    findings: dict[str, dict[str, str]] = {finding["what"]: finding for finding in said.json()}
    assert findings["database"]["state"] == "problem"
    assert "pawl db upgrade" in findings["database"]["todo"]
    assert findings["engine of assistant"]["found"] == f"{SILENT} does not answer"
    assert "needs attention: database, engine of assistant" in said.err
    cli("db", "upgrade")
    assert "needs attention: engine of assistant\n" in cli("doctor").err


def test_a_table_shows_its_cells_whole_and_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "long-" * 60
    print_rows([{"what": "pip install pawl[train]", "name": name}], as_json=False, columns=("what", "name"))
    out = capsys.readouterr().out
    assert "pip install pawl[train]" in out
    assert name in out


def test_pairs_from_mining_to_a_file(cli: Cli, shared: Database, tmp_path: Path) -> None:
    add_feedback(shared)
    assert cli("pairs", "list").out == "none\n"
    mined = cli("pairs", "mine", "--json").json()
    assert (mined["pairs"], mined["added"], mined["skipped"]) == (1, 1, {"unpaired": 1})
    assert (mined["filtered"]["kept"], mined["filtered"]["dropped"]) == (1, {})
    (listed,) = cli("pairs", "list", "--json").json()
    shown = cli("pairs", "show", listed["id"], "--json").json()
    assert shown["chosen_from"]["completion_id"] == f"chatcmpl-{interaction_id(1)}"
    assert "answer 1" in cli("pairs", "show", listed["id"]).out
    for layout, n_rows in (("trl", 1), ("openai", 1), ("kto", 3)):
        out = tmp_path / f"{layout}.jsonl"
        assert cli("pairs", "export", "--format", layout, "--out", str(out)).out == f"{n_rows} rows in {out}\n"
        assert len([json.loads(line) for line in out.read_text().splitlines()]) == n_rows


def test_what_a_model_wrote_cannot_move_the_terminal(cli: Cli, shared: Database) -> None:
    nasty = served(1, completion={"role": "assistant", "content": "\x1b[2Jcleared\nnext"})
    save(shared, [nasty, served(2)], [thumb(1, "up"), thumb(2, "down")])
    cli("pairs", "mine")
    (listed,) = cli("pairs", "list", "--json").json()
    assert "\x1b" not in cli("pairs", "show", listed["id"]).out


def test_a_rollout_by_hand(cli: Cli, shared: Database, adapters: FakeEngine, tmp_path: Path) -> None:
    register(shared)
    rollout_id = cli("rollout", "start", CANDIDATE).out.strip()
    assert adapters.adapters == {CANDIDATE: str(tmp_path / "adapters" / CANDIDATE)}
    assert registry.get_model(shared, CANDIDATE).state == ModelState.CHALLENGER
    (row,) = cli("rollout", "status", "--json").json()
    assert (row["id"], row["weight"], row["status"]) == (rollout_id, 0.01, "ramp")
    again = cli("rollout", "start", CANDIDATE)
    assert (again.code, rollout_id in again.err) == (1, True)
    for order, told in (
        (("hold", "--reason", "lunch"), "hold, weight 0.01"),
        (("resume",), "ramp, weight 0.01"),
        (("advance",), "ramp, weight 0.1"),
        (("rollback", "--reason", "no\udcff"), "rolled_back, weight 0"),
    ):
        assert cli("rollout", *order).out == f"{rollout_id}: {told}\n"
    assert registry.get_model(shared, CANDIDATE).state == ModelState.RETIRED
    assert cli("rollout", "rollback").code == 1
    lines = cli("rollout", "explain").out.splitlines()
    assert lines[0] == f"{rollout_id}: {CANDIDATE} against base-model: rolled_back"
    assert [line.split()[2:4] for line in lines[1:]] == [
        ["hold", "1%"],
        ["resume", "1%"],
        ["advance", "10%"],
        ["roll_back", "0%"],
    ]
    assert "lunch [operator:" in lines[1]
    replayed = cli("rollout", "replay")
    assert replayed.code == 0
    assert [line.split()[0] for line in replayed.out.splitlines()] == ["same"] * 4
    again = cli("rollout", "replay", rollout_id, "--json").json()
    assert (again["ends_alike"], [one["differences"] for one in again["decisions"]]) == (True, [[]] * 4)
    with shared.write() as connection:
        connection.execute(decisions.update().values(config_hash="of an older version"))
    foreign = cli("rollout", "replay")
    assert (foreign.code, "4 of 4 decisions are of another version of the statistics" in foreign.err) == (1, True)
    explained = cli("rollout", "explain", rollout_id, "--json").json()
    assert [decision["verdict"] for decision in explained["decisions"]] == ["hold", "resume", "advance", "roll_back"]
    noted = latest_events(shared, subject=rollout_id)[::-1]
    assert [event.action.removeprefix("rollout.") for event in noted] == [
        "start", "hold", "resume", "advance", "roll_back",
    ]  # fmt: skip
    assert all(event.actor.startswith("operator:") for event in noted)


def test_a_plan_is_printed_and_nothing_is_started(cli: Cli, shared: Database) -> None:
    register(shared)
    lines = cli("rollout", "start", CANDIDATE, "--dry-run").out.splitlines()
    assert lines[0] == f"{CANDIDATE} as a canary of assistant; nothing is started:"
    assert lines[1] == "  steps: 1%, 10%, 50% of all traffic, then everybody"
    assert any("primary thumbs_down: margin 5%, 40% of the rollback evidence" in line for line in lines)
    assert "no traffic" in lines[-1]
    plan = cli("rollout", "start", CANDIDATE, "--dry-run", "--json").json()
    assert (plan["candidate"], plan["config"]["watch_s"], plan["canary"]) == (CANDIDATE, 3600.0, None)
    assert cli("rollout", "status", "--json").json() == []
    assert cli("rollout", "start", "nobody", "--dry-run").code == 1


def test_a_promotion_by_hand_is_watched_and_may_be_taken_back(cli: Cli, shared: Database, adapters: FakeEngine) -> None:
    register(shared)
    rollout_id = cli("rollout", "start", CANDIDATE).out.strip()
    assert CANDIDATE in adapters.adapters
    refused = cli("rollout", "approve")
    assert (refused.code, "does not wait for approval" in refused.err) == (1, True)
    for _ in range(3):
        assert cli("rollout", "advance").code == 0
    (row,) = cli("rollout", "status", "--json").json()
    assert (row["status"], row["watched_until"] > row["updated_at"]) == ("promoted", True)
    assert cli("rollout", "hold").code == 1
    assert cli("rollout", "rollback", "--reason", "complaints").out == f"{rollout_id}: rolled_back, weight 0\n"
    assert registry.get_model(shared, CANDIDATE).state == ModelState.RETIRED
    assert cli("rollout", "replay").code == 0
    assert cli("rollout", "rollback").code == 1


@pytest.mark.usefixtures("cli", "adapters")
def test_another_rollout_may_follow_one_that_a_worker_ended(cli: Cli, shared: Database) -> None:
    register(shared)
    register(shared, "base-model--r0002-ffffffff")
    cli("rollout", "start", CANDIDATE)
    epoch = leases.acquire(shared, "rollout/assistant", "worker", ttl_s=60.0, now=1.0)
    assert epoch == 1
    controller = controller_of(shared, lambda: 9e9)
    controller.act("assistant", "roll_back", "bad", actor="controller", epoch=epoch)
    assert cli("models", "promote", "base-model--r0002-ffffffff").code == 0


def test_nothing_is_routed_that_the_engines_do_not_serve(cli: Cli, shared: Database, adapters: FakeEngine) -> None:
    register(shared)
    adapters.ignores_weights = True
    unproven = cli("rollout", "start", CANDIDATE)
    assert (unproven.code, "weights are not in effect" in unproven.err) == (1, True)
    assert load_route(shared, "assistant") is None
    assert registry.get_model(shared, CANDIDATE).state == ModelState.CANDIDATE


def test_a_canary_needs_engines_that_answer(cli: Cli, shared: Database) -> None:
    register(shared)
    said = cli("models", "promote", CANDIDATE)
    assert (said.code, SILENT in said.err) == (3, True)
    assert load_route(shared, "assistant") is None


@pytest.mark.parametrize("command", [("models", "promote"), ("rollout", "start")])
def test_what_the_gate_rejected_needs_force(
    cli: Cli, shared: Database, adapters: FakeEngine, command: tuple[str, ...]
) -> None:
    add_run(shared)
    register(shared, state=ModelState.REJECTED)
    refused = cli(*command, CANDIDATE)
    assert refused.code == 1
    assert "was rejected: too many toxic answers; --force overrides this" in refused.err
    assert adapters.loads == []
    assert cli(*command, CANDIDATE, "--force").code == 0
    assert registry.get_model(shared, CANDIDATE).state == ModelState.CHALLENGER


def test_a_round_finds_the_canary_it_opened_before_it_was_killed(
    cli: Cli, shared: Database, adapters: FakeEngine, tmp_path: Path
) -> None:
    register(shared)
    register(shared, "base-model--r0002-ffffffff")
    open_canary = canary_opener(shared, load_settings(tmp_path / "pawl.yaml", {}), "assistant")
    assert open_canary is not None
    opened = open_canary(CANDIDATE)
    assert open_canary(CANDIDATE) == opened
    with pytest.raises(CanaryTaken, match=str(opened)):
        open_canary("base-model--r0002-ffffffff")
    assert cli("rollout", "rollback").code == 0
    assert open_canary(CANDIDATE) == opened
    assert registry.get_model(shared, CANDIDATE).state == ModelState.RETIRED
    assert adapters.loads == [CANDIDATE]


def test_a_version_of_another_alias_is_no_candidate(cli: Cli, shared: Database) -> None:
    register(shared, "helper--r0001", alias="helper")
    for command in (("rollout", "start"), ("models", "promote")):
        said = cli(*command, "helper--r0001")
        assert said.code == 2
        assert "helper" in said.err


def test_steps_that_cannot_be_are_a_matter_of_configuration(
    cli: Cli, shared: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(shared)
    monkeypatch.setenv("PAWL_ROLLOUT__STEPS", "[0.1, 0.9]")
    said = cli("rollout", "start", CANDIDATE)
    assert (said.code, "rollout: steps" in said.err) == (2, True)
    assert load_route(shared, "assistant") is None


@pytest.mark.usefixtures("cli", "adapters")
def test_models_are_listed_shown_and_retired(cli: Cli, shared: Database) -> None:
    register(shared)
    (listed,) = cli("models", "list", "--json").json()
    assert (listed["name"], listed["state"]) == (CANDIDATE, "candidate")
    shown = cli("models", "show", CANDIDATE, "--json").json()
    assert (shown["lineage"], shown["manifest"]) == ([CANDIDATE], {"rank": 8})
    assert cli("models", "promote", CANDIDATE).code == 0
    refused = cli("models", "retire", CANDIDATE)
    assert (refused.code, "in service" in refused.err) == (1, True)
    cli("rollout", "rollback")
    assert cli("models", "retire", CANDIDATE).out == f"{CANDIDATE} retired\n"
    assert [event.action for event in latest_events(shared, subject=CANDIDATE)] == [
        "model.retire", "model.challenge", "model.register",
    ]  # fmt: skip


def test_a_round_that_is_not_due_says_why(cli: Cli, shared: Database) -> None:
    add_feedback(shared)
    said = cli("retrain", "run", "--if-due")
    assert (said.code, said.out) == (0, "not due: 1 new pairs, retrain.min_pairs is 1000\n")
    assert cli("retrain", "run", "--if-due", "--json").json()["status"] == "not_due"
    status = cli("retrain", "status", "--json").json()
    assert (status["due"], status["new_pairs"], status["run"]) == (False, 1, None)


def test_one_process_at_a_time_runs_a_round(cli: Cli, shared: Database) -> None:
    assert leases.acquire(shared, "retrain/assistant", "elsewhere:7", ttl_s=60.0, now=now()) == 1
    said = cli("retrain", "run", "--if-due")
    assert (said.code, said.err) == (1, "pawl: another process holds retrain/assistant: elsewhere:7\n")
    leases.release(shared, "retrain/assistant", "elsewhere:7")
    assert cli("retrain", "run", "--if-due").code == 0
    assert leases.acquire(shared, "retrain/assistant", "elsewhere:7", ttl_s=60.0, now=now()) == 3


@pytest.fixture
def trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round needs before it counts its pairs; the scorer is found missing without a look at the network."""
    monkeypatch.setenv("PAWL_ENGINE__MODEL", "tiny")
    monkeypatch.setenv("PAWL_RETRAIN__RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("PAWL_WORKER__SCORING__TOXICITY_CHECKPOINT", str(tmp_path / "none.ckpt"))


@pytest.mark.usefixtures("cli", "trainable")
def test_a_round_carries_the_epoch_of_its_lease_and_what_gave_no_pair(cli: Cli, shared: Database) -> None:
    add_feedback(shared)
    assert leases.acquire(shared, "retrain/assistant", "before:1", ttl_s=1.0, now=1.0) == 1
    said = cli("retrain", "run", "--cycle", "c", "--json")
    assert (said.code, said.json()["status"]) == (0, "skipped")
    (found,) = registry.list_runs(shared)
    assert (found.epoch, found.detail["skipped"]) == (2, {"unpaired": 1})


@pytest.mark.usefixtures("cli", "trainable")
def test_an_unfinished_round_is_due_and_is_the_one_that_is_resumed(cli: Cli, shared: Database, tmp_path: Path) -> None:
    settings = load_settings(tmp_path / "pawl.yaml", {})
    old = registry.create_run(shared, "assistant", "2026-W01", epoch=0, now=3.0)
    this_week = registry.create_run(shared, "assistant", "now", epoch=0, now=now())
    registry.update_run(shared, this_week, now=now(), step="gate", status=RunStatus.FAILED, detail={})
    assert decide_now(shared, settings, "assistant", 0, {}).is_due
    resumed = cli("retrain", "run", "--if-due", "--json").json()
    assert (resumed["run"], resumed["status"]) == (old.id, "skipped")
    assert len(registry.list_runs(shared)) == 2
    assert "the last round was 0.0 hours ago" in decide_now(shared, settings, "assistant", 9999, {}).reason


@pytest.mark.usefixtures("cli", "trainable")
def test_what_the_system_refuses_is_one_clear_line(
    cli: Cli, shared: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared.is_sqlite
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("PAWL_WORKER__METRICS_PORT", str(taken.getsockname()[1]))
        said = cli("worker")
    assert (said.code, "worker.metrics_port" in said.err, "Address already in use" in said.err) == (2, True, True)
    (tmp_path / "runs").write_text("in the way")
    blocked = cli("retrain", "run", "--cycle", "c")
    assert (blocked.code, blocked.err.splitlines()[-1]) == (2, f"pawl: {tmp_path}/runs: File exists")


@pytest.mark.parametrize(
    ("error", "code"),
    [(httpx2.ReadTimeout("late"), 3), (ConnectionResetError(104, "reset"), 3), (PermissionError(13, "denied"), 2)],
)
def test_errors_from_outside_have_their_exit_codes(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise error

    monkeypatch.setattr("pawl.cli.main.app", broken)
    assert run(["doctor"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_explained_down_to_its_checks(cli: Cli, shared: Database) -> None:
    run_id = add_run(shared)
    (listed,) = cli("retrain", "list", "--json").json()
    assert (listed["id"], listed["status"]) == (run_id, "failed")
    assert cli("retrain", "explain", run_id, "--json").json()["detail"]["n_pairs"] == 12
    told = cli("retrain", "explain", run_id).out
    assert ("toxicity  fail: 0.10 against 0.01" in told, "status   failed" in told) == (True, True)
    gate = cli("gate", run_id)
    assert (gate.code, gate.out.split()[:2]) == (1, ["fail", "fail"])
    assert "0.10 against 0.01" in gate.out


SPLIT = {
    "key": "tone",
    "variants": [
        {"name": "plain", "model": "base-model", "weight": 1},
        {"name": "warm", "model": CANDIDATE, "weight": 1},
    ],
}


@pytest.mark.parametrize("split", [None, SPLIT], ids=["rollout", "fixed split"])
def test_assignments_tells_what_the_gateway_does(
    cli: Cli, shared: Database, engine: FakeVLLM, engine_url: str, tmp_path: Path, split: dict[str, Any] | None
) -> None:
    engine.adapters[CANDIDATE] = "/adapters/x"
    tree = load_settings(tmp_path / "pawl.yaml", {}).model_dump(mode="json")
    tree["serving"]["models"] = {"assistant": {"engines": [engine_url], "champion": "base-model", "experiment": split}}
    settings = Settings.model_validate(tree)
    write_config(settings, tmp_path / "pawl.yaml")
    if split is None:
        register(shared)
        route = Route("assistant", 0, "base-model")
        start_rollout(shared, settings.rollout, route, CANDIDATE, now=1.0, epoch=0)
        assert [cli("rollout", "advance").code for _ in range(2)] == [0, 0]
    told, seen = {}, {}
    with running(create_app(settings)) as url:
        for user in (f"user-{number}" for number in range(24)):
            fields = cli("assignments", user, "--model", "assistant", "--json").json()
            told[user] = (fields["variant"], fields["model"])
            body = {"model": "assistant", "user": user, "messages": [{"role": "user", "content": "Hello?"}]}
            headers = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=20).headers
            seen[user] = (headers["x-pawl-variant"], headers["x-pawl-model"])
    assert told == seen
    assert len(set(told.values())) == 2


@pytest.mark.usefixtures("cli", "adapters")
def test_why_somebody_sees_what(cli: Cli, shared: Database) -> None:
    assert "everybody sees the champion" in cli("assignments", "ann").out
    register(shared)
    cli("rollout", "start", CANDIDATE)
    reasons = {cli("assignments", f"user-{number}", "--json").json()["why"] for number in range(12)}
    assert {reason.partition("; ")[2].partition(",")[0] for reason in reasons} == {
        "the user's outcome counts",
        "not analysed",
    }


def test_a_database_that_fails_half_way_is_out_of_reach(cli: Cli, shared: Database, tmp_path: Path) -> None:
    with shared.write() as connection:
        connection.exec_driver_sql("DROP TABLE rollouts")
    said = cli("rollout", "status")
    assert said.code == 3
    assert said.err == "pawl: the database failed: no such table: rollouts\n"
    assert open_database(load_settings(tmp_path / "pawl.yaml", {}).database).is_sqlite


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (sa.exc.InternalError("UPDATE", {}, Exception("read-only transaction")), 3),
        (sa.exc.TimeoutError("no connection is free"), 3),
        (sa.exc.ProgrammingError("SELECT", {}, Exception("no such column")), 2),
        (sa.exc.IntegrityError("INSERT", {}, Exception("")), 2),
    ],
)
def test_only_a_database_that_does_not_answer_is_out_of_reach(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    assert run(["rollout", "status"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pawl: the database failed: ")
