"""Engines, waiting records and the audit trail, as one gateway process sees them, and what others think of engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel

from feedback.errors import SpoolUnavailable
from monitoring.exposition import samples_of
from monitoring.metrics import ENGINE_VIEWS
from pawl.audit import latest_events
from pawl.engines import Engine
from pawl.errors import PawlError
from serving.admin.answers import TAG, Rows, administered, as_json
from serving.errors import Overloaded
from serving.replicas import Replica
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway

ENGINE_ANSWER_S = 2.0


class EngineView(BaseModel):
    """An engine as this gateway process sees it, and what it says itself."""

    alias: str
    url: str
    share: float
    """What it may be given, from 0 (taken out of service) to 1."""
    n_processes_in: int
    n_processes_out: int
    """Gateway processes on this machine that have it in service, and out: each judges for itself."""
    n_running: int
    """Requests that it is answering for this process."""
    n_connections: int
    is_reachable: bool
    """It answered just now."""
    models: list[str]
    """Base models and adapters that it answers to."""


class EngineList(BaseModel):
    """Every engine of every alias."""

    data: list[EngineView]


class Waiting(BaseModel):
    """Records on their way to the shared database."""

    rows: int
    oldest_at: float | None


class SpoolView(BaseModel):
    """What waits on the disk of this gateway process."""

    is_healthy: bool
    completions: Waiting
    feedback: Waiting


class AuditLine(BaseModel):
    """Who did what to which thing."""

    at: float
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


class AuditTrail(BaseModel):
    """The newest first."""

    data: list[AuditLine]


def add_status(app: FastAPI, gateway: Gateway) -> None:
    """What works, what waits, and who did what."""

    @app.get(f"{ADMIN}/engines", tags=[TAG], response_model=EngineList)
    async def engines() -> Response:
        """Every engine and the models it answers to, asked now."""
        asked = [(alias, one) for alias, found in gateway.replicas.items() for one in found.replicas]
        views = {
            (labels["model"], labels["replica"], labels["state"]): int(n)
            for _, labels, n in await samples_of(ENGINE_VIEWS)
        }
        return as_json({"data": await asyncio.gather(*(asyncio.to_thread(look_at, *one, views) for one in asked))})

    @app.get(f"{ADMIN}/spool", tags=[TAG], response_model=SpoolView)
    async def spool() -> Response:
        """What waits on this gateway's disk for the shared database."""
        try:
            feedback = await asyncio.wrap_future(gateway.records.spool.size())
            completions = await asyncio.to_thread(gateway.records.journal.size)
        except (SpoolUnavailable, OSError) as exc:
            raise Overloaded("the spool cannot be read", code="spool_unavailable") from exc
        waiting = {"completions": completions._asdict(), "feedback": feedback._asdict()}
        return as_json({"is_healthy": gateway.records.is_healthy, **waiting})

    @app.get(f"{ADMIN}/audit", tags=[TAG], response_model=AuditTrail)
    async def audit(
        subject: Annotated[str | None, Query(description="Of one key, rollout or model only.")] = None,
        limit: Rows = 50,
    ) -> Response:
        """Who did what, the newest first."""
        found = await administered(latest_events, gateway.database, subject=subject, limit=limit)
        return as_json({"data": [event._asdict() for event in found]})


def look_at(alias: str, replica: Replica, views: Mapping[tuple[str, str, str], int]) -> dict[str, Any]:
    """What is known of an engine here, and what it says that it serves.

    Args:
        views: how many processes have it `in` or `out` of service, by alias, replica and that word.
    """
    known = {
        "alias": alias,
        "url": replica.url,
        "share": replica.health.share(time.monotonic()),
        "n_processes_in": views.get((alias, replica.url, "in"), 0),
        "n_processes_out": views.get((alias, replica.url, "out"), 0),
        "n_running": replica.n_running,
        "n_connections": replica.pool.n_open,
    }
    with closing(Engine(replica.url, answer_timeout_s=ENGINE_ANSWER_S)) as engine:
        try:
            return known | {"is_reachable": True, "models": list(engine.served())}
        except PawlError:
            return known | {"is_reachable": False, "models": []}
