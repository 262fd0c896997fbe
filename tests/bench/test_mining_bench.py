"""The history that mining is measured on: the same for a seed, and mined part by part as it would be at once."""

from __future__ import annotations

from collections import Counter

from bench.mining_history import ALIAS, Size, build_history, history_rows
from feedback.candidates import Source
from feedback.mining import mine_alias
from feedback.pairs import mine_pairs
from feedback.store import load_pairs
from pawl.database import Database
from tests.feedback.whole_history import whole_history

SIZE = Size(interactions=20_000, signals=2_000, users=1_000)
SAID_BY_USERS = set(Source) - {Source.JUDGE, Source.SIMILAR_THUMBS}
SMALL = Size(interactions=500, signals=100, users=10)


def test_a_seed_says_what_the_history_is() -> None:
    assert list(history_rows(SMALL, 1)) == list(history_rows(SMALL, 1))
    assert list(history_rows(SMALL, 1)) != list(history_rows(SMALL, 2))


def test_the_history_is_as_large_as_was_asked() -> None:
    rows = list(history_rows(SMALL, 1))
    assert len({row[0] for row, _ in rows}) == SMALL.interactions
    assert sum(len(events) for _, events in rows) == SMALL.signals


def test_the_history_gives_what_it_gives_at_once(database: Database) -> None:
    build_history(database, SIZE, 1)
    mined = mine_alias(database, ALIAS, 100.0, part_rows=400)
    whole = mine_pairs(*whole_history(database, ALIAS))
    assert set(mined.by_source) == SAID_BY_USERS, "every source has its share"
    assert mined.by_source == Counter(pair.source for pair in whole.pairs)
    assert mined.skipped == whole.skipped
    assert load_pairs(database, ALIAS) == list(whole.pairs)
