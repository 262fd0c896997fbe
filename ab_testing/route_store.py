"""Every query on the routing table: one row per model alias, so that one write moves every gateway at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
import structlog

from ab_testing.experiment import HOLDOUT, Route
from pawl.database import Database
from pawl.errors import StaleWrite
from pawl.schema import routes

log = structlog.get_logger()


def load_routes(database: Database) -> dict[str, Route]:
    """The routes of all aliases that anything has been promoted or rolled out for."""
    with database.read() as connection:
        return read_routes(connection)


def lock_layers(connection: sa.Connection) -> None:
    """Until the transaction ends nobody else gives parts of layers away; a SQLite transaction is alone in any case."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7291650385)")


def read_routes(connection: sa.Connection) -> dict[str, Route]:
    """The same inside the caller's transaction."""
    rows = connection.execute(sa.select(routes.c.alias, routes.c.version, routes.c.route)).all()
    return {alias: readable_route(json.loads(text) | {"version": version}) for alias, version, text in rows}


def readable_route(stored: Mapping[str, Any]) -> Route:
    """A stored route, without an experiment of a name that this version keeps for itself: its users get the champion.

    An older version took such names; a gateway that does not start for that would serve nobody.
    """
    found = [one for one in (stored.get("experiment"), *stored.get("more", ())) if one is not None]
    kept = [one for one in found if one["key"] != HOLDOUT]
    if len(kept) < len(found):
        _tell_ignored(str(stored["alias"]), int(stored["version"]))
    return Route.from_json({**stored, "experiment": next(iter(kept), None), "more": kept[1:]})


@lru_cache(maxsize=64)
def _tell_ignored(alias: str, version: int) -> None:
    """Once for each version of a route, which is read several times a second."""
    log.warning(
        "experiment_ignored",
        alias=alias,
        version=version,
        key=HOLDOUT,
        reason=f"{HOLDOUT!r} is the hold-out's name in the records now, so that its users get the champion",
        to_do="start it again under another key: `pawl experiment start`",
    )


def load_route(database: Database, alias: str) -> Route | None:
    """One alias's route, or None when only the configuration speaks for it."""
    return load_routes(database).get(alias)


def write_route(connection: sa.Connection, route: Route, *, epoch: int, at: float) -> Route:
    """Replace an alias's route inside the caller's transaction; return it with its new version.

    Raises:
        StaleWrite: somebody wrote a later version, or holds a later lease, since `route` was read.
    """
    current = connection.execute(
        sa.select(routes.c.version, routes.c.epoch).where(routes.c.alias == route.alias).with_for_update()
    ).first()
    if current is not None and (current.version != route.version or current.epoch > epoch):
        raise StaleWrite(
            f"the route of {route.alias} changed meanwhile (version {current.version}, read {route.version})"
        )
    values = {
        "version": route.version + 1,
        "route": json.dumps(route.to_json()),
        "epoch": epoch,
        "updated_at": at,
    }
    if current is None:
        _insert(connection, route.alias, values)
    else:
        connection.execute(routes.update().where(routes.c.alias == route.alias).values(**values))
    return replace(route, version=route.version + 1)


def _insert(connection: sa.Connection, alias: str, values: Mapping[str, object]) -> None:
    try:
        connection.execute(routes.insert().values(alias=alias, **values))
    except sa.exc.IntegrityError as exc:  # There was no row to lock, and another process was first.
        raise StaleWrite(f"the route of {alias} changed meanwhile") from exc
