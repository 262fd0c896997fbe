"""A gateway that comes back on another port still delivers what it had acknowledged on the old one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from feedback.spool import Spool
from feedback.store import get_interaction
from pawl.schema import interactions
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.feedback.test_drain import count, interaction_record
from tests.serving.conftest import serving
from tests.serving.waiting import eventually


def spool_of(settings: Settings, port: int) -> Path:
    return settings.state_dir / "spool" / f"gateway-{port}.db"


def test_a_spool_left_by_another_port_is_drained(make_settings: Callable[..., Settings], engine: FakeVLLM) -> None:
    settings = make_settings()
    left, held = Spool(spool_of(settings, 1)), Spool(spool_of(settings, 2))
    for number, spool in enumerate((left, held)):
        spool.append(interaction_record(number)).result(5)
    left.close()
    with serving(settings, engine) as served:
        assert eventually(lambda: get_interaction(served.gateway.database, f"{0:048x}"))
        assert count(served.gateway.database, interactions) == 1, "a gateway that lives delivers its own"
    assert held.size().result(5).rows == 1
    held.close()
    with serving(settings, engine) as served:
        assert eventually(lambda: get_interaction(served.gateway.database, f"{1:048x}"))
        assert count(served.gateway.database, interactions) == 2
