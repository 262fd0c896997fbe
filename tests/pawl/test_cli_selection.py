"""`pawl retrain status`, `run --if-due` and `pairs export`: one selection for all of them, and what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feedback.mining import mine_alias
from feedback.poisoning.reviews import list_waiting
from pawl.clock import now
from pawl.database import Database
from tests.pawl.conftest import Cli
from tests.pawl.records import feedback, interaction_id, save, served, thumb

PAIRS = 12
FLOODED = f"0 new pairs, retrain.min_pairs is 1000; left out: {PAIRS} flood"


def vote_namelessly(database: Database) -> None:
    """Two answers to each of a dozen questions, voted on within a week by whoever is behind a key."""
    nobody: dict[str, Any] = {"key_id": "k1", "user_id": None}
    answers = [served(n, question=f"question {n // 2} about word{n // 2}", **nobody) for n in range(2, 2 * PAIRS + 2)]
    votes = [
        feedback(each.id, value="up" if number % 2 else "down", created_at=number + 9.0, **nobody)
        for number, each in enumerate(answers)
    ]
    save(database, answers, votes)


def test_users_without_names_are_told_why_nothing_is_due(cli: Cli, shared: Database) -> None:
    vote_namelessly(shared)
    assert cli("retrain", "run", "--if-due").out == f"not due: {FLOODED}\n"
    status = cli("retrain", "status", "--json").json()
    assert (status["new_pairs"], status["left_out"], status["due"]) == (0, {"flood": PAIRS}, False)
    assert status["why_not_due"] == FLOODED


def test_a_key_that_answers_for_what_it_says_has_its_pairs_trained_on(
    cli: Cli, shared: Database, tmp_path: Path
) -> None:
    vote_namelessly(shared)
    with (tmp_path / "pawl.yaml").open("a") as config:
        config.write("feedback: {defence: {trusted: ['', k1]}}\n")
    assert cli("retrain", "run", "--if-due").out == f"not due: {PAIRS} new pairs, retrain.min_pairs is 1000\n"
    assert cli("retrain", "status", "--json").json()["new_pairs"] == PAIRS


@pytest.mark.parametrize("command", [("retrain", "status"), ("pairs", "export", "--out", "pairs.jsonl")])
def test_whoever_only_looks_leaves_the_queue_as_it_is(cli: Cli, shared: Database, command: tuple[str, ...]) -> None:
    vote_namelessly(shared)
    mine_alias(shared, "assistant", now())
    assert cli(*command).code == 0
    assert list_waiting(shared, None, None, 100) == []
    assert cli("pairs", "mine").code == 0
    assert len(list_waiting(shared, None, None, 100)) == PAIRS


def test_single_thumbs_are_filtered_and_what_is_left_out_is_counted(cli: Cli, shared: Database, tmp_path: Path) -> None:
    key = {"role": "assistant", "content": "Use ghp_0123456789abcdefghij0123456789abcdef."}
    answers = [
        served(1, question="Which key?", completion=key),
        served(2, question="Which way?", user_id="bob"),
        served(3, question="Which day?"),
    ]
    save(shared, answers, [thumb(1, "up"), thumb(2, "up"), thumb(3, "down")])
    with (tmp_path / "pawl.yaml").open("a") as config:
        config.write("feedback: {filters: {opted_out: [bob]}}\n")
    said = cli("pairs", "export", "--format", "kto", "--out", "kto.jsonl")
    assert said.out == "1 rows in kto.jsonl\nsingle thumbs left out: 1 opted_out, 1 secret\n"
    (row,) = map(json.loads, (tmp_path / "kto.jsonl").read_text().splitlines())
    assert row["completion"][0]["content"] == f"answer {int(interaction_id(3), 16)}"


def test_single_thumbs_are_defended_against_who_sends_many(cli: Cli, shared: Database, tmp_path: Path) -> None:
    nobody: dict[str, Any] = {"key_id": "k1", "user_id": None}
    answers = [served(n, question=f"question {n} about word{n}", **nobody) for n in range(1, PAIRS + 1)]
    answers.append(served(PAIRS + 1, question="Which day?"))
    save(shared, answers, [feedback(each.id, "rating", 1.0, created_at=20.0, key_id=each.key_id) for each in answers])
    said = cli("pairs", "export", "--format", "kto", "--out", "kto.jsonl")
    assert said.out == f"1 rows in kto.jsonl\nsingle thumbs left out: {PAIRS} flood\n"
    (row,) = map(json.loads, (tmp_path / "kto.jsonl").read_text().splitlines())
    assert row["completion"][0]["content"] == f"answer {PAIRS + 1}"
