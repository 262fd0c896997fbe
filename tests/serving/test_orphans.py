"""A gateway that comes back on another port still delivers what it had acknowledged on the old one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from feedback.journal import Journal
from feedback.spool import Spool
from feedback.store import get_interaction
from pawl.schema import interactions
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.feedback.journals import keep
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


async def leave_journal(settings: Settings, port: int, number: int) -> Journal:
    """A journal as a gateway on that port had it, with one record; still open."""
    record = interaction_record(number)
    journal = Journal(spool_of(settings, port).with_suffix(""), max_bytes=1024**2, segment_bytes=64 * 1024)
    journal.bind(asyncio.get_running_loop())
    assert await keep(journal, record.meta, record.request or b"", record.response or b"")
    return journal


def test_a_journal_left_by_another_port_is_drained_and_a_living_one_too(
    make_settings: Callable[..., Settings], engine: FakeVLLM
) -> None:
    """One process drains all journals of a machine; that twice the same comes harms nobody."""
    settings = make_settings()

    async def leave() -> list[Journal]:
        return [await leave_journal(settings, port, port) for port in (1, 2)]

    left, held = asyncio.run(leave())
    left.close()
    with serving(settings, engine) as served:
        eventually(lambda: count(served.gateway.database, interactions) == 2)
    held.close()
    with serving(settings, engine) as served:
        assert served.client.get("/health/ready").status_code == 200
        assert count(served.gateway.database, interactions) == 2
