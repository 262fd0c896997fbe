"""The engine of a stack comes back by itself, however often its start fails."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pawl.errors import ConfigurationError
from pawl.settings import EngineSettings, Settings
from serving import supervisor
from serving.engine_process import is_healthy
from serving.stack import Stack, restart_pause_s
from tests.servers import free_port
from tests.serving.test_engine_process import DIES, HEALTHY, PREAMBLE, SILENT
from tests.serving.waiting import eventually


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    engine = EngineSettings(model="m", python=tmp_path / "python", port=free_port(), shutdown_timeout_s=1)
    (tmp_path / "logs").mkdir()
    stack = Stack(Settings(engine=engine), tmp_path)
    yield stack
    stack.stop()


def stand_in(stack: Stack, body: str) -> None:
    """What the engine's interpreter does from now on."""
    script = stack.settings.engine.python
    assert script is not None
    script.write_text(PREAMBLE + body)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_an_engine_that_fails_to_restart_is_tried_again(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.stack.RESTART_PAUSES_S", (0.01, 0.02))
    stand_in(stack, DIES)
    for _ in range(2):
        stack.restart_engine()
        assert stack.engine is not None
        assert stack.engine.has_ended()
    stand_in(stack, HEALTHY)
    stack.restart_engine()
    assert stack.engine is not None
    url = stack.engine.url
    eventually(lambda: is_healthy(url))


def test_pauses_grow_to_a_limit() -> None:
    pauses = [restart_pause_s(n) for n in range(7)]
    assert pauses == [1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]


def test_an_engine_that_never_answers_is_ended_to_be_tried_again(stack: Stack) -> None:
    stand_in(stack, SILENT)
    stack.settings = stack.settings.model_copy(
        update={"engine": stack.settings.engine.model_copy(update={"start_timeout_s": 0.2})}
    )
    stack.restart_engine()
    assert stack.engine is not None
    assert stack.engine.has_ended()


def test_no_log_is_left_open(stack: Stack) -> None:
    stand_in(stack, DIES)
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            stack.start_engine()
    assert open_logs() == []


def open_logs() -> list[str]:
    links: list[Path] = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # Other threads close theirs meanwhile.
            links.append(path.readlink())
    return [str(link) for link in links if link.name == "engine.log"]


def test_a_gateway_has_the_time_that_it_asks_for_to_stop(tmp_path: Path) -> None:
    settings = Settings.model_validate({"engine": {"model": "m"}, "serving": {"drain_grace_s": 100.0}})
    stack = Stack(settings, tmp_path)
    assert stack.gateway.stop_s > 100.0 + supervisor.STOP_MARGIN_S + supervisor.DRAIN_STOP_S
