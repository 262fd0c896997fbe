"""Verdicts go with the answers they are about: by erasure and by retention."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from feedback.judged.reply import SideScores
from feedback.judged.rulings import Outcome, Ruling
from feedback.judged.verdict_store import Heard, Judging, save_verdict
from feedback.mining import mine_alias
from feedback.retention import DAY_S, Limits, prune
from feedback.store import count_pairs
from feedback.tombstones import Subject
from pawl.database import Database
from pawl.schema import judge_verdicts
from tests.feedback.people import NOW, eraser, history_of, said_to
from tests.pawl.records import save

ASKED = ({"role": "user", "content": "Why is the sky blue?"},)


def judge(database: Database, *sides: str) -> bool:
    scores = {"kind": SideScores(0.9, 0.1)}
    heard = Heard(Ruling(Outcome.PREFERRED, 0.8), scores, scores, 1, 50.0)
    first, second = sorted(sides)
    return save_verdict(database, "assistant", "0" * 64, (first, second), heard, Judging("judge", "0" * 64))


def n_verdicts(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(judge_verdicts)).scalar_one())


@pytest.fixture
def judged(database: Database) -> Database:
    """Two verdicts on answers to ann and bob, one on two to bob."""
    given = [said_to(user, n, prompt=ASKED) for n, user in enumerate(("ann", "bob", "ann", "bob", "bob"), start=10)]
    save(database, given)
    ids = [one.id for one in given]
    assert all([judge(database, ids[0], ids[1]), judge(database, ids[3], ids[2]), judge(database, ids[3], ids[4])])
    assert mine_alias(database, "assistant", 100.0).by_source == {"judge": 3}
    return database


def test_erasing_one_of_two_people_erases_what_was_said_of_both(judged: Database, tmp_path: Path) -> None:
    at_work = eraser(judged, tmp_path)
    subject = Subject("ann")
    report = at_work.erase(at_work.bury(at_work.tombstone(subject, "ticket 7")), subject)
    counts = report.as_json()["counts"]
    assert isinstance(counts, dict)
    assert (counts["verdicts"], counts["pairs"]) == (2, 2)
    assert n_verdicts(judged) == 1
    assert mine_alias(judged, "assistant", NOW).skipped == {}
    assert count_pairs(judged) == {"judge": 1}


def test_nothing_is_said_of_who_is_gone(judged: Database, tmp_path: Path) -> None:
    at_work = eraser(judged, tmp_path)
    at_work.erase(at_work.bury(at_work.tombstone(Subject("ann"), "ticket 7")), Subject("ann"))
    ann, bob = said_to("ann", 10).id, said_to("bob", 11).id
    assert not judge(judged, ann, bob)
    assert n_verdicts(judged) == 1


def test_retention_deletes_verdicts_with_their_answers(judged: Database) -> None:
    save(judged, history_of("cy", int(9.5 * DAY_S))[0])
    limits = Limits(1.0, None, None)
    pruned = prune(judged, limits, 10 * DAY_S, batch_rows=100, max_batches=10)
    assert pruned.counts == {"interactions": 5, "verdicts": 3}
    assert n_verdicts(judged) == 0
    assert mine_alias(judged, "assistant", 10 * DAY_S).n_withdrawn == 3
