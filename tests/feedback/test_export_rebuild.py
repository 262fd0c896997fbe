"""The same store gives the same bytes: in any process, from either database, however its rows came in."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from feedback.interactions import FeedbackEvent, Interaction, Message
from pawl.database import Database, open_database, upgrade
from pawl.settings import DatabaseSettings
from tests.feedback.rebuilding import rebuild
from tests.pawl.records import feedback, interaction_id, save, served
from tests.servers import PostgreSQL

pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]
QUESTIONS = 24


def spoken(number: int) -> Message:
    """What an engine may answer: tool calls, texts that no database likes, and plain words."""
    arguments = f'{{"zone": "z{number}", "at": {number / 7}, "deep": [{number}, {{"b": 1, "a": null}}]}}'
    call = {"id": f"call_{number}", "type": "function", "function": {"name": f"tool_{number}", "arguments": arguments}}
    if number % 3 == 0:
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    return {
        "role": "assistant",
        "content": f"answer {number} \x00 \ud800 \U0001f600" if number % 3 == 1 else f"plain {number}",
    }


def add_history(database: Database, order: int) -> None:
    """Two answers to each question, one liked and one not, and a third that is liked alone; saved in some order."""
    answers: list[Interaction] = []
    thumbs: list[FeedbackEvent] = []
    for number in range(3 * QUESTIONS):
        asked, turn = divmod(number, 3)
        who: dict[str, Any] = {"user_id": f"user-{asked}"}
        question = f"question {asked}" if turn < 2 else f"question {asked} on its own"
        answers.append(served(number + 1, question=question, completion=spoken(number), **who))
        value = "down" if turn == 1 else "up"
        thumbs.append(feedback(interaction_id(number + 1), value=value, created_at=number + 1.5, **who))
    Random(order).shuffle(answers)
    Random(order).shuffle(thumbs)
    save(database, answers, thumbs)


def fill(url: str, order: int, directory: Path) -> dict[str, bytes]:
    with closing(open_database(DatabaseSettings(url=url))) as database:
        upgrade(database)
        add_history(database, order)
        return rebuild(database, directory)


def test_sqlite_and_postgresql_give_the_same_bytes(postgresql: PostgreSQL, tmp_path: Path) -> None:
    name = f"test_{secrets.token_hex(8)}"
    one = fill(f"sqlite:///{tmp_path}/one.db", 1, tmp_path / "one")
    two = fill(postgresql.create_database(name), 2, tmp_path / "two")
    postgresql.drop_database(name)
    assert [file for file in one if one[file] != two.get(file)] == []
    assert len(one) == 4 * 2 * 2 + 1
    assert b"tool_3" in one["trl.jsonl"]
    assert b"question" in one["training.jsonl"]


def test_a_process_that_hashes_differently_gives_the_same_bytes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    here = fill(url, 3, tmp_path / "here")
    there = tmp_path / "there"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-m", "tests.feedback.rebuilding", url, str(there)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=240)
    assert {path.name: path.read_bytes() for path in sorted(there.iterdir())} == here
