"""One real engine, gateway and worker for every test that needs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pawl.database import Database, open_database
from pawl.settings import Settings
from practice.demo import ROLLOUT
from practice.model import PracticeModel
from practice.toxicity_checkpoint import ToxicityCheckpoint
from practice.world import practice_settings
from serving.stack import Stack
from tests.practice.conftest import cache_root, practice_model, toxicity_checkpoint
from tests.servers import free_port

__all__ = ["cache_root", "practice_model", "toxicity_checkpoint"]


@pytest.fixture(scope="session")
def settings(
    tmp_path_factory: pytest.TempPathFactory, practice_model: PracticeModel, toxicity_checkpoint: ToxicityCheckpoint
) -> Settings:
    return practice_settings(
        practice_model,
        toxicity_checkpoint,
        tmp_path_factory.mktemp("stack"),
        gateway_port=free_port(),
        engine_port=free_port(),
        metrics_port=free_port(),
        rollout=ROLLOUT,
    )


@pytest.fixture(scope="session")
def stack(settings: Settings) -> Iterator[Stack]:
    directory = Path(settings.state_dir).parent
    stack = Stack(settings, directory)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="session")
def shared_database(stack: Stack) -> Iterator[Database]:
    database = open_database(stack.settings.database)
    yield database
    database.close()
