"""How a gateway of the tests is configured: one alias, `assistant`, before one engine, its files in one directory."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pawl.database import open_database, upgrade
from pawl.settings import DatabaseSettings, Settings
from tests.servers import free_port


def configuration_of(directory: Path, engine_url: str, **serving: Any) -> dict[str, Any]:
    """What its configuration file says, with SQLite; keyword arguments go into `serving`."""
    alias = {"engines": [engine_url], "champion": "base-model"}
    return {
        "database": {"url": f"sqlite:///{directory}/shared.db"},
        "state_dir": str(directory / "state"),
        "serving": {"port": free_port(), "models": {"assistant": alias}, **serving},
    }


def settings_of(directory: Path, engine_url: str, **serving: Any) -> Settings:
    """The same as settings."""
    return Settings.model_validate(configuration_of(directory, engine_url, **serving))


def make_schema(settings: DatabaseSettings) -> None:
    """Bring its database to this version's schema; a file that is not there yet is a copy, which is quicker."""
    path = Path(settings.url.removeprefix("sqlite:///"))
    if settings.url.startswith("sqlite:///") and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_new_sqlite())
    else:
        _migrate(settings)


@cache
def _new_sqlite() -> bytes:
    """An empty database with this version's schema, by every migration."""
    with tempfile.TemporaryDirectory(prefix="pawl-schema-") as directory:
        path = Path(directory) / "new.db"
        _migrate(DatabaseSettings(url=f"sqlite:///{path}"))
        return path.read_bytes()


def _migrate(settings: DatabaseSettings) -> None:
    database = open_database(settings)
    try:
        upgrade(database)
    finally:
        database.close()
