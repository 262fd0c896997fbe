"""The shared database: upgraded by several processes at once, and clear about what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pawl.database import Database, open_database, require_current_schema, revisions, upgrade
from pawl.errors import ConfigurationError, Unreachable
from pawl.schema import leases
from pawl.settings import DatabaseSettings
from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def test_several_processes_upgrade_at_once(database_url: str, tmp_path: Path) -> None:
    environ = {**os.environ, "PAWL_DATABASE__URL": database_url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pawl.cli.main", "db", "upgrade"]
    started = [
        subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in started]
    assert ends == [("schema at 0005\n", "", 0)] * 3
    database = open_database(DatabaseSettings(url=database_url))
    require_current_schema(database)
    database.close()


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
