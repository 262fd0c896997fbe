"""A gateway that asks for keys, and one key of each kind."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pawl.api_keys import DEFAULT_PRIORITY, ID_BYTES, SECRET_BYTES, KeyLimits, KeyRecord, digest_of, key_text, make_key
from pawl.clock import now
from pawl.database import open_database, upgrade
from pawl.key_store import create_key
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of
from tests.servers import running
from tests.serving.conftest import Served, serving


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"}


def add_key(settings: Settings, *scopes: str, limits: KeyLimits | None = None) -> str:
    """Make a key in the gateway's database; returns what its owner sends."""
    text = make_key(os.urandom(ID_BYTES), os.urandom(SECRET_BYTES))
    record = KeyRecord(
        id=text.id,
        name="-".join(scopes),
        digest=digest_of(text.secret),
        scopes=frozenset(scopes),
        limits=limits or KeyLimits(),
        priority=DEFAULT_PRIORITY,
        created_at=now(),
        created_by="test",
    )
    database = open_database(settings.database)
    try:
        upgrade(database)
        create_key(database, record, actor="test")
    finally:
        database.close()
    return key_text(text)


@contextmanager
def keyed_gateway(directory: Path, scopes: Collection[str], **limits: Any) -> Iterator[tuple[Served, dict[str, str]]]:
    """A gateway before a fake engine that asks for keys, and a key for each of these scopes (joined by `+`)."""
    engine = FakeVLLM("base-model")
    with running(engine.app) as engine_url:
        settings = Settings.model_validate({**configuration_of(directory, engine_url), "auth": {"required": True}})
        keys = {name: add_key(settings, *name.split("+"), limits=KeyLimits(**limits)) for name in scopes}
        with serving(settings, engine) as served:
            yield served, keys
