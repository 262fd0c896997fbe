"""The servers that tests start."""

from __future__ import annotations

from itertools import takewhile

import pytest

from tests.servers import FIRST_PORT, _ports, first_ephemeral_port


def test_processes_that_share_the_tests_never_use_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    shares = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        shares.append(set(takewhile(bool, _ports())))
    assert shares[0].isdisjoint(shares[1])
    assert shares[0] | shares[1] == set(range(FIRST_PORT, first_ephemeral_port()))
