import os
from pathlib import Path

import pytest

from practice.model import PracticeModel, ensure_practice_model
from practice.toxicity_checkpoint import ToxicityCheckpoint, ensure_toxicity_checkpoint

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cache_root() -> Path:
    """Where trained models are kept between test runs, and shared with the demo."""
    return Path(os.environ.get("PAWL_TEST_CACHE", REPOSITORY / "var" / "practice"))


@pytest.fixture(scope="session")
def practice_model(cache_root: Path) -> PracticeModel:
    return ensure_practice_model(cache_root, progress=False)


@pytest.fixture(scope="session")
def toxicity_checkpoint(cache_root: Path) -> ToxicityCheckpoint:
    return ensure_toxicity_checkpoint(cache_root, progress=False)
