"""API keys over HTTP: what `pawl keys` does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, StringConstraints

from pawl.api_keys import (
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    ID_BYTES,
    LOWEST_PRIORITY,
    SECRET_BYTES,
    KeyLimits,
    KeyRecord,
    digest_of,
    key_text,
    limits_to_json,
    make_key,
)
from pawl.key_store import create_key, list_keys, revoke_key, rotate_key
from serving.admin.answers import TAG, Closed, actor_of, administered, as_json
from serving.errors import NotFound
from serving.routes import ADMIN

if TYPE_CHECKING:
    from serving.gateway import Gateway

MAX_KEY_LIFE_S = 10 * 365 * 86_400.0

KeyName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Limit = Annotated[int, Field(ge=0, lt=2**53)]


class LimitsBody(Closed):
    """What a key may use; what is left out follows `serving.limits`, 0 lifts it."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None
    tokens_per_day: Limit | None = None
    user_requests_per_minute: Limit | None = None
    user_tokens_per_minute: Limit | None = None
    user_concurrency: Limit | None = None
    user_tokens_per_day: Limit | None = None


class NewKey(Closed):
    """A key to be made."""

    name: KeyName
    scopes: list[Literal["infer", "feedback", "admin", "metrics"]] = Field(default=["infer"], min_length=1)
    limits: LimitsBody = LimitsBody()
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = DEFAULT_PRIORITY
    expires_in_s: Annotated[float, Field(gt=0, le=MAX_KEY_LIFE_S)] | None = None


class Rotation(Closed):
    """How long the old secret stays good."""

    keep_old_s: Annotated[float, Field(ge=0, le=30 * 86_400)] = 0.0


class KeyView(BaseModel):
    """A key without its secret."""

    id: str
    name: str
    scopes: list[str]
    limits: dict[str, int]
    priority: int
    created_at: float
    created_by: str
    expires_at: float | None
    previous_expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


class KeyWithSecret(KeyView):
    """The only answer that shows the key itself."""

    key: str


class KeyList(BaseModel):
    """All keys, the newest first."""

    data: list[KeyView]


def add_keys(app: FastAPI, gateway: Gateway) -> None:
    """Make, show, rotate and revoke."""

    @app.get(f"{ADMIN}/keys", tags=[TAG], response_model=KeyList)
    async def keys() -> Response:
        """All API keys, without their secrets."""
        found = await administered(list_keys, gateway.database)
        return as_json({"data": [describe_key(record) for record in found]})

    @app.post(f"{ADMIN}/keys", tags=[TAG], response_model=KeyWithSecret, status_code=201)
    async def make(body: NewKey, request: Request) -> Response:
        """Make a key. This answer is the only one that shows it."""
        record, text = new_key(body, gateway.clock(), actor_of(request))
        await administered(create_key, gateway.database, record, actor=record.created_by)
        return as_json(describe_key(record) | {"key": text}, 201)

    @app.get(f"{ADMIN}/keys/{{key_id}}", tags=[TAG], response_model=KeyView)
    async def key(key_id: str) -> Response:
        """One key."""
        return as_json(describe_key(await administered(found_key, gateway, key_id)))

    @app.delete(f"{ADMIN}/keys/{{key_id}}", tags=[TAG], response_model=KeyView)
    async def revoke(key_id: str, request: Request) -> Response:
        """End a key for good; every gateway knows within `auth.key_cache_s`."""
        await administered(found_key, gateway, key_id)
        actor = actor_of(request)
        record = await administered(revoke_key, gateway.database, key_id, now=gateway.clock(), actor=actor)
        return as_json(describe_key(record))

    @app.post(f"{ADMIN}/keys/{{key_id}}/rotate", tags=[TAG], response_model=KeyWithSecret)
    async def rotate(key_id: str, body: Rotation, request: Request) -> Response:
        """Give a key a new secret, shown only here."""
        await administered(found_key, gateway, key_id)
        secret = os.urandom(SECRET_BYTES)
        text = make_key(bytes.fromhex(key_id), secret)
        record = await administered(
            rotate_key,
            gateway.database,
            key_id,
            digest_of(text.secret),
            previous_expires_at=gateway.clock() + body.keep_old_s,
            now=gateway.clock(),
            actor=actor_of(request),
        )
        return as_json(describe_key(record) | {"key": key_text(text)})


def new_key(body: NewKey, now: float, actor: str) -> tuple[KeyRecord, str]:
    """A key's record, and the text that its owner keeps."""
    text = make_key(os.urandom(ID_BYTES), os.urandom(SECRET_BYTES))
    record = KeyRecord(
        id=text.id,
        name=body.name,
        digest=digest_of(text.secret),
        scopes=frozenset(body.scopes),
        limits=KeyLimits(**body.limits.model_dump()),
        priority=body.priority,
        created_at=now,
        created_by=actor,
        expires_at=now + body.expires_in_s if body.expires_in_s else None,
    )
    return record, key_text(text)


def found_key(gateway: Gateway, key_id: str) -> KeyRecord:
    """One key.

    Raises:
        NotFound: there is none of this id.
    """
    found = next((record for record in list_keys(gateway.database) if record.id == key_id), None)
    if found is None:
        raise NotFound("there is no such key", param="key_id", code="not_found")
    return found


def describe_key(record: KeyRecord) -> dict[str, Any]:
    """Without the digests."""
    return {
        "id": record.id,
        "name": record.name,
        "scopes": sorted(record.scopes),
        "limits": limits_to_json(record.limits),
        "priority": record.priority,
        "created_at": record.created_at,
        "created_by": record.created_by,
        "expires_at": record.expires_at,
        "previous_expires_at": record.previous_expires_at,
        "revoked_at": record.revoked_at,
        "last_used_at": record.last_used_at,
    }
