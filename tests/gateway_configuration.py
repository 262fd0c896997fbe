"""How a gateway of the tests is configured: one alias, `assistant`, before one engine, its files in one directory."""

from __future__ import annotations

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
    """Bring its database to this version's schema."""
    database = open_database(settings)
    try:
        upgrade(database)
    finally:
        database.close()
