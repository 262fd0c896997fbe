"""The benchmark of the hot path works: both kinds of request are answered whole; what they cost is not judged."""

from __future__ import annotations

import re
import sys

import pytest

from bench import hot_path


def test_both_kinds_of_request_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hot_path", "--rounds", "1"])
    monkeypatch.setattr(hot_path, "REQUESTS", 40)
    hot_path.main()
    costs = dict(re.findall(r"^(a .*): ([0-9.]+) us$", capsys.readouterr().out, re.M))
    assert list(costs) == ["a whole answer", "a stream of 64 events"]
    assert 0 < float(costs["a whole answer"]) < float(costs["a stream of 64 events"])
