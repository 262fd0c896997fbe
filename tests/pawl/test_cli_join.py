"""`pawl retrain run` on a node that is not the first."""

from __future__ import annotations

import pytest

from tests.pawl.conftest import Cli
from tests.servers import free_port


def test_it_waits_for_the_first_nodes_training_and_starts_no_round(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    variables = {"NODES": "2", "NODE_RANK": "1", "PORT": str(port), "JOIN_HOURS": "1e-9"}
    for name, value in variables.items():
        monkeypatch.setenv(f"PAWL_RETRAIN__DISTRIBUTED__{name}", value)
    left = cli("retrain", "run", "--if-due")
    assert left.code == 3
    assert f"127.0.0.1:{port} did not begin to train" in left.err
