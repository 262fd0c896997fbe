"""Preference pairs over HTTP: what `pawl pairs list` and `show` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict

from feedback.lineage import trace_pair
from feedback.store import count_pairs, list_pairs
from serving.admin.answers import TAG, OfAlias, PathName, Rows, administered, as_json
from serving.errors import NotFound
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway


class PairView(BaseModel):
    """A pair without its texts."""

    id: str
    source: str
    margin: float
    n_voters: int
    created_at: float
    first_run: str | None


class PairList(BaseModel):
    """The newest first."""

    data: list[PairView]


class PairCounts(BaseModel):
    """How many there are."""

    by_source: dict[str, int]
    total: int


class PairTrace(BaseModel):
    """A pair and everything behind it."""

    model_config = ConfigDict(extra="allow")

    id: str
    alias: str
    source: str
    prompt: list[dict[str, Any]]
    chosen: dict[str, Any]
    rejected: dict[str, Any]
    first_run: str | None


def add_pairs(app: FastAPI, gateway: Gateway) -> None:
    """List, count and trace."""

    @app.get(f"{ADMIN}/pairs", tags=[TAG], response_model=PairList)
    async def pairs(model: OfAlias = None, limit: Rows = 50) -> Response:
        """The newest preference pairs, without their texts."""
        found = await administered(list_pairs, gateway.database, model, limit)
        return as_json({"data": [pair._asdict() for pair in found]})

    @app.get(f"{ADMIN}/pairs/counts", tags=[TAG], response_model=PairCounts)
    async def counts() -> Response:
        """How many pairs there are by source."""
        by_source = await administered(count_pairs, gateway.database)
        return as_json({"by_source": dict(by_source), "total": by_source.total()})

    @app.get(f"{ADMIN}/pairs/{{pair_id}}", tags=[TAG], response_model=PairTrace)
    async def pair(pair_id: PathName) -> Response:
        """One pair with everything behind it: the interactions, who served them, and the run that learned from it."""
        trace = await administered(trace_pair, gateway.database, pair_id)
        if trace is None:
            raise NotFound("there is no such pair", param="pair_id", code="not_found")
        return as_json(trace)
