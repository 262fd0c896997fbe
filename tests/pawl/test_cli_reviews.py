"""`pawl pairs review`, `mine` and `export`: what the defence holds back, and what reviewers make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback.store import event_row, interaction_row, save_records
from pawl.audit import latest_events
from pawl.database import Database
from tests.pawl.conftest import Cli
from tests.pawl.records import feedback, interaction_id, served


@pytest.fixture
def mined(cli: Cli, shared: Database) -> str:
    """The id of the one pair there is: an edit that only its author prefers, under a key of its own."""
    answer = served(1, key_id="k1", user_id="ann")
    wanted = feedback(answer.id, "edit", value="The sky is blue because of Rayleigh.", key_id="k1", user_id="ann")
    save_records(shared, [interaction_row(answer)], [event_row(wanted)], [])
    summary = cli("pairs", "mine", "--json").json()
    assert summary["pairs"] == 1
    assert summary["defence"] == {"accepted": 0, "quarantined": {"uncorroborated_edit": 1}, "refused": {}}
    (waiting,) = cli("pairs", "review", "list", "--json").json()
    return str(waiting["id"])


def test_what_waits_is_listed_with_its_texts(cli: Cli, mined: str) -> None:
    (waiting,) = cli("pairs", "review", "list", "--reason", "uncorroborated_edit", "--json").json()
    assert waiting["id"] == mined
    assert waiting["principals"] == ["k1/ann"]
    assert waiting["chosen"] == "The sky is blue because of Rayleigh."
    assert cli("pairs", "review", "list", "--reason", "burst").out == "none\n"
    assert mined in cli("pairs", "review").out


def test_the_list_takes_its_options_without_its_name_too(cli: Cli, mined: str) -> None:
    (waiting,) = cli("pairs", "review", "--json").json()
    assert waiting["id"] == mined
    assert cli("pairs", "review", "--reason", "burst", "--json").json() == []
    assert cli("pairs", "review", "--model", "nobody", "--limit", "1", "--json").json() == []


def test_nothing_that_waits_is_exported(cli: Cli, mined: str, tmp_path: Path) -> None:
    assert cli("pairs", "export", "--out", "held.jsonl").out == "0 rows in held.jsonl\n"
    assert cli("pairs", "review", "accept", mined).code == 0
    assert cli("pairs", "export", "--out", "in.jsonl").code == 0
    (row,) = map(json.loads, (tmp_path / "in.jsonl").read_text().splitlines())
    assert row["pair_id"] == mined


def test_decisions_are_audited_and_outlive_the_next_mining(cli: Cli, shared: Database, mined: str) -> None:
    said = cli("pairs", "review", "reject", mined, "--json").json()
    assert (said["decision"], said["pairs"]) == ("rejected", [mined])
    (event,) = latest_events(shared, subject=mined)
    assert (event.action, event.actor) == ("pair.reject", said["reviewer"])
    summary = cli("pairs", "mine", "--json").json()
    assert summary["defence"] == {"accepted": 0, "quarantined": {}, "refused": {"reviewer": 1}}
    assert cli("pairs", "review").out == "none\n"


def test_only_what_is_in_quarantine_can_be_decided(cli: Cli, shared: Database) -> None:  # noqa: ARG001
    said = cli("pairs", "review", "accept", interaction_id(1)[:32])
    assert (said.code, said.err.startswith("pawl: no pair")) == (1, True)
    assert cli("pairs", "review", "accept").code == 2
