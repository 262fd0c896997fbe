"""`pawl erase` and `pawl pairs show`, as somebody types them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from feedback.store import load_pairs
from feedback.tombstone_store import FILE, Place, confirm, places
from pawl.cli.learning import forgetter
from pawl.cli.worker import Worker
from pawl.clock import now
from pawl.database import Database
from pawl.secrets import signing_secret
from pawl.settings import AuthSettings, load_settings
from tests.feedback import people
from tests.feedback.people import ADAPTER, CHILD, dump, fill, history_of, mentions, restore, suffix_of, train
from tests.pawl.conftest import Cli


@pytest.fixture
def known(shared: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Ann and Bob with histories whose ids are signed with this machine's secret, and a model that learned from Ann."""
    secret = signing_secret(AuthSettings(), tmp_path / "state")
    monkeypatch.setattr(people, "SECRET", secret)
    fill(shared, history_of("ann", 10), history_of("bob", 30))
    train(shared, "ann")
    return shared


def test_a_dry_run_changes_nothing(cli: Cli, known: Database) -> None:
    before = dump(known)
    said = cli("erase", "--user", "ann", "--dry-run", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json() == {
        "would_remove": {"interactions": 4, "feedback": 4, "scores": 4, "verdicts": 0, "shadow_answers": 0, "pairs": 2},
        "would_mark": [ADAPTER, CHILD],
    }
    assert dump(known) == before


def test_it_says_what_was_removed_and_what_had_learned_from_it(cli: Cli, known: Database) -> None:
    said = cli("erase", "--user", "ann", "--reason", "ticket 7")
    assert (said.code, said.err) == (0, "")
    for line in ("interactions    4", ADAPTER, CHILD):
        assert line in said.out
    assert "warning" not in said.out
    assert mentions(dump(known), "ann") == []
    listed = {model["name"]: model["erased"] for model in cli("models", "list", "--json").json()}
    assert listed == {ADAPTER: "2 pairs", CHILD: f"through {ADAPTER}"}
    assert "2 pairs" in cli("models", "list").out
    assert cli("models", "show", ADAPTER, "--json").json()["manifest"]["erased"]["pairs"] == 2


@pytest.mark.usefixtures("known")
def test_an_erasure_under_another_secret_is_warned_of(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "state" / "secret").write_text("another secret of some length")
    said = cli("erase", "--user", "ann", "--json")
    assert said.code == 0
    assert "auth.secret" in said.json()["warning"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--user or --completion"),
        (["--user", ""], "must not be empty"),
        (["--user", "ann", "--completion", "chatcmpl-" + "0" * 48], "--user or --completion"),
        (["--completion", "nonsense"], "no completion id"),
        (["--completion", "chatcmpl-" + "0" * 48, "--key", "k"], "--key goes with --user"),
        (["--completion", "chatcmpl-" + "0" * 48, "--dry-run"], "--dry-run"),
        (["--user", "ann", "--reason", "x" * 501], "--reason"),
        (["--reapply", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_use(cli: Cli, shared: Database, arguments: list[str], text: str) -> None:
    before = dump(shared)
    said = cli("erase", *arguments)
    assert (said.code, said.out) == (2, "")
    assert text in said.err
    assert dump(shared) == before


def test_one_completion(cli: Cli, known: Database) -> None:
    suffix = suffix_of(30, "bob")
    assert cli("erase", "--completion", f"chatcmpl-{suffix}").code == 0
    assert [row["user_id"] for row in dump(known)["interactions"] if row["id"] == suffix] == [None]


def test_who_has_not_confirmed_is_named(cli: Cli, known: Database) -> None:
    confirm(known, Place("alive:/spool", 0, now()))
    confirm(known, Place("away:/spool", 0, now() - 1000))
    said = cli("erase", "--user", "ann", "--wait", "0", "--json")
    assert said.code == 1
    assert "alive:/spool" in said.err
    shown = said.json()
    assert (shown["unconfirmed"], shown["absent"]) == (["alive:/spool"], ["away:/spool"])
    assert mentions(dump(known), "ann") == []
    confirm(known, Place("alive:/spool", shown["tombstone"], now()))
    assert cli("erase", "--user", "bob", "--wait", "0").code == 1
    assert {place.name for place in places(known)} >= {"alive:/spool", "away:/spool"}


def test_after_a_restore_it_is_done_again(cli: Cli, known: Database, tmp_path: Path) -> None:
    backup = dump(known)
    assert cli("erase", "--user", "ann").code == 0
    for again in (by_hand, by_the_worker):
        restore(known, backup)
        again(cli, known, tmp_path)
        assert mentions(dump(known), "ann") == []
        assert len([row for row in dump(known)["pairs"] if "bob" in str(row)]) == 2


def by_hand(cli: Cli, _: Database, directory: Path) -> None:
    said = cli("erase", "--reapply", str(directory / "state" / FILE), "--json")
    assert said.code == 0
    (report,) = said.json()["reapplied"]
    assert (report["counts"]["interactions"], report["models"]) == (4, [ADAPTER, CHILD])


def by_the_worker(_: Cli, database: Database, directory: Path) -> None:
    worker = Worker(load_settings(directory / "pawl.yaml", {}), database)
    worker.finish_erasures()
    worker.finish_erasures()


@pytest.mark.usefixtures("cli")
def test_the_worker_prunes_what_is_too_old(known: Database, tmp_path: Path) -> None:
    environ = {"PAWL_RETENTION__INTERACTIONS_DAYS": "14", "PAWL_RETENTION__BATCH_ROWS": "2"}
    environ |= {"PAWL_RETENTION__BATCHES": "2"}
    worker = Worker(load_settings(tmp_path / "pawl.yaml", environ), known)
    assert worker.prune() == 6.0
    assert len(dump(known)["interactions"]) == 4
    while worker.prune() is not None:
        pass
    assert dump(known)["interactions"] == []
    assert Worker(load_settings(tmp_path / "pawl.yaml", {}), known).prune() is None


@pytest.mark.parametrize("command", [("pairs", "mine"), ("retrain", "run", "--if-due")])
def test_no_command_mines_again_what_was_pruned(
    cli: Cli, known: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PAWL_RETENTION__PAIRS_DAYS", "14")
    worker = Worker(load_settings(tmp_path / "pawl.yaml", {"PAWL_RETENTION__PAIRS_DAYS": "14"}), known)
    worker.prune()
    pruned = dump(known)["pairs"]
    assert [row["chosen"] for row in pruned] == ["{}", "{}"]
    assert cli(*command).code == 0
    assert dump(known)["pairs"] == pruned
    monkeypatch.delenv("PAWL_RETENTION__PAIRS_DAYS")
    assert cli(*command).code == 0
    assert len(dump(known)["pairs"]) == len(pruned) + 2


def test_a_round_under_way_forgets_who_was_erased(cli: Cli, known: Database, tmp_path: Path) -> None:
    pairs = load_pairs(known, "assistant")
    forget = forgetter(load_settings(tmp_path / "pawl.yaml", {}), known)
    written = tmp_path / "runs" / "r0009" / "mine" / "new.jsonl"
    written.parent.mkdir(parents=True)
    written.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    forget(tmp_path / "runs" / "r0009")
    text = written.read_text()
    assert len(text.splitlines()) == len(pairs) == 4
    written.unlink()
    assert cli("erase", "--user", "ann").code == 0
    written.write_text(text)
    forget(tmp_path / "runs" / "r0009")
    assert [json.loads(line)["principals"] for line in written.read_text().splitlines()] == [["/bob"]] * 2


@pytest.mark.usefixtures("known")
def test_a_pair_shows_both_ways(cli: Cli, tmp_path: Path) -> None:
    (listed, *_) = [pair for pair in cli("pairs", "list", "--json").json() if pair["first_run"]]
    build = tmp_path / "var" / "runs" / "r0007" / "build"
    build.mkdir(parents=True)
    (build / "manifest.json").write_text(json.dumps({"pair_ids": [listed["id"]]}))
    shown = cli("pairs", "show", listed["id"], "--json").json()
    assert shown["chosen_from"]["experiment"] == "ro_1"
    assert shown["chosen_from"]["config_hash"] is None
    assert [run["run"] for run in shown["runs"]] == ["r0001", "r0007"]
    assert shown["runs"][0] == {
        "run": "r0001",
        "status": "passed",
        "is_first_promoted": True,
        "models": [
            {"name": ADAPTER, "state": "retired", "through": None},
            {"name": CHILD, "state": "retired", "through": ADAPTER},
        ],
    }
    onwards = cli("pairs", "show", shown["chosen_from"]["completion_id"], "--json").json()
    (made,) = onwards["pairs"]
    assert (made["id"], made["side"], made["runs"]) == (listed["id"], "chosen", shown["runs"])
    assert cli("pairs", "show", f"chatcmpl-{'0' * 48}").code == 1
