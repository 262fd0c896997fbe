"""Mining and the removal of texts at the same moment, on a server: whoever comes first, no pair is left of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback.mining import mine_alias
from feedback.retention import Limits, prune
from feedback.store import delete_texts, load_pairs
from feedback.text_lock import MINER_PATIENCE_S, hold_off_removal
from feedback.tombstones import Subject
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings
from tests.feedback.people import eraser
from tests.feedback.test_lock_order import waits_for_a_lock
from tests.pawl.records import feedback, interaction_id, save, served, thumb
from tests.servers import PostgreSQL
from tests.serving.waiting import eventually

ANN = Subject("ann")
DISLIKED, EDITED = interaction_id(2), interaction_id(3)
Deed = Callable[[Database, Path], None]


def mine(database: Database, _directory: Path) -> None:
    mine_alias(database, "assistant", 100.0)


def erase_ann(database: Database, directory: Path) -> None:
    at_work = eraser(database, directory)
    at_work.erase(at_work.bury(at_work.tombstone(ANN, "")), ANN)


def delete_completion(database: Database, _directory: Path) -> None:
    assert delete_texts(database, DISLIKED, {})


def forget_everything(database: Database, _directory: Path) -> None:
    prune(database, Limits(1.0, None, None), 1e9, batch_rows=10, max_batches=10)


class Beside(threading.Thread):
    """Something done at the same time, with a pool of connections of its own."""

    def __init__(self, deed: Deed, url: str, directory: Path) -> None:
        super().__init__(daemon=True)
        self._deed, self._url, self._directory = deed, url, directory
        self.failures: list[BaseException] = []

    def run(self) -> None:
        database = open_database(DatabaseSettings(url=self._url))
        try:
            self._deed(database, self._directory)
        except BaseException as exc:  # noqa: BLE001 - told to the test
            self.failures.append(exc)
        finally:
            database.close()


@pytest.fixture
def url(
    postgresql: PostgreSQL, postgresql_template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Two pairs to be made: of two answers to one question one was liked, and to another question one was bettered."""
    monkeypatch.setattr("feedback.store.PATIENCE_S", 60)  # On a slow machine two seconds are over before mining is.
    name = "text_lock_" + tmp_path.name.translate(str.maketrans("-[]", "___"))
    url = postgresql.create_database(name, postgresql_template)
    database = open_database(DatabaseSettings(url=url))
    answers = [served(1), served(2), served(3, question="When do I water roses?")]
    save(database, answers, [thumb(1, "up"), thumb(2, "down"), feedback(EDITED, "edit", "At dawn.", created_at=3.0)])
    database.close()
    yield url
    postgresql.drop_database(name)


def do_while_another_comes(first: Deed, at: str, other: Deed, url: str, directory: Path) -> bool:
    """Do something; when it comes to a statement that begins like this, something else begins. Whether that waits."""
    database = open_database(DatabaseSettings(url=url))
    beside = Beside(other, url, directory)
    waited: list[bool] = []

    def let_it_come(_connection: object, _cursor: object, statement: str, *_given: Any) -> None:
        if statement.startswith(at) and not waited:
            waited.append(False)
            beside.start()
            eventually(lambda: waits_for_a_lock(database) or not beside.is_alive(), within_s=60)
            waited[0] = beside.is_alive()

    sa.event.listen(database.engine, "before_cursor_execute", let_it_come)
    first(database, directory)
    beside.join(60)
    database.close()
    assert not beside.is_alive()
    assert beside.failures == []
    return waited == [True]


def pairs_left(url: str) -> int:
    database = open_database(DatabaseSettings(url=url))
    n_left = len(load_pairs(database, "assistant"))
    database.close()
    return n_left


@pytest.mark.parametrize("remove", [erase_ann, delete_completion])
def test_who_removes_texts_while_a_pair_is_added_removes_it_too(url: str, tmp_path: Path, remove: Deed) -> None:
    assert do_while_another_comes(mine, "INSERT INTO pairs", remove, url, tmp_path)
    assert pairs_left(url) == (0 if remove is erase_ann else 1)


def test_what_is_too_old_stays_until_the_pair_is_there(url: str, tmp_path: Path) -> None:
    """The pair itself is kept as long as pairs are."""
    assert do_while_another_comes(mine, "INSERT INTO pairs", forget_everything, url, tmp_path)
    assert pairs_left(url) == 2


@pytest.mark.parametrize(
    ("remove", "last"),
    [
        (erase_ann, "DELETE FROM feedback_events"),
        (delete_completion, "DELETE FROM shadow_answers"),
        (forget_everything, "DELETE FROM interactions"),
    ],
)
def test_no_pair_is_added_of_texts_that_are_being_removed(url: str, tmp_path: Path, remove: Deed, last: str) -> None:
    assert do_while_another_comes(remove, last, mine, url, tmp_path)
    assert pairs_left(url) == (1 if remove is delete_completion else 0)


def test_a_client_does_not_wait_for_long_and_nothing_is_half_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback.store.PATIENCE_S", 1)
    database = open_database(DatabaseSettings(url=url))
    with database.write() as connection:
        hold_off_removal(connection)
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            delete_texts(database, DISLIKED, {})
    assert delete_texts(database, DISLIKED, {})
    database.close()


def test_a_miner_waits_longer_and_other_locks_as_long_as_ever(url: str) -> None:
    database = open_database(DatabaseSettings(url=url))
    asked: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    with database.write() as connection:
        before = connection.exec_driver_sql("SHOW lock_timeout").scalar_one()
        hold_off_removal(connection)
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar_one() == before
    database.close()
    assert f"SET LOCAL lock_timeout = '{MINER_PATIENCE_S}s'" in asked
