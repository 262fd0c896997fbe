"""Killed at any moment, the gateway has what it acknowledged, once; `bench/kill.py` does the same for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.kill_ledger import run_ledger

KILLS = 8
"""Each victim twice."""
pytestmark = pytest.mark.timeout(900)  # Five starts of a gateway; on a busy machine each takes several seconds.


def test_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path, database_url: str) -> None:
    outcome = run_ledger(tmp_path, database_url, kills=KILLS, seed=11)
    assert min(outcome.acknowledged_whole, outcome.acknowledged_streams, outcome.acknowledged_feedback) > 8
    assert outcome.is_faultless, outcome
