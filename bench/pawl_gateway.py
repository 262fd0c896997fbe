"""How the benchmarks run Pawl's own gateway: its configuration, a database with the tables, and a key."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.processes import Seat
from bench.servers import STOP_S, Command, running_command
from pawl.api_keys import ALL_SCOPES, ID_BYTES, SECRET_BYTES, KeyLimits, KeyRecord, digest_of, key_text
from pawl.api_keys import make_key as new_key
from pawl.clock import now
from pawl.database import open_database, upgrade
from pawl.key_store import create_key
from pawl.settings import DatabaseSettings

ALIAS = "assistant"


def pawl_configuration(
    directory: Path,
    port: int,
    engines: Sequence[str],
    serving: Mapping[str, Any],
    *,
    database_url: str | None = None,
) -> dict[str, Any]:
    """Keys required, users split over two variants, records durable unless `serving` says otherwise."""
    variants = [
        {"name": "control", "model": "base-model", "weight": 0.5},
        {"name": "treatment", "model": "second-model", "weight": 0.5},
    ]
    model = {
        "engines": list(engines),
        "champion": "base-model",
        "experiment": {"key": "bench", "variants": variants},
    }
    return {
        "database": {"url": database_url or f"sqlite:///{directory.resolve()}/pawl.db"},
        "state_dir": str(directory.resolve() / "state"),
        "auth": {"required": True},
        "serving": {"port": port, "models": {ALIAS: model}, **serving},
        "log": {"level": "warning"},
    }


def make_key(configuration: Mapping[str, Any]) -> str:
    """Bring the database up to date and put a key with every scope into it; returns what its owner sends."""
    key = new_key(os.urandom(ID_BYTES), os.urandom(SECRET_BYTES))
    record = KeyRecord(
        id=key.id,
        name="bench",
        digest=digest_of(key.secret),
        scopes=ALL_SCOPES,
        limits=KeyLimits(),
        priority=5,
        created_at=now(),
        created_by="bench",
    )
    database = open_database(DatabaseSettings(url=configuration["database"]["url"]))
    try:
        upgrade(database)
        create_key(database, record, actor="bench")
    finally:
        database.close()
    return key_text(key)


@contextmanager
def pawl_serve(
    configuration: Mapping[str, Any], directory: Path, seat: Seat, *, stop_s: float = STOP_S
) -> Iterator[int]:
    """`pawl serve` with this configuration; yields its pid."""
    config = directory / "pawl.yaml"
    config.write_text(yaml.safe_dump(dict(configuration)))
    command = Command(
        [sys.executable, "-m", "pawl.cli.main", "serve"],
        f"http://127.0.0.1:{configuration['serving']['port']}/health/ready",
        {"PAWL_CONFIG": str(config)},
        stop_s,
    )
    with running_command(command, directory, seat) as pid:
        yield pid
