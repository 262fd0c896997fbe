"""The queue of quarantined pairs and the side tables, on both databases."""

from __future__ import annotations

import pytest

from feedback.poisoning.reviews import (
    Decision,
    decide,
    defend_stored,
    first_seen,
    list_waiting,
    load_decisions,
    save_quarantine,
)
from feedback.store import interaction_row, pair_row, save_records
from pawl.audit import latest_events
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.schema import pairs
from pawl.settings import DefenceSettings
from tests.feedback.poisoning.made_pairs import NOW, edit, pair
from tests.pawl.records import served

ONE, TWO, THREE = (f"{number:032x}" for number in (1, 2, 3))


def queue(database: Database) -> dict[str, str]:
    return {waiting.id: waiting.reason for waiting in list_waiting(database, "assistant", None, 100)}


@pytest.fixture
def stored(database: Database) -> Database:
    with database.write() as connection:
        rows = [pair_row(pair(number), NOW) for number in (1, 2, 3)]
        database.insert_new(connection, pairs, rows)
    return database


def test_the_queue_follows_the_defence(stored: Database) -> None:
    save_quarantine(stored, "assistant", {ONE: "burst", TWO: "newcomer"}, NOW)
    save_quarantine(stored, "assistant", {ONE: "flood", THREE: "burst"}, NOW + 1.0)
    save_quarantine(stored, "another", {}, NOW + 2.0)
    assert queue(stored) == {ONE: "flood", THREE: "burst"}
    (first, _) = list_waiting(stored, None, None, 100)
    assert (first.id, first.quarantined_at, first.pair) == (ONE, NOW, pair(1))
    assert [each.id for each in list_waiting(stored, None, "burst", 100)] == [THREE]
    assert list_waiting(stored, "another", None, 100) == []


def test_decisions_stay_and_are_audited(stored: Database) -> None:
    save_quarantine(stored, "assistant", {ONE: "burst", TWO: "newcomer"}, NOW)
    decide(stored, [ONE], Decision.ACCEPTED, reviewer="operator:ann@host", now=NOW)
    decide(stored, [TWO], Decision.REJECTED, reviewer="operator:ann@host", now=NOW)
    save_quarantine(stored, "assistant", {}, NOW + 1.0)
    assert load_decisions(stored, "assistant") == {ONE: True, TWO: False}
    assert queue(stored) == {}
    lines = [(event.actor, event.action, event.subject, event.detail["reason"]) for event in latest_events(stored)]
    assert lines == [
        ("operator:ann@host", "pair.reject", TWO, "newcomer"),
        ("operator:ann@host", "pair.accept", ONE, "burst"),
    ]
    decide(stored, [TWO], Decision.ACCEPTED, reviewer="operator:bob@host", now=NOW)
    assert load_decisions(stored, "assistant") == {ONE: True, TWO: True}


def test_nothing_is_decided_when_one_of_them_is_unknown(stored: Database) -> None:
    save_quarantine(stored, "assistant", {ONE: "burst"}, NOW)
    with pytest.raises(NegativeVerdict, match="no pair"):
        decide(stored, [ONE, "f" * 32], Decision.ACCEPTED, reviewer="r", now=NOW)
    assert load_decisions(stored, "assistant") == {}
    assert latest_events(stored) == []


def test_a_pair_that_is_gone_is_not_in_the_queue(stored: Database) -> None:
    save_quarantine(stored, "assistant", {"e" * 32: "burst"}, NOW)
    assert queue(stored) == {}


def test_when_a_principal_came_first(database: Database) -> None:
    answers = [
        served(5, user_id="ann", key_id="k"),
        served(3, user_id="ann", key_id="k"),
        served(1, user_id="ann", key_id="other"),
        served(7, user_id=None, key_id="k"),
        served(2, user_id=None, key_id=""),
        served(4, user_id="a/b", key_id=""),
    ]
    save_records(database, [interaction_row(each) for each in answers], [], [])
    assert first_seen(database, ["k/ann", "k/", "/", "/a/b", "k/stranger"]) == {
        "k/ann": 3.0,
        "k/": 7.0,
        "/": 2.0,
        "/a/b": 4.0,
    }
    many = [f"k/user-{number}" for number in range(1200)] + ["other/ann"]
    assert first_seen(database, many) == {"other/ann": 1.0}
    assert first_seen(database, []) == {}


def test_stored_pairs_are_defended_with_what_the_database_knows(stored: Database) -> None:
    lonely = edit(4, "k/ann", "The text that ann wanted.", created_at=NOW)
    settings = DefenceSettings()
    assert held_reasons(stored, settings) == {4: "newcomer"}
    save_records(stored, [interaction_row(served(9, user_id="ann", key_id="k"))], [], [])
    assert held_reasons(stored, settings) == {4: "uncorroborated_edit"}
    save_quarantine(stored, "assistant", {lonely.id: "uncorroborated_edit"}, NOW)
    decide(stored, [lonely.id], Decision.ACCEPTED, reviewer="r", now=NOW)
    assert held_reasons(stored, settings) == {}


def held_reasons(database: Database, settings: DefenceSettings) -> dict[int, str]:
    lonely = edit(4, "k/ann", "The text that ann wanted.", created_at=NOW)
    defended = defend_stored(database, "assistant", [lonely], settings, NOW)
    return {int(each.pair.id, 16): each.reason.value for each in defended.quarantined}
