"""How the benchmarks run Pawl's own gateway: its configuration, a database with the tables, and a key."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.processes import Seat
from bench.servers import STOP_S, Command, running_command
from pawl.api_keys import ALL_SCOPES
from pawl.settings import Settings
from tests.serving.keyed import add_key

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
    return add_key(Settings.model_validate(configuration), *sorted(ALL_SCOPES))


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
