"""Erasure in the database: all of one person's and nothing of anybody else's, whenever it is interrupted or undone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback import erasure_store
from feedback.erasure import Report, is_letter_of, is_pair_of, made_at
from feedback.erasure_store import SCANNED, count_for, models_of
from feedback.interactions import FeedbackEvent, Interaction
from feedback.mining import mine_alias
from feedback.recording import event_to_json, exchange_to_json
from feedback.retention import DAY_S, Limits, prune
from feedback.spool import SpoolRecord
from feedback.store import load_pairs
from feedback.storing import RecordStore
from feedback.tombstone_store import FILE, TombstoneBook, bury, has_open
from feedback.tombstones import Person, Subject
from pawl.audit import latest_events
from pawl.database import Database, open_database, upgrade
from pawl.registry import get_model
from pawl.schema import (
    dead_letters,
    feedback_events,
    interactions,
    limit_slots,
    limit_windows,
    metadata,
    pairs,
    rollouts,
)
from pawl.settings import DatabaseSettings
from tests.feedback.people import (
    ADAPTER,
    CHILD,
    NOW,
    SECRET,
    Dump,
    dump,
    eraser,
    fill,
    history_of,
    mentions,
    restore,
    said_to,
    suffix_of,
    thumb_on,
    train,
)
from tests.feedback.test_recording import exchange, request_of, whole
from tests.pawl.records import feedback, save
from tests.servers import PostgreSQL

ROOT = Path(__file__).parents[2]
ANN = Subject("ann")
PERSONAL = {
    "interactions", "feedback_events", "scores", "judge_verdicts", "shadow_answers", "pairs", "dead_letters",
    "limit_windows", "limit_slots",
}  # fmt: skip
IMPERSONAL = {
    "models", "runs", "routes", "rollouts", "decisions", "leases", "api_keys", "table_changes", "audit_events",
    "tombstones", "erasure_places", "pair_reviews", "retrain_checks", "shadow_runs", "webhook_events",
    "webhook_endpoints", "webhook_deliveries",
}  # fmt: skip


def erase(database: Database, directory: Path, subject: Subject = ANN) -> Report:
    at_work = eraser(database, directory)
    return at_work.erase(at_work.bury(at_work.tombstone(subject, "ticket 7")), subject)


def without_notes(found: Dump) -> Dump:
    """What is not about the erasure itself."""
    return {name: rows for name, rows in found.items() if name not in ("tombstones", "audit_events", "erasure_places")}


def ids_of(found: Dump, table: str) -> set[str]:
    return {row["id"] for row in found[table]}


def test_all_of_one_person_and_nothing_of_another(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 4), history_of("bob", 30, 4))
    before = dump(database)
    report = erase(database, tmp_path)
    after = dump(database)
    assert mentions(before, "ann") == ["feedback_events", "interactions", "pairs"]
    assert mentions(after, "ann") == []
    assert report.as_json()["counts"] == {
        "interactions": 8, "feedback": 8, "scores": 8, "verdicts": 0, "shadow_answers": 0, "pairs": 4,
        "dead_letters": 0, "limits": 0,
    }  # fmt: skip
    for table in ("interactions", "feedback_events", "pairs", "scores"):
        assert [row for row in before[table] if "bob" in str(row)] == [row for row in after[table] if "bob" in str(row)]
    assert ids_of(after, "interactions") == ids_of(before, "interactions")
    assert mine_alias(database, "assistant", NOW).n_added == 0
    assert len(load_pairs(database, "assistant")) == 4


def test_the_numbers_stay_as_if_of_nobody(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10))
    kept = ("created_at", "alias", "model", "key_id", "experiment", "served_variant", "latency_ms", "prompt_tokens")
    before = dump(database)["interactions"]
    erase(database, tmp_path)
    after = dump(database)["interactions"]
    by_id = {row["id"]: row for row in after}
    for row in before:
        assert {name: by_id[row["id"]][name] for name in kept} == {name: row[name] for name in kept}
    assert {row["user_id"] for row in after} == {None}
    assert len({row["unit_id"] for row in after}) == len(after)
    assert not any(row["is_analysed"] or row["is_stored"] or row["is_complete"] for row in after)


def test_what_is_sent_later_is_new(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10), history_of("ann", int(NOW) + 10))
    erase(database, tmp_path)
    with database.read() as connection:
        users = connection.execute(sa.select(interactions.c.user_id, sa.func.count()).group_by("user_id")).all()
    assert dict(map(tuple, users)) == {None: 4, "ann": 4}
    assert len(load_pairs(database, "assistant")) == 2


def test_a_key_limits_it(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, key_id="k1"), history_of("ann", 20, key_id="k2"))
    erase(database, tmp_path, Subject("ann", "k1"))
    left = dump(database)
    assert {row["key_id"] for row in left["interactions"] if row["user_id"]} == {"k2"}
    assert {row["key_id"] for row in left["feedback_events"]} == {"k2"}
    erase(database, tmp_path, Subject("ann"))
    assert mentions(dump(database), "ann") == []


def test_one_completion(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10))
    report = erase(database, tmp_path, Subject(completion=suffix_of(10, "ann")))
    assert report.counts["interactions"] == 1
    assert sum(row["user_id"] is None for row in dump(database)["interactions"]) == 1
    assert len(load_pairs(database, "assistant")) == 1


def test_a_dry_run_counts_what_will_go(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 3), history_of("bob", 30))
    train(database, "ann")
    person = Person("ann", None, NOW)
    with database.read() as connection:
        foreseen, learned = count_for(connection, person), models_of(connection, person)
    report = erase(database, tmp_path)
    assert dict(report.counts) == dict(+foreseen)
    assert learned == list(report.models) == [ADAPTER, CHILD]


def test_models_that_learned_from_it_are_marked_and_the_lineage_stays(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 5), history_of("bob", 30))
    train(database, "ann")
    report = erase(database, tmp_path)
    assert report.as_json()["runs"] == {"r0001": 5}
    assert get_model(database, ADAPTER).manifest == {
        "rank": 8, "erased": {"pairs": 5, "through": None, "at": NOW},
    }  # fmt: skip
    assert get_model(database, CHILD).manifest["erased"] == {"pairs": 0, "through": ADAPTER, "at": NOW}
    shells = [row for row in dump(database)["pairs"] if row["first_run"]]
    assert len(shells) == 5
    assert {(row["prompt"], row["chosen"], row["rejected"], row["principals"]) for row in shells} == {
        ("[]", "{}", "{}", "[]")
    }
    mine_alias(database, "assistant", NOW)
    assert sum(row["first_run"] is not None for row in dump(database)["pairs"]) == 5


def test_it_is_written_down_without_a_name(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10))
    erase(database, tmp_path)
    (line,) = latest_events(database)
    assert (line.actor, line.action) == ("tester", "erase")
    assert "ann" not in f"{line.subject} {line.detail}"
    assert "ann" not in (tmp_path / "state" / FILE).read_text()


def test_twice_is_once(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10), history_of("bob", 30))
    erase(database, tmp_path)
    once = without_notes(dump(database))
    again = erase(database, tmp_path)
    assert without_notes(dump(database)) == once
    assert again.counts["interactions"] == 4  # The same tombstone, so the same report.


# Whoever's a record is


def test_a_pair_is_known_by_its_completion_when_a_backend_rated_it(database: Database, tmp_path: Path) -> None:
    """And when the interactions are no longer kept, so that nothing else says so."""
    served, _ = history_of("ann", 10, 1, key_id="k1")
    events = [thumb_on(one, value, user_id=None) for one, value in zip(served, ("up", "down"), strict=True)]
    fill(database, (served, events))
    with database.write() as connection:
        connection.execute(interactions.delete())
    assert [pair.principals for pair in load_pairs(database, "assistant")] == [("k1/",)]
    erase(database, tmp_path, Subject("bob"))
    assert len(load_pairs(database, "assistant")) == 1
    erase(database, tmp_path)
    assert load_pairs(database, "assistant") == []


def test_an_id_that_is_none_proves_nothing() -> None:
    row = {"principals": '["k1/"]', "chosen_interaction": None, "rejected_interaction": "not an id"}
    assert not is_pair_of(Person("ann", None, NOW), SECRET, row)
    assert made_at("not an id") == 0.0


def letter(number: int, payload: str) -> dict[str, Any]:
    return {"id": f"{number}", "kind": "interaction", "payload": payload, "reason": "ValueError", "created_at": 1.0}


def meta_of(user: str | None, number: int, **changes: Any) -> str:
    suffix = suffix_of(number, user or "")
    return exchange_to_json(exchange(id=suffix, user_id=user, key_id="", created_at=float(number), **changes)).decode()


LETTERS = {
    "ann's": (meta_of("ann", 1) + "\nquestion", False),
    "ann's, later": (meta_of("ann", int(NOW) + 1) + "\nquestion", True),
    "bob's, who speaks of ann": (meta_of("bob", 2) + "\nann?", True),
    "ann's, her name taken out": (meta_of("ann", 3).replace('"user_id":"ann"', '"user_id":"[NAME_1]"'), False),
    "unreadable, of ann": ('\\xff{"user_id":"ann"', False),
    "unreadable, of somebody": ('\\xff{"user_id":"ben"', True),
    "unreadable, of somebody with a longer name": ('\\xff{"user_id":"joanna","text":"ann?"', True),
}


def test_dead_letters(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        rows = [letter(number, payload) for number, (payload, _) in enumerate(LETTERS.values())]
        connection.execute(dead_letters.insert(), rows)
    report = erase(database, tmp_path)
    left = {row["payload"] for row in dump(database)["dead_letters"]}
    assert left == {payload for payload, stays in LETTERS.values() if stays}
    assert report.counts["dead_letters"] == 3


def test_few_dead_letters_are_read_at_once(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be a megabyte."""
    payloads = [meta_of("ann" if number % 3 else "bob", number) for number in range(1, 51)]
    with database.write() as connection:
        connection.execute(dead_letters.insert(), [letter(n, payload) for n, payload in enumerate(payloads)])
    n_read: list[int] = []
    really_write = Database.write

    def looked(person: Person, secret: bytes, payload: str) -> bool:
        n_read[-1] += 1
        return is_letter_of(person, secret, payload)

    @contextmanager
    def counted(database: Database) -> Iterator[sa.Connection]:
        n_read.append(0)
        with really_write(database) as connection:
            yield connection

    monkeypatch.setattr(erasure_store, "is_letter_of", looked)
    monkeypatch.setattr(Database, "write", counted)
    assert erase(database, tmp_path).counts["dead_letters"] == 34
    assert [n for n in n_read if n] == [20, 20, 10]


def test_limits(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        for subject in ("k1/ann", "k2/ann", "k1/bob", "k1"):
            connection.execute(limit_windows.insert(), {"subject": subject, "name": "n", "used": 1, "ends_at": 9e9})
            connection.execute(
                limit_slots.insert(), {"subject": subject, "holder": "h", "n_slots": 1, "expires_at": 9e9}
            )
    erase(database, tmp_path, Subject("ann", "k1"))
    assert {row["subject"] for row in dump(database)["limit_windows"]} == {"k2/ann", "k1/bob", "k1"}
    erase(database, tmp_path, Subject("ann"))
    assert {row["subject"] for row in dump(database)["limit_slots"]} == {"k1/bob", "k1"}


def test_no_table_is_forgotten() -> None:
    """Whoever adds one says here whether anything of a person can be in it, and has erasure take it out if so."""
    assert set(metadata.tables) == PERSONAL | IMPERSONAL
    for name, columns in SCANNED.items():
        assert set(columns) <= set(metadata.tables[name].c.keys())


# On the way while it was erased


def record_of(one: Interaction) -> SpoolRecord:
    facts = exchange(
        id=one.id, user_id=one.user_id, unit_id=one.unit_id, key_id=one.key_id, created_at=one.created_at,
        experiment=one.experiment, is_analysed=one.is_analysed, latency_ms=one.latency_ms,
    )  # fmt: skip
    return SpoolRecord(0, "interaction", one.id, one.id, 1.0, exchange_to_json(facts), request_of("hi"), whole("yes"))


def record_of_event(event: FeedbackEvent) -> SpoolRecord:
    return SpoolRecord(0, "feedback", event.id, event.feedback_id, 1.0, event_to_json(event), None, None)


def store(database: Database, directory: Path, *records: SpoolRecord) -> None:
    book = TombstoneBook(database, directory / "state" / FILE, SECRET, clock=lambda: NOW)
    RecordStore(database, clock=lambda: NOW, tombstones=book).store(records)


def test_before_or_after_it_arrives_is_the_same(database: Database, tmp_path: Path) -> None:
    served, events = history_of("ann", 10)
    served += [said_to("bob", 20)]
    records = [*map(record_of, served), *map(record_of_event, events)]
    store(database, tmp_path, *records)
    empty: Dump = {name: [] for name in metadata.tables}
    erase(database, tmp_path)
    erased_there = without_notes(dump(database))
    stones = dump(database)["tombstones"]
    restore(database, {**empty, "tombstones": stones})
    store(database, tmp_path, *records)
    assert without_notes(dump(database)) == erased_there
    store(database, tmp_path, *records)  # An old spool, once more.
    assert without_notes(dump(database)) == erased_there


def test_feedback_without_a_name_goes_with_what_it_is_about(database: Database, tmp_path: Path) -> None:
    """By a token from a browser. Whether it comes before the completion or after."""
    first, second = said_to("ann", 10), said_to("ann", 11)
    by_token = [thumb_on(one, "up", user_id=None) for one in (first, second)]
    store(database, tmp_path, record_of_event(by_token[0]), record_of(second))
    erase(database, tmp_path)
    store(database, tmp_path, record_of(first), record_of_event(by_token[1]))
    later = thumb_on(second, "down", user_id=None, created_at=NOW + 5)
    store(database, tmp_path, record_of_event(later), record_of(said_to("ann", int(NOW) + 9)))
    found = dump(database)
    assert found["feedback_events"] == []
    assert sorted(row["user_id"] or "" for row in found["interactions"]) == ["", "", "ann"]


def test_what_cannot_be_stored_of_an_erased_person_is_not_kept_either(database: Database, tmp_path: Path) -> None:
    erase(database, tmp_path)
    poison = record_of(said_to("ann", 10))._replace(meta=meta_of("ann", 10, latency_ms={"a": 1}).encode())
    unreadable = record_of(said_to("bob", 11))._replace(meta=b"\xff{")
    store(database, tmp_path, poison, unreadable)
    (kept,) = dump(database)["dead_letters"]
    assert kept["payload"].startswith("\\xff")


def test_who_inserts_now_is_waited_for(database: Database, tmp_path: Path) -> None:
    """Or an erasure could delete everything there is, and then see more appear."""
    at_work = eraser(database, tmp_path)
    book = TombstoneBook(database, tmp_path / FILE, SECRET, clock=lambda: NOW)
    is_buried = threading.Event()

    def bury_ann() -> None:
        at_work.bury(at_work.tombstone(Subject("ann"), ""))
        is_buried.set()

    thread = threading.Thread(target=bury_ann)
    with database.write() as connection:
        assert not book.within(connection)
        thread.start()
        assert not is_buried.wait(0.3)
    thread.join(30)
    assert is_buried.is_set()
    with database.write() as connection:
        assert book.within(connection)


# Interrupted


class Killed(BaseException):
    pass


@contextmanager
def killed_at(write: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop where the database was about to be written for the n-th time, or just after."""
    really_write = Database.write
    n_writes = 0

    @contextmanager
    def counted(database: Database) -> Iterator[sa.Connection]:
        nonlocal n_writes
        n_writes += 1
        if n_writes == write:
            raise Killed
        with really_write(database) as connection:
            yield connection

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", counted)
        try:
            yield
        except Killed:
            return
    raise AssertionError("it ended before")


def writes_of_an_erasure(database: Database, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    n_writes = 0
    really_write = Database.write

    def counted(database: Database) -> Any:
        nonlocal n_writes
        n_writes += 1
        return really_write(database)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", counted)
        erase(database, directory)
    return n_writes


def test_it_goes_on_wherever_it_was_killed(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody has the name any more: whoever goes on has only the digest."""
    fill(database, history_of("ann", 10, 3), history_of("bob", 30))
    train(database, "ann")
    full = dump(database)
    n_writes = writes_of_an_erasure(database, tmp_path / "whole", monkeypatch)
    wanted = dump(database)
    assert n_writes > 8
    for write in range(1, n_writes + 1):
        directory = tmp_path / f"killed-{write}"
        restore(database, full)
        with killed_at(write, monkeypatch):
            erase(database, directory)
        TombstoneBook(database, directory / "state" / FILE, SECRET, clock=lambda: NOW).copy_both_ways()
        eraser(database, directory).finish_open()
        found = dump(database)
        assert without_notes(found) == without_notes(wanted), write
        assert [row["report"] for row in found["tombstones"]] == [row["report"] for row in wanted["tombstones"]]
        assert not has_open(database)


PROCESS = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from feedback.tombstones import Subject
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings
from tests.feedback.people import eraser
really_write, n = Database.write, 0
@contextmanager
def counted(database):
    global n
    n += 1
    with really_write(database) as connection:
        if n == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield connection
Database.write = counted
database = open_database(DatabaseSettings(url=sys.argv[1]))
at_work = eraser(database, Path(sys.argv[2]))
at_work.erase(at_work.bury(at_work.tombstone(Subject("ann"), "")), Subject("ann"))
"""


def test_a_process_that_is_killed_in_a_transaction(database: Database, database_url: str, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 3), history_of("bob", 30))
    command = [sys.executable, "-c", PROCESS, database_url, str(tmp_path), "4"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert mentions(dump(database), "ann")
    assert has_open(database)
    eraser(database, tmp_path).finish_open()
    assert mentions(dump(database), "ann") == []
    assert len(load_pairs(database, "assistant")) == 2


# Undone by a backup


def test_a_restored_backup_brings_nothing_back(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 3), history_of("bob", 30))
    backup = dump(database)
    book = TombstoneBook(database, tmp_path / "another machine" / FILE, SECRET, clock=lambda: NOW)
    erase(database, tmp_path)
    book.copy_both_ways()
    wanted = without_notes(dump(database))
    restore(database, backup)
    assert mentions(dump(database), "ann")
    book.copy_both_ways()
    assert has_open(database)
    eraser(database, tmp_path).finish_open()
    assert without_notes(dump(database)) == wanted
    store(database, tmp_path, record_of(said_to("ann", 99)))
    assert mentions(dump(database), "ann") == []


def test_a_completion_too(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10))
    backup = dump(database)
    erase(database, tmp_path, Subject(completion=suffix_of(10, "ann")))
    wanted = without_notes(dump(database))
    restore(database, backup)
    TombstoneBook(database, tmp_path / "state" / FILE, SECRET, clock=lambda: NOW).copy_both_ways()
    eraser(database, tmp_path).finish_open()
    assert without_notes(dump(database)) == wanted


def test_an_erasure_of_another_secret_stays_open(database: Database, tmp_path: Path) -> None:
    """It would find nobody, and call that done."""
    fill(database, history_of("ann", 10))
    strange = eraser(database, tmp_path, secret=b"another secret of some length")
    bury(database, [strange.tombstone(Subject("ann"), "")], NOW, report={})
    assert eraser(database, tmp_path).finish_open() == []
    assert has_open(database)
    strange.finish_open()
    assert mentions(dump(database), "ann") == []


def test_tables_written_anew_hold_no_byte(postgresql: PostgreSQL, tmp_path: Path) -> None:
    database = open_database(DatabaseSettings(url=postgresql.create_database(f"test_{secrets.token_hex(8)}")))
    upgrade(database)
    words = f"unheard of {secrets.token_hex(16)}"
    questions = [({"role": "user", "content": f"{words} {n}"},) for n in range(40)]
    everybody = [said_to(("ann", "bob")[n % 2], n, prompt=questions[n]) for n in range(40)]
    save(database, everybody)
    assert is_in_files(postgresql, database, f"{words} 38")
    erase(database, tmp_path)
    is_there = [is_in_files(postgresql, database, f'{words} {n}"') for n in (2, 38, 3, 39)]
    database.close()
    assert is_there == [False, False, True, True]


def is_in_files(server: PostgreSQL, database: Database, text: str) -> bool:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CHECKPOINT"))
    files = [path for path in (server.directory / "data" / "base").rglob("*") if path.is_file()]
    return any(text.encode() in path.read_bytes() for path in files)


def test_sqlite_overwrites_what_it_deletes(tmp_path: Path) -> None:
    """So that retention leaves nothing either, which writes nothing anew."""
    path = tmp_path / "shared.db"
    database = open_database(DatabaseSettings(url=f"sqlite:///{path}"))
    upgrade(database)
    words = f"unheard of {secrets.token_hex(16)}"
    save(database, [said_to("ann", n, prompt=({"role": "user", "content": words * n},)) for n in (1, 500)])
    assert words.encode() in path.read_bytes()
    prune(database, Limits(1.0, None, None), 10 * DAY_S, batch_rows=10, max_batches=10)
    database.close()
    assert words.encode() not in path.read_bytes()


def test_late_feedback_without_its_interaction(database: Database, tmp_path: Path) -> None:
    save(database, [], [feedback(suffix_of(10, "ann"), "comment", "by ann", user_id="ann")])
    assert erase(database, tmp_path).counts["feedback"] == 1
    assert json.dumps(dump(database)["feedback_events"]) == "[]"


def test_the_indexes_it_relies_on(database: Database) -> None:
    with database.read() as connection:
        found = sa.inspect(connection)
        indexed = {
            (table.name, index["column_names"][0])
            for table in (interactions, feedback_events, pairs)
            for index in found.get_indexes(table.name)
        }
    assert {
        ("interactions", "user_id"),
        ("feedback_events", "user_id"),
        ("feedback_events", "interaction_id"),
        ("pairs", "chosen_interaction"),
        ("pairs", "rejected_interaction"),
    } <= indexed


def test_a_running_rollout_forgets_whom_it_counted_last(database: Database, tmp_path: Path) -> None:
    fill(database, history_of("ann", 10, 4), history_of("bob", 30, 4))
    states = {name: json.dumps({"canary": {}, "cursor": [11.0, name]}) for name in ("ann", "bob")}
    row = {"alias": "a", "champion": "c", "candidate": "d", "status": "ramp", "config": "{}", "config_hash": "h"}
    with database.write() as connection:
        connection.execute(
            rollouts.insert(),
            [
                {**row, "id": name, "state": state, "created_at": 1.0, "updated_at": 1.0}
                for name, state in states.items()
            ],
        )
    erase(database, tmp_path)
    with database.read() as connection:
        found = {one.id: json.loads(one.state)["cursor"] for one in connection.execute(sa.select(rollouts))}
    assert found["bob"] == [11.0, "bob"]
    assert found["ann"][0] == 11.0
    assert found["ann"][1] > "zoe"
