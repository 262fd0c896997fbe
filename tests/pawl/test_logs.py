"""Logs: one JSON object per line on standard error, from the level that was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from pawl.logs import configure_logging
from pawl.settings import LogSettings


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_events_are_json_lines_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(level="info", format="json"))
    structlog.get_logger().info("rollout_started", alias="assistant")
    structlog.get_logger().debug("too_quiet")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["alias"], event["level"]) == ("rollout_started", "assistant", "info")
    assert "timestamp" in event


def test_an_exception_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(format="json"))
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        structlog.get_logger().exception("duty_broken")
    (line,) = capsys.readouterr().err.splitlines()
    assert "first\nsecond" in json.loads(line)["exception"]


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogSettings(level="warning", format="text"))
    structlog.get_logger().info("too_quiet")
    structlog.get_logger().warning("adapter_missing", name="m1")
    err = capsys.readouterr().err
    assert "adapter_missing" in err
    assert "name=m1" in err
    assert "too_quiet" not in err
