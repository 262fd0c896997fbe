"""What tests of several packages share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
import pytest
import uvicorn.server
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from feedback import drain
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings, Settings
from serving import connections, feedback_standing, keys, stored_api
from serving.gateway import Gateway, create_app
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of, make_schema
from tests.servers import PostgreSQL, PromptAsyncio, private_postgresql, running

# A slow moment of the machine says nothing about a property; and a build must not depend on what was drawn.
settings.register_profile(
    "pawl",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("pawl")


MODELS = "models"
"""The one process, of those that share the tests, in which models are made and trained."""
WITH_MODELS = ("tests/e2e/", "tests/practice/", "tests/retrain/")
LONG_FILES = tuple(
    f"tests/serving/test_{name}.py"
    for name in ("kill", "compiled", "supervisor", "loop_lag", "limits", "faults_stopping", "stopping", "erasure_bytes")
)
"""Each takes up to a minute."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types.
    """Hands out the tests of whole files, which share what takes long to start."""

    def _split_scope(self, nodeid: str) -> str:
        return MODELS if nodeid.startswith(WITH_MODELS) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Used by `pytest -n 3`."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process still has some of it when the others are done."""
    items.sort(key=lambda item: (not item.nodeid.startswith(WITH_MODELS), not item.nodeid.startswith(LONG_FILES)))


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """On a loaded machine what is slow for a moment is not away; drains and servers look often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", PromptAsyncio())
        # Each client would read all certificates there are: 20 ms, and most tests make one, to ask by plain HTTP.
        patch.setattr(httpcore2, "default_ssl_context", cache(httpcore2.default_ssl_context))
        patch.setattr(drain, "IDLE_S", 0.03)
        patch.setattr(connections, "STALE_S", 60.0)
        patch.setattr(keys, "PATIENCE_S", 60.0)
        patch.setattr(feedback_standing, "LOOK_UP_S", 20.0)
        patch.setattr(feedback_standing, "LOOK_UP_ON_OWN_DISK_S", 20.0)
        patch.setattr(stored_api, "WAIT_S", 20.0)
        yield


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """One private PostgreSQL for the whole session."""
    with private_postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the current schema, to be copied: that is quicker than every migration."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    make_schema(DatabaseSettings(url=f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql: PostgreSQL) -> str:
    """The same."""
    make_schema(DatabaseSettings(url=postgresql.create_database("template_pawl")))
    return "template_pawl"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh database of each kind: empty, or for a test that asks for `database`, with the current schema."""
    has_schema = "database" in request.fixturenames
    if request.param == "sqlite":
        path = tmp_path / "shared.db"
        if has_schema:
            shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    yield server.create_database(name, request.getfixturevalue("postgresql_template") if has_schema else "template1")
    server.drop_database(name)  # One by one: all of them at the end may take longer than a test may.


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same with the current schema."""
    database = open_database(DatabaseSettings(url=database_url))
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
