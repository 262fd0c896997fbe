"""The tiny model, made once, and a database per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pawl.database import Database, open_database
from pawl.schema import metadata
from pawl.settings import DatabaseSettings
from tests.retrain.tiny_model import make_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'pawl.db'}"))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()
