"""The routes this gateway obeys: the configuration's, overlaid by the routing table, remembered across restarts.

While the database is down the last known routes hold; after a restart without it, those the spool remembers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import orjson
import structlog

from ab_testing.experiment import Experiment, Route, Variant
from ab_testing.route_store import load_routes
from feedback.spool import Spool
from monitoring.metrics import ROLLOUT_WEIGHT
from pawl.database import Database
from pawl.settings import ModelSettings

log = structlog.get_logger()

KEPT_NAME = "routes"
FIXED_SPLIT_SALT = "pawl"


def configured_route(alias: str, model: ModelSettings) -> Route:
    """The route that the configuration alone gives an alias."""
    return Route(alias, 0, model.champion, _fixed_split(model))


def _fixed_split(model: ModelSettings) -> Experiment | None:
    split = model.experiment
    if split is None:
        return None
    variants = tuple(Variant(variant.name, variant.model, variant.weight) for variant in split.variants)
    return Experiment(split.key, split.salt or f"{FIXED_SPLIT_SALT}/{split.key}", variants)


class RouteTable:
    """Reads the routing table on a thread of its own; `get` is a dictionary look-up."""

    def __init__(self, models: Mapping[str, ModelSettings], database: Database, spool: Spool, *, poll_s: float) -> None:
        self._configured = {alias: configured_route(alias, model) for alias, model in models.items()}
        self._has_fixed_split = {alias for alias, route in self._configured.items() if route.experiment}
        self._routes = dict(self._configured)
        self._database = database
        self._spool = spool
        self._poll_s = poll_s
        self._is_stopping = threading.Event()
        self.is_database_up = True
        self._thread = threading.Thread(target=self._run, name="routes", daemon=True)

    def get(self, alias: str) -> Route | None:
        return self._routes.get(alias)

    def aliases(self) -> list[str]:
        return list(self._routes)

    def start(self) -> None:
        """Start from what the spool remembers, then follow the table."""
        publish_weights(self._routes)  # Later only when they change.
        if kept := self._spool.kept(KEPT_NAME).result():
            self._overlay({alias: Route.from_json(data) for alias, data in orjson.loads(kept).items()})
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping.set()

    def _run(self) -> None:
        while not self._is_stopping.wait(self._poll_s):
            self.refresh()

    def refresh(self) -> None:
        """Read the table once; on failure keep what is known."""
        try:
            found = load_routes(self._database)
        except Exception as exc:  # noqa: BLE001 - neither a database that is away nor a bad row may end this thread
            if self.is_database_up:
                log.warning("routes_kept", reason=type(exc).__name__)
            self.is_database_up = False
            return
        self.is_database_up = True
        if self._overlay(found):
            self._remember(found)

    def _overlay(self, found: Mapping[str, Route]) -> bool:
        """Take over routes of known aliases, but for a fixed split in the configuration. True when any changed."""
        routes = self._configured | {
            alias: route
            for alias, route in found.items()
            if alias in self._configured and alias not in self._has_fixed_split
        }
        if routes == self._routes:
            return False
        self._routes = routes
        publish_weights(routes)
        log.info("routes_changed", versions={alias: route.version for alias, route in routes.items()})
        return True

    def _remember(self, found: Mapping[str, Route]) -> None:
        self._spool.keep(KEPT_NAME, orjson.dumps({alias: route.to_json() for alias, route in found.items()}))


def publish_weights(routes: Mapping[str, Route]) -> None:
    """Show the shares of traffic as metrics."""
    ROLLOUT_WEIGHT.clear()
    for alias, route in routes.items():
        variants = route.experiment.variants if route.experiment else (Variant("control", route.champion, 1.0),)
        total = sum(variant.weight for variant in variants)
        for variant in variants:
            ROLLOUT_WEIGHT.labels(model=alias, variant=variant.name).set(variant.weight / total)
