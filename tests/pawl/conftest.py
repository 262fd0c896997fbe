"""The command line over a database of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from alembic.script import ScriptDirectory

from pawl.cli.main import run
from pawl.database import Database, _alembic, open_database, upgrade
from pawl.settings import DatabaseSettings

CONFIG = """
database: {{url: "sqlite:///{directory}/shared.db"}}
state_dir: {directory}/state
serving:
  models:
    assistant: {{engines: ["http://127.0.0.1:9"], champion: base-model}}
"""


def newest_revision() -> str:
    """Of the migrations."""
    return str(ScriptDirectory.from_config(_alembic()).get_current_head())


class Said(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Said]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run a command in this process, in an empty directory with a configuration."""
    for name in [name for name in os.environ if name.startswith("PAWL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pawl.yaml").write_text(CONFIG.format(directory=tmp_path))

    def say(*arguments: str) -> Said:
        capsys.readouterr()
        code = run(arguments)
        return Said(code, *capsys.readouterr())

    yield say
    structlog.reset_defaults()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Database]:
    """The database that `cli` works on, with its schema."""
    database = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path}/shared.db"))
    upgrade(database)
    yield database
    database.close()
