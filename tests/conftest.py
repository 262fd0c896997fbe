"""What tests of several packages share."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, settings

from pawl.database import Database, open_database, upgrade
from pawl.settings import DatabaseSettings, Settings
from serving.gateway import Gateway, create_app
from tests.fake_vllm import FakeVLLM
from tests.servers import PostgreSQL, free_port, running

# A slow moment of the machine says nothing about a property; and a build must not depend on what was drawn.
settings.register_profile(
    "pawl",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("pawl")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """One private PostgreSQL for the whole session."""
    directory = Path(tempfile.mkdtemp(prefix="pawl-pg-"))
    directory.chmod(0o755)
    server = PostgreSQL(directory)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh, empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.db"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_database(f"test_{uuid.uuid4().hex}")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same with the current schema."""
    database = open_database(DatabaseSettings(url=database_url))
    upgrade(database)
    yield database
    database.close()


@pytest.fixture
def engine() -> FakeVLLM:
    return FakeVLLM("base-model")


@pytest.fixture
def engine_url(engine: FakeVLLM) -> Iterator[str]:
    with running(engine.app) as url:
        yield url


@pytest.fixture
def make_settings(tmp_path: Path, engine_url: str) -> Callable[..., Settings]:
    """Settings of a gateway before the fake engine; keyword arguments go into `serving`."""

    def make(url: str | None = None, model: dict[str, Any] | None = None, **serving: Any) -> Settings:
        alias = {"engines": [engine_url], "champion": "base-model", **(model or {})}
        return Settings.model_validate(
            {
                "database": {"url": url or f"sqlite:///{tmp_path}/shared.db", "connect_timeout_s": 1.0},
                "state_dir": str(tmp_path / "state"),
                "serving": {"port": free_port(), "models": {"assistant": alias}, "route_poll_s": 0.1} | serving,
            }
        )

    return make


@pytest.fixture
def gateway(make_settings: Callable[..., Settings]) -> Gateway:
    """A gateway on SQLite, before it runs."""
    settings = make_settings()
    upgrade(open_database(settings.database))
    return create_app(settings)


@pytest.fixture
def gateway_url(gateway: Gateway) -> Iterator[str]:
    with running(gateway) as url:
        yield url


@pytest.fixture
def client(gateway_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=gateway_url, timeout=20) as client:
        yield client
