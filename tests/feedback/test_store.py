"""The shared database, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.interactions import FeedbackEvent, Interaction
from feedback.pairs import PreferencePair
from feedback.recording import parse_interaction
from feedback.signals import latest
from feedback.store import (
    StoredQuery,
    _stored_page,
    _to_row,
    event_row,
    get_interaction,
    interaction_row,
    save_records,
)
from pawl.database import Database, open_database, require_current_schema, revisions, upgrade
from pawl.errors import ConfigurationError
from pawl.schema import metadata
from pawl.settings import DatabaseSettings
from tests.feedback.test_recording import ANY_TEXT, exchange, request_of, whole
from tests.feedback.whole_history import whole_history
from tests.pawl.records import feedback, interaction_id


def interaction(number: int = 0, question: str = "q", answer: str = "a", **changes: Any) -> Interaction:
    name = f"{number:048x}"
    facts = exchange(id=name, completion_id=f"chatcmpl-{name}", **changes)
    return parse_interaction(facts, request_of(question), whole(answer))


def event(number: int, of: int, value: Any = "up", **changes: Any) -> FeedbackEvent:
    facts: dict[str, Any] = {"id": f"{number:032x}", "user_id": None, "created_at": float(number)}
    return feedback(interaction_id(of), value=value, **(facts | changes))


def save(database: Database, *records: Interaction | FeedbackEvent) -> None:
    answers = [interaction_row(record) for record in records if isinstance(record, Interaction)]
    events = [event_row(record) for record in records if isinstance(record, FeedbackEvent)]
    save_records(database, answers, events, [])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(asked=ANY_TEXT, answered=ANY_TEXT, number=st.integers(1, 2**160))
def test_any_text_comes_back_as_it_was(database: Database, asked: str, answered: str, number: int) -> None:
    before = interaction(number, asked, answered)
    if (known := get_interaction(database, before.id)) is None:
        save(database, before)
        known = get_interaction(database, before.id)
        assert known == before


@pytest.mark.parametrize("text", ["\x00", "\ud800", "é" * 500_000, "'; DROP TABLE interactions; --", "%s %(a)s :a"])
def test_hard_texts(database: Database, text: str) -> None:
    before = interaction(1, text, text)
    said = event(1, 1, text, type="edit", reason=text[:9], comment=text, tags={"a": text[:9]})
    save(database, before, said)
    assert get_interaction(database, before.id) == before
    _, events = whole_history(database, "assistant")
    assert said in events


def test_a_row_holds_plain_values_and_shares_nothing_with_its_record() -> None:
    before = interaction(1, "q", "a")
    said = event(1, 1, tags={"a": "b"})
    pair = PreferencePair(
        "p", "assistant", "edit", ({"role": "user"},), {}, {}, 1.0, 1, ("/ada",), None, before.id, ("m",), 1.0, 0.0
    )
    rows = [interaction_row(before), event_row(said), _to_row(pair)]
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert [set(row) for row in rows] == [{field.name for field in fields(record)} for record in (before, said, pair)]


def test_saving_again_changes_nothing(database: Database) -> None:
    first = interaction(1, answer="first")
    save(database, first, event(1, 1))
    save(database, interaction(1, answer="second"), interaction(2), event(1, 1, "down"), event(2, 1, "down"))
    assert get_interaction(database, first.id) == first
    assert get_interaction(database, f"{2:048x}") is not None
    _, events = whole_history(database, "assistant")
    assert [row.value for row in events] == ["up", "down"]


def test_a_batch_is_stored_whole_or_not_at_all(database: Database) -> None:
    broken = {**interaction_row(interaction(2)), "latency_ms": None}
    with pytest.raises(Exception, match=r"(?i)null"):
        save_records(database, [interaction_row(interaction(1)), broken], [], [])
    assert get_interaction(database, f"{1:048x}") is None


def test_many_writers_of_the_same_rows(database: Database) -> None:
    rows = [interaction(number) for number in range(20)]
    failures: list[sa.exc.SQLAlchemyError] = []

    def write() -> None:
        try:
            for row in rows:
                save(database, row)
        except sa.exc.SQLAlchemyError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(get_interaction(database, row.id) == row for row in rows)


def test_the_last_event_counts(database: Database) -> None:
    save(database, interaction(1), event(2, 1, "down"), event(1, 1), event(3, 1, None, is_retraction=True))
    _, events = whole_history(database, "assistant")
    assert latest(events) == {}


def test_nothing_is_known_of_what_is_not_there(database: Database) -> None:
    assert get_interaction(database, "0" * 48) is None


def test_listing_a_key_s_completions_walks_an_index(database: Database) -> None:
    """Else every page would read the whole table."""
    query = StoredQuery("chat.completions", "k", "", None, {}, None, 20, is_newest_first=True)
    text = str(_stored_page(query, None).compile(database.engine, compile_kwargs={"literal_binds": True}))
    with database.write() as connection:
        if not database.is_sqlite:  # A planner may rightly scan a table this small, unless it is told not to.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        plan = str(connection.exec_driver_sql(f"{explain} {text}").all())
    assert "ix_interactions_key_id_id" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan


def test_the_migrations_make_the_schema_the_code_declares(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_upgrading_twice_and_at_once(database_url: str) -> None:
    def upgrade_it() -> None:
        database = open_database(DatabaseSettings(url=database_url))
        found.append(upgrade(database))
        database.close()

    found: list[str] = []
    threads = [threading.Thread(target=upgrade_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    upgrade_it()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_an_older_schema_is_refused(database_url: str) -> None:
    database = open_database(DatabaseSettings(url=database_url))
    with pytest.raises(ConfigurationError, match="pawl db upgrade"):
        require_current_schema(database)
    upgrade(database)
    require_current_schema(database)
    found, needed = revisions(database)
    assert found == needed
    database.close()
