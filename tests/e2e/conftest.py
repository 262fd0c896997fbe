"""One real engine, gateway and worker for every test that needs them; they end with the last of these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pawl.database import Database, open_database
from pawl.settings import Settings, WebhookSettings
from practice.demo import ROLLOUT
from practice.model import PracticeModel
from practice.toxicity_checkpoint import ToxicityCheckpoint
from practice.world import practice_settings
from serving.stack import Stack
from tests.pawl.test_webhooks import SECRET, Receiver
from tests.practice.conftest import cache_root, practice_model, toxicity_checkpoint
from tests.servers import free_port, running

__all__ = ["cache_root", "practice_model", "toxicity_checkpoint"]


@pytest.fixture(scope="package")
def receiver() -> Iterator[Receiver]:
    """Somebody else's server, which is told of shadow runs."""
    receiver = Receiver()
    with running(receiver.app()) as url:
        receiver.url = url
        yield receiver


@pytest.fixture(scope="package")
def settings(
    tmp_path_factory: pytest.TempPathFactory,
    practice_model: PracticeModel,
    toxicity_checkpoint: ToxicityCheckpoint,
    receiver: Receiver,
) -> Settings:
    directory = tmp_path_factory.mktemp("stack")
    secret = directory / "hook-secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    settings = practice_settings(
        practice_model,
        toxicity_checkpoint,
        directory,
        gateway_port=free_port(),
        engine_port=free_port(),
        metrics_port=free_port(),
        rollout=ROLLOUT,
    )
    hook = WebhookSettings(url=f"{receiver.url}/hook", secret_file=secret, events=["shadow.*"])
    return settings.model_copy(update={"webhooks": [hook]})


@pytest.fixture(scope="package")
def stack(settings: Settings) -> Iterator[Stack]:
    directory = Path(settings.state_dir).parent
    stack = Stack(settings, directory)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="package")
def shared_database(stack: Stack) -> Iterator[Database]:
    database = open_database(stack.settings.database)
    yield database
    database.close()
