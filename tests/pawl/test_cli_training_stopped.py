"""What `pawl retrain run` leaves with when its training stops before its end."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from pawl import leases
from pawl.cli import learning
from pawl.clock import now
from pawl.database import Database
from retrain.errors import RetrainError, TrainingFailed, TrainingInterrupted
from tests.pawl.conftest import Cli


@pytest.mark.parametrize(
    ("stop", "code"),
    [(TrainingInterrupted("asked to leave at step 5"), 143), (TrainingFailed("the loss is not a number at step 5"), 1)],
)
def test_the_exit_code_says_whether_to_run_it_again(
    cli: Cli, shared: Database, monkeypatch: pytest.MonkeyPatch, stop: RetrainError, code: int
) -> None:
    """And the next process need not wait for the lease."""

    def stopped(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise stop

    monkeypatch.setattr(learning, "train_and_judge", stopped)
    done = cli("retrain", "run")
    assert (done.code, done.err.splitlines()[-1]) == (code, f"pawl: {stop}")
    with leases.held(shared, learning.retrain_lease("assistant"), "another", ttl_s=60, clock=now) as epoch:
        assert epoch > 1
