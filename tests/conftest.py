"""What tests of several packages share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, settings

from pawl.database import Database, open_database, upgrade
from pawl.settings import DatabaseSettings, Settings
from serving import connections, feedback_standing, keys, stored_api
from serving.gateway import Gateway, create_app
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of, make_schema
from tests.servers import PostgreSQL, private_postgresql, running

# A slow moment of the machine says nothing about a property; and a build must not depend on what was drawn.
settings.register_profile(
    "pawl",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("pawl")


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """On a loaded machine what is slow for a moment must not be taken for what is away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "STALE_S", 60.0)
        patch.setattr(keys, "PATIENCE_S", 60.0)
        patch.setattr(feedback_standing, "LOOK_UP_S", 20.0)
        patch.setattr(stored_api, "WAIT_S", 20.0)
        yield


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """One private PostgreSQL for the whole session."""
    with private_postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh, empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/shared.db"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    yield server.create_database(name)
    server.drop_database(name)  # One by one: all of them at the end may take longer than a test may.


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
        configuration = configuration_of(tmp_path, engine_url, **({"route_poll_s": 0.1} | serving))
        configuration["database"] |= {"connect_timeout_s": 1.0} | ({"url": url} if url else {})
        configuration["serving"]["models"]["assistant"] |= model or {}
        return Settings.model_validate(configuration)

    return make


@pytest.fixture
def gateway(make_settings: Callable[..., Settings]) -> Gateway:
    """A gateway on SQLite, before it runs."""
    settings = make_settings()
    make_schema(settings.database)
    return create_app(settings)


@pytest.fixture
def gateway_url(gateway: Gateway) -> Iterator[str]:
    with running(gateway) as url:
        yield url


@pytest.fixture
def client(gateway_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=gateway_url, timeout=20) as client:
        yield client
