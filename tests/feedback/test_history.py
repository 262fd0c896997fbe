"""What mining reads of the store."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from feedback import stored_pairs
from feedback.candidates import Skipped
from feedback.history import hold_texts, read_answers, read_history, read_opinions, read_texts
from feedback.judging import decide
from feedback.mining import mine_alias
from feedback.partitions import Part, cut
from feedback.store import count_pairs, delete_texts, load_pairs
from feedback.stored_pairs import draft, follow, withdraw
from pawl.database import Database
from tests.pawl.records import interaction_id, save, served, thumb

ALIAS = "assistant"
SEEN = 2.0
"""Long enough for a statement that waits for nobody."""


def read(database: Database) -> tuple[list[int], int]:
    """The numbers of the interactions that are mined, and how many events."""
    parts = list(cut(read_history(database, ALIAS), 1))
    return sorted(int(name, 16) for part in parts for name in part.interactions), sum(len(p.events) for p in parts)


def test_what_feedback_or_a_regeneration_touches_is_mined(database: Database) -> None:
    """Other aliases, untouched answers and feedback on what is not there stay out."""
    interactions = [
        served(1),
        served(2, regenerate_of=interaction_id(1)),
        served(3),
        served(4),
        served(5, alias="other"),
    ]
    save(database, interactions, [thumb(3, "up"), thumb(5, "up"), thumb(6, "up")])
    assert read(database) == ([1, 2, 3], 1)


@pytest.mark.parametrize("kind", ["choice", "regenerate"])
def test_what_feedback_names_is_mined(database: Database, kind: str) -> None:
    event = replace(thumb(1, f"chatcmpl-{interaction_id(2)}"), type=kind)
    save(database, [served(1), served(2), served(3)], [event])
    assert read(database) == ([1, 2], 1)


def test_only_the_last_word_counts(database: Database) -> None:
    save(
        database,
        [served(number) for number in range(1, 4)],
        [
            thumb(1, "up", at=10.0),
            thumb(1, "down", at=20.0),
            thumb(2, "up", at=10.0),
            thumb(2, "up", at=20.0, is_retraction=True),
            replace(thumb(3, "true"), type="copy"),
        ],
    )
    (part,) = cut(read_history(database, ALIAS), 100)
    assert part.interactions == [interaction_id(1)]
    (opinion,) = read_opinions(database, part.events)
    assert opinion.value == "down"


def test_of_two_at_the_same_moment_the_greater_id_counts(database: Database) -> None:
    first, second = replace(thumb(1, "up"), id="a" * 32), replace(thumb(1, "down"), id="b" * 32)
    save(database, [served(1)], [second, first])
    (part,) = cut(read_history(database, ALIAS), 100)
    assert part.events == [second.id]


def test_a_text_erased_while_it_was_judged_makes_no_pair(database: Database) -> None:
    save(database, [served(1), served(2)], [thumb(1, "up"), thumb(2, "down")])
    (part,) = cut(read_history(database, ALIAS), 100)
    heard = read_answers(database, part.interactions, most_chars=1000)
    answers = {answer.id: answer for answer in heard.answers}
    decisions = decide(answers.values(), read_opinions(database, part.events))
    drafts = draft(database, decisions.settled, answers, 100.0)
    assert delete_texts(database, interaction_id(2), {})
    changes = follow(database, [], decisions.settled, drafts)
    assert (changes.added, changes.erased) == (0, decisions.settled)
    assert draft(database, decisions.settled, answers, 100.0) == {}
    assert draft(database, decisions.settled, answers, 100.0, heard.texts) == drafts
    assert count_pairs(database) == {}
    assert mine_alias(database, ALIAS, 100.0).skipped == {Skipped.NOT_STORED: 1, Skipped.UNPAIRED: 1}


def test_texts_come_along_as_long_as_there_is_room(database: Database) -> None:
    save(database, [served(1), served(2), replace(served(3), is_stored=False, prompt=None, completion=None)], [])
    ids = [interaction_id(number) for number in (1, 2, 3)]
    known = []
    for room in (0, 1, 1000):
        heard = read_answers(database, ids, most_chars=room)
        assert sorted(answer.id for answer in heard.answers) == ids
        known.append(sorted(heard.texts))
    assert [len(names) for names in known] == [0, 1, 2]
    assert known[2] == ids[:2]


def test_tools_take_room_as_texts_do(database: Database) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "x" * 1000}}
    save(database, [served(1, tools=(tool,)), served(2)], [])
    ids = [interaction_id(number) for number in (1, 2)]
    assert list(read_answers(database, ids, most_chars=1000).texts) == ids[:1]


def test_miners_come_to_rows_in_one_order(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, each with a row that the other waits for, would stop each other."""
    monkeypatch.setattr(stored_pairs, "WRITTEN_PAIRS", 4)
    both = [number for n in range(10) for number in (2 * n, 2 * n + 1)]
    said = [thumb(number, "down" if number % 2 else "up") for number in both]
    save(database, [served(number, question=f"What is {number // 2}?") for number in both], said)
    (part,) = cut(read_history(database, ALIAS), 100)
    answers = {answer.id: answer for answer in read_answers(database, part.interactions).answers}
    settled = decide(answers.values(), read_opinions(database, part.events)).settled
    written: list[list[str]] = []

    def inserted(_: Database, __: object, ___: object, rows: Sequence[Mapping[str, str]]) -> int:
        written.append([row["id"] for row in rows])
        return len(rows)

    monkeypatch.setattr(Database, "insert_new", inserted)
    drafts = draft(database, settled, answers, 100.0)
    ids = sorted(drafts)
    for order in (settled, settled[::-1]):
        written.clear()
        assert follow(database, [], order, drafts).added == 10
        assert written == [ids[:4], ids[4:8], ids[8:]]


def test_pairs_are_withdrawn_in_that_order_too(database: Database) -> None:
    save(database, [served(n, question="Why?") for n in (1, 2)], [thumb(1, "up"), thumb(2, "down")])
    mine_alias(database, ALIAS, 100.0)
    statements: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    (pair,) = load_pairs(database, ALIAS)
    statements.clear()
    assert withdraw(database, ["0" * 32, pair.id]) == 1
    locked, deleted = (text for text in statements if "pairs" in text)
    assert "ORDER BY pairs.id" in locked
    assert database.is_sqlite or "FOR UPDATE" in locked
    assert deleted.startswith("DELETE")


def test_who_erases_a_text_waits_until_its_pair_is_there_to_be_erased(database: Database) -> None:
    save(database, [served(1)])
    erasing = threading.Thread(target=delete_texts, args=(database, interaction_id(1), {}))
    with database.write() as connection:
        assert hold_texts(connection, [interaction_id(1)]) == {interaction_id(1)}
        erasing.start()
        erasing.join(SEEN)
        waits = erasing.is_alive()
    erasing.join()
    assert waits
    with database.read() as connection:
        assert read_texts(connection, [interaction_id(1)]) == {}


def test_parts_are_named_as_the_database_names_them(database: Database) -> None:
    save(database, [served(1)], [thumb(1, "up")])
    assert list(cut(read_history(database, ALIAS), 1)) == [Part([interaction_id(1)], [thumb(1, "up").id])]
