"""Retention: what is too old goes, a bounded number at a time, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from feedback.mining import mine_alias
from feedback.retention import DAY_S, Limits, kept_since, prune
from feedback.store import load_pairs
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.schema import dead_letters
from pawl.settings import load_settings
from tests.feedback.people import dump, fill, history_of, train
from tests.pawl.records import feedback, save

FOR_EVER = Limits(None, None, None)
LATER = 10 * DAY_S


def prune_all(database: Database, limits: Limits, *, now: float = LATER, batch_rows: int = 3) -> Counter[str]:
    total: Counter[str] = Counter()
    while True:
        pruned = prune(database, limits, now, batch_rows=batch_rows, max_batches=2)
        total += pruned.counts
        if not pruned.is_more:
            return total


def test_nothing_goes_unless_it_is_said(database: Database) -> None:
    fill(database, history_of("ann", 10))
    before = dump(database)
    assert prune_all(database, FOR_EVER) == Counter()
    assert dump(database) == before


def test_old_interactions_go_with_what_hangs_on_them(database: Database) -> None:
    young = int(LATER - DAY_S)
    fill(database, history_of("ann", 10, 4), history_of("bob", young))
    save(database, [], [feedback("f" * 48, created_at=5.0), feedback("e" * 48, created_at=float(young))])
    found = prune_all(database, FOR_EVER._replace(interactions_days=2.0))
    assert found == {"interactions": 8, "scores": 8, "feedback": 9}
    left = dump(database)
    assert {row["user_id"] for row in left["interactions"]} == {"bob"}
    assert len(left["feedback_events"]) == 5
    assert len(left["scores"]) == 4


def test_young_interactions_keep_their_old_feedback(database: Database) -> None:
    served, events = history_of("ann", int(LATER) - 100)
    early = [feedback(served[0].id, "report", "wrong", created_at=1.0)]
    fill(database, (served, [*events, *early]))
    assert prune_all(database, FOR_EVER._replace(interactions_days=2.0)) == Counter()


def test_of_pairs_that_were_trained_on_the_lineage_stays(database: Database) -> None:
    fill(database, history_of("ann", 10, 3), history_of("bob", 30), history_of("cid", int(LATER)))
    train(database, "ann")
    assert prune_all(database, FOR_EVER._replace(pairs_days=2.0)) == {"pairs": 5}
    left = dump(database)["pairs"]
    assert Counter(row["chosen"] != "{}" for row in left) == {True: 2, False: 3}
    assert {row["first_run"] for row in left if row["chosen"] == "{}"} == {"r0001"}


def test_pairs_that_went_are_not_mined_again(database: Database) -> None:
    """Though what they were made from is still here."""
    young = int(LATER - DAY_S)
    fill(database, history_of("ann", 10, 3), history_of("bob", young))
    assert prune_all(database, FOR_EVER._replace(pairs_days=2.0)) == {"pairs": 3}
    mined = mine_alias(database, "assistant", LATER, since=kept_since(2.0, LATER))
    assert (mined.n_pairs, mined.n_added, mined.n_withdrawn) == (2, 0, 0)
    assert mined.skipped == {"not_stored": 3}
    assert {pair.principals for pair in load_pairs(database, "assistant")} == {("/bob",)}
    assert mine_alias(database, "assistant", LATER, since=kept_since(None, LATER)).n_added == 3


def test_dead_letters(database: Database) -> None:
    with database.write() as connection:
        for number in range(7):
            row = {"id": str(number), "kind": "k", "payload": "p", "reason": "r", "created_at": number * DAY_S}
            connection.execute(dead_letters.insert(), row)
    assert prune_all(database, FOR_EVER._replace(dead_letters_days=7.5)) == {"dead_letters": 3}
    assert {row["id"] for row in dump(database)["dead_letters"]} == {"3", "4", "5", "6"}


def test_no_transaction_and_no_visit_is_larger_than_its_bound(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database, history_of("ann", 10, 20))
    sizes = []
    really_write = Database.write

    @contextmanager
    def measured(database: Database) -> Iterator[sa.Connection]:
        with really_write(database) as connection:
            before = connection.execute(sa.text("SELECT count(*) FROM interactions")).scalar_one()
            yield connection
            sizes.append(before - connection.execute(sa.text("SELECT count(*) FROM interactions")).scalar_one())

    monkeypatch.setattr(Database, "write", measured)
    pruned = prune(database, FOR_EVER._replace(interactions_days=1.0), LATER, batch_rows=7, max_batches=4)
    assert sizes == [7, 7, 7, 7]
    assert pruned.is_more
    assert prune(database, FOR_EVER._replace(interactions_days=1.0), LATER, batch_rows=7, max_batches=9).counts[
        "interactions"
    ] == 12  # fmt: skip


def test_a_rollout_keeps_the_records_it_needs() -> None:
    with pytest.raises(ConfigurationError, match="needs records of up to 14 days"):
        load_settings(None, {"PAWL_RETENTION__INTERACTIONS_DAYS": "13"})
    assert load_settings(None, {"PAWL_RETENTION__INTERACTIONS_DAYS": "14"}).retention.interactions_days == 14
