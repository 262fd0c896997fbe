"""Model versions over HTTP: what `pawl models` does, by the same functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from pawl.database import Database
from pawl.registry import Model, get_model, lineage, list_models, retire_model
from serving.admin.answers import TAG, Closed, Name, OfAlias, PathName, actor_of, administered, as_json
from serving.admin.rollouts import NewRollout, Started, start_canary
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway


class ModelView(BaseModel):
    """A model version."""

    name: str
    alias: str
    base: str
    parent: str | None
    run_id: str | None
    path: str | None
    sha256: str | None
    dataset_sha: str | None
    state: str
    manifest: dict[str, Any]
    created_at: float
    updated_at: float


class ModelWithLineage(ModelView):
    """The version and its ancestors, youngest first."""

    lineage: list[str]


class ModelList(BaseModel):
    """Registered versions."""

    data: list[ModelView]


class NamedModel(Closed):
    """Which version."""

    name: Name


def add_models(app: FastAPI, gateway: Gateway) -> None:
    """List, show, promote and retire."""

    @app.get(f"{ADMIN}/models", tags=[TAG], response_model=ModelList)
    async def models(model: OfAlias = None) -> Response:
        """Registered versions."""
        aliases = [model] if model else list(gateway.settings.serving.models)
        return as_json({"data": await administered(listed, gateway.database, aliases)})

    @app.post(f"{ADMIN}/models/promote", tags=[TAG], response_model=Started, status_code=201)
    async def promote(body: NewRollout, request: Request) -> Response:
        """Open a canary for a version: it becomes the champion if its users are no worse off."""
        return as_json(await administered(start_canary, gateway, body, actor_of(request)), 201)

    @app.post(f"{ADMIN}/models/retire", tags=[TAG], response_model=ModelView)
    async def retire(body: NamedModel, request: Request) -> Response:
        """Take a version out of consideration; one in service cannot be."""
        now, actor = gateway.clock(), actor_of(request)
        return as_json(
            describe_model(await administered(retire_model, gateway.database, body.name, now=now, actor=actor))
        )

    @app.get(f"{ADMIN}/models/{{name:path}}", tags=[TAG], response_model=ModelWithLineage)
    async def show(name: PathName) -> Response:
        """One version and its line of descent."""
        return as_json(await administered(with_lineage, gateway.database, name))


def listed(database: Database, aliases: Sequence[str]) -> list[dict[str, Any]]:
    """The versions of these aliases."""
    return [describe_model(found) for alias in aliases for found in list_models(database, alias)]


def with_lineage(database: Database, name: str) -> dict[str, Any]:
    """A version with its ancestors' names."""
    line = [ancestor.name for ancestor in lineage(database, name)]
    return describe_model(get_model(database, name)) | {"lineage": line}


def describe_model(found: Model) -> dict[str, Any]:
    """As it is registered."""
    return asdict(found) | {"state": found.state.value, "manifest": dict(found.manifest)}
