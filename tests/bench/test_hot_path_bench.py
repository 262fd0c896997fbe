"""The benchmark of the hot path works: both kinds of request are answered whole; what they cost is not judged."""

from __future__ import annotations

import asyncio
import sys

import pytest

from bench import hot_path


@pytest.fixture(autouse=True)
def _is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hot_path", "--rounds", "1"])
    monkeypatch.setattr(hot_path, "REQUESTS", 40)


def test_both_kinds_of_request_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    hot_path.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(":")[0] for line in lines[1:]] == ["a whole answer", "a stream of 64 events"]


def test_answers_that_do_not_come_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_path, "N_EVENTS", 2)
    monkeypatch.setattr(hot_path.Bench, "_answer", lambda *_: None)
    with pytest.raises(asyncio.QueueEmpty):
        hot_path.main()
