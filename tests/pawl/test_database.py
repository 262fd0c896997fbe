"""The shared database: upgraded by several processes at once, and clear about what is wrong."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from feedback.store import event_row
from pawl.database import Database, _alembic, open_database, require_current_schema, revisions, upgrade
from pawl.errors import ConfigurationError, Unreachable
from pawl.schema import feedback_events, leases
from pawl.settings import DatabaseSettings
from tests.pawl.conftest import newest_revision
from tests.pawl.records import feedback, interaction_id
from tests.servers import PostgreSQL, free_port

ROOT = Path(__file__).parents[2]


def test_several_processes_upgrade_at_once(database_url: str, tmp_path: Path) -> None:
    environ = {**os.environ, "PAWL_DATABASE__URL": database_url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pawl.cli.main", "db", "upgrade"]
    started = [
        subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert ends == [(f"schema at {newest_revision()}\n", "", 0)] * 3
    database = open_database(DatabaseSettings(url=database_url))
    require_current_schema(database)
    database.close()


def test_an_upgrade_takes_as_long_as_it_takes(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_database(DatabaseSettings(url=database_url))
    really_upgrade = command.upgrade
    found: list[object] = []

    def watched(config: Config, revision: str) -> None:
        if not database.is_sqlite:
            found.append(config.attributes["connection"].exec_driver_sql("SHOW statement_timeout").scalar_one())
        really_upgrade(config, revision)

    monkeypatch.setattr(command, "upgrade", watched)
    upgrade(database)
    assert found == ([] if database.is_sqlite else ["0"])
    with database.read() as connection:
        if not database.is_sqlite:
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "2min"
    database.close()


def test_texts_are_written_in_the_faster_compression(postgresql: PostgreSQL) -> None:
    database = open_database(DatabaseSettings(url=postgresql.create_database("compression")))
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE told (said text)")
        connection.exec_driver_sql("INSERT INTO told SELECT repeat('again and ', 1000)")
    with database.read() as connection:
        found = connection.exec_driver_sql("SELECT pg_column_compression(said) FROM told").scalar_one()
        known = connection.exec_driver_sql(
            "SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = %s", ("default_toast_compression",)
        )
        assert found == ("lz4" if known.scalar_one() else "pglz")
    database.close()


def test_the_planners_samples_of_older_versions_go(postgresql: PostgreSQL) -> None:
    """Names and texts would stay in them whoever is erased."""
    name = f"test_{uuid.uuid4().hex}"
    database = open_database(DatabaseSettings(url=postgresql.create_database(name)))
    with database.write() as connection:
        command.upgrade(_alembic(connection), "0003")
        rows = [feedback(interaction_id(n), id=f"{n:032x}", user_id=f"ann-{n % 3}") for n in range(60)]
        connection.execute(feedback_events.insert(), [event_row(row) for row in rows])
        connection.exec_driver_sql("ANALYZE feedback_events")
    assert "ann-1" in samples(database)["user_id"]
    upgrade(database)
    after = samples(database)
    assert "user_id" not in after
    assert "interaction_id" in after
    with database.write() as connection:
        connection.exec_driver_sql("ANALYZE feedback_events")
    assert samples(database).keys() == after.keys()
    assert "ann-" not in str(samples(database))
    database.close()
    postgresql.drop_database(name)


def samples(database: Database) -> dict[str, str]:
    """What PostgreSQL keeps of the values of a table's columns."""
    query = "SELECT attname, (most_common_vals, histogram_bounds)::text FROM pg_stats WHERE tablename='feedback_events'"
    with database.read() as connection:
        return dict(map(tuple, connection.exec_driver_sql(query).all()))


def test_an_empty_database_says_which_command_to_run(database_url: str) -> None:
    database = open_database(DatabaseSettings(url=database_url))
    assert revisions(database)[0] is None
    with pytest.raises(ConfigurationError, match="pawl db upgrade"):
        require_current_schema(database)
    assert upgrade(database) == upgrade(database)
    require_current_schema(database)
    database.close()


def test_new_rows_are_told_from_those_that_are_there(database: Database) -> None:
    rows = [{"name": str(number), "holder": "a", "epoch": 1, "expires_at": 0.0} for number in range(1210)]
    with database.write() as connection:
        counts = [database.insert_new(connection, leases, rows[:n]) for n in (1, 1, 2, 1200, 1210, 1210)]
    assert counts == [1, 0, 1, 1198, 10, 0]


def test_a_connection_that_outlives_its_pool_is_closed_when_it_comes_back(database_url: str) -> None:
    database = open_database(DatabaseSettings(url=database_url))
    for _ in range(2):  # The second time it is taken out only after the pool was closed.
        with database.read() as connection:
            driver = connection.connection.driver_connection
            database.close()
            assert driver is not None
            assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
        with pytest.raises((sqlite3.ProgrammingError, psycopg.OperationalError), match="closed"):
            driver.cursor().execute("SELECT 1")


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    password_file = tmp_path / "password"
    password_file.write_text("hunter2-hunter2\n")
    url = f"postgresql://pawl@127.0.0.1:{free_port()}/pawl"
    database = open_database(DatabaseSettings(url=url, password_file=password_file, connect_timeout_s=1.0))
    with pytest.raises(Unreachable) as caught:
        revisions(database)
    assert "127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    database.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_text("no database at all, but long enough to be looked at")
    database = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/junk.db"))
    with pytest.raises(Unreachable, match=r"junk\.db"):
        revisions(database)
    database.close()


@pytest.mark.parametrize("url", ["postgresql://h:port/db", "sqlite:////proc/nowhere/pawl.db"])
def test_an_address_that_cannot_be_used_is_a_matter_of_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"database\.url"):
        open_database(DatabaseSettings(url=url))
