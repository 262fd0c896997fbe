"""What is known of completions when feedback on them comes in, and what becomes of words that nobody may keep."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.standing import NOT_VISIBLE, Asked, Last, Standing, completion_of_uuid, standings
from feedback.store import event_row, interaction_row, save_records
from feedback.unstored import meetings, withhold_texts
from pawl.database import Database
from tests.feedback.test_store import event, interaction, save

Arrivals = list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]
RUNS = itertools.count(100, 100)
"""Each example has ids of its own."""


def asked(number: int) -> Asked:
    return Asked(f"{number:048x}", f"fb_thumbs_{number:048x}")


def test_completions_and_their_last_events(database: Database) -> None:
    save(database, interaction(1), replace(interaction(2), is_stored=False, user_id="ada"), interaction(3))
    save(database, event(1, 1), event(2, 1, None, is_retraction=True), event(4, 4, "down"))
    shown = standings(database, [asked(number) for number in (3, 1, 4, 2, 5, 1)])
    one = Standing("assistant", "control", f"chatcmpl-{1:048x}", last=Last(2.0, is_retraction=True))
    key_id = interaction(1).key_id
    one = one._replace(key_id=key_id, user_id=interaction(1).user_id)
    assert shown[1] == shown[5] == one
    assert shown[0] == one._replace(completion_id=f"chatcmpl-{3:048x}", last=None)
    assert shown[2] == Standing(last=Last(4.0, is_retraction=False))
    assert (shown[3].is_stored, shown[3].user_id, shown[3].last) == (False, "ada", None)
    assert shown[4] == NOT_VISIBLE
    assert standings(database, []) == []


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans()), max_size=12))
def test_of_a_history_the_newest_counts(database: Database, drawn: list[tuple[int, int, bool]]) -> None:
    run = next(RUNS)
    events = [
        event(run + place, run + of, None if gone else "up", created_at=float(at), is_retraction=gone)
        for place, (of, at, gone) in enumerate(drawn)
    ]
    save(database, *events)
    known = standings(database, [asked(run + of) for of in range(1, 5)])
    for of, standing in enumerate(known, start=1):
        own = [one for one in events if one.feedback_id == asked(run + of).feedback_id]
        newest = max(own, key=lambda one: (one.created_at, one.id), default=None)
        assert standing.last == (Last(newest.created_at, newest.is_retraction) if newest else None)


def test_a_uuid_names_the_completion_whose_id_begins_with_it(database: Database) -> None:
    name = "0" * 20 + "1" + "0" * 26 + "2"
    save(database, replace(interaction(7), id=name, completion_id=f"chatcmpl-{name}"))
    assert completion_of_uuid(database, name[:32]) == f"chatcmpl-{name}"
    assert completion_of_uuid(database, "0" * 20 + "2" + "0" * 11) is None


def test_words_about_what_is_not_stored_go_and_the_signal_stays(database: Database) -> None:
    quiet, loud = replace(interaction(1), is_stored=False), interaction(2)
    words: dict[str, Any] = {"reason": "r", "comment": "c", "tags": {"a": "b"}}
    said = [
        replace(event(number, of, "w", type=kind), feedback_id=f"fb_{kind}_{of}", **words)
        for number, (of, kind) in enumerate([(1, "edit"), (1, "comment"), (2, "edit")])
    ]
    gone = event(9, 1, None, type="edit", is_retraction=True)
    save(database, quiet, loud, *said, gone)
    rows = [interaction_row(one) for one in (quiet, loud)], [event_row(one) for one in (*said, gone)]
    assert meetings(*rows) == {quiet.id, loud.id}
    withhold_texts(database, meetings(*rows))
    with database.read() as connection:
        found = {row.id: row for row in connection.exec_driver_sql("SELECT * FROM feedback_events")}
    for one in said[:2]:
        assert (found[one.id].value, found[one.id].reason, found[one.id].comment, found[one.id].tags) == (
            ('""', None, None, None)
        )
    assert (found[said[2].id].value, found[said[2].id].reason) == ('"w"', '"r"')
    assert found[gone.id].value == "null"


def test_only_words_and_unstored_answers_are_looked_at() -> None:
    assert meetings([interaction_row(interaction(1))], [event_row(event(1, 1))]) == set()
    assert meetings([], [event_row(event(1, 3, comment="c"))]) == {f"{3:048x}"}


def test_whichever_arrives_last_the_words_go(database: Database) -> None:
    """Both at once, many times: the later transaction sees what the other has committed."""
    numbers = range(1, 21)
    start = threading.Barrier(2)

    def arrive(rows: Arrivals) -> None:
        start.wait(30)
        for answers, said in rows:
            save_records(database, answers, said, [])
            withhold_texts(database, meetings(answers, said))

    quiet: Arrivals = [([interaction_row(replace(interaction(number), is_stored=False))], []) for number in numbers]
    words: Arrivals = [([], [event_row(event(number, number, "w", type="edit"))]) for number in numbers]
    threads = [threading.Thread(target=arrive, args=(rows,)) for rows in (quiet, words)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        values = connection.exec_driver_sql("SELECT value FROM feedback_events").scalars().all()
    assert list(values) == ['""'] * len(numbers)
