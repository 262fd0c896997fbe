"""A world to roll out in."""

from __future__ import annotations

import itertools

import pytest

from pawl.database import Database
from tests.ab_testing.world import World


@pytest.fixture
def world(database: Database, monkeypatch: pytest.MonkeyPatch) -> World:
    """With salts that are the same in every run, so that the same users fall into the same zones."""
    numbers = itertools.count(1)
    monkeypatch.setattr("ab_testing.controller.secrets.token_hex", lambda n_bytes: f"{next(numbers):0{2 * n_bytes}x}")
    return World(database)
