"""Splits that are started at the same moment, on different aliases."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ab_testing.experiment import Route, Variant
from ab_testing.route_store import load_route, lock_layers
from ab_testing.split_orders import START, start_split
from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import Settings

NOW = 1e6
VARIANTS = (Variant("control", "base-model", 1), Variant("warm", "base-model", 1))


def start(database: Database, key: str) -> Route:
    model: dict[str, Any] = {"engines": ["http://127.0.0.1:9"], "champion": "base-model"}
    settings = Settings.model_validate({"serving": {"models": {"assistant": model}}})
    return start_split(database, settings, "assistant", key, VARIANTS, actor="ann", clock=lambda: NOW)


def await_lock(database: Database) -> None:
    """Until somebody waits for the layers."""
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        with database.read() as connection:
            if connection.exec_driver_sql(waiting).scalar_one():
                return
        time.sleep(0.02)
    raise AssertionError("nobody waits for the layers")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_of_two_starts_with_one_key_the_later_sees_the_earlier(database: Database) -> None:
    """On one alias the route's version would tell, on two of them nothing else does."""
    with ThreadPoolExecutor(1) as other:
        with database.write() as earlier:
            lock_layers(earlier)
            later = other.submit(start, database, "tone")
            await_lock(database)
            note(earlier, AuditEvent(NOW, "bob", START, "tone", {"alias": "another"}))
        with pytest.raises(NegativeVerdict, match="needs a new key"):
            later.result(60.0)
    assert load_route(database, "assistant") is None
