"""The routes this gateway obeys: the configuration's, overlaid by the routing table, remembered across restarts.

While the database is down the last known routes hold; after a restart without it, those the spool remembers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import orjson
import structlog

from ab_testing.experiment import CONTROL, HOLDOUT, Experiment, Holdout, Route, Variant
from ab_testing.layers import layer_range
from ab_testing.route_store import load_routes, readable_route
from ab_testing.slot_table import SlotTable, new_table, reassigned
from feedback.spool import Spool
from monitoring.metrics import ROLLOUT_WEIGHT
from pawl.database import Database
from pawl.settings import ExperimentSettings, HoldoutSettings, ModelSettings

log = structlog.get_logger()

KEPT_NAME = "routes"
FIXED_SPLIT_SALT = "pawl"


def configured_route(alias: str, model: ModelSettings, holdout: HoldoutSettings | None = None) -> Route:
    """The route that the configuration alone gives an alias."""
    splits = [fixed_split(split) for split in model.splits]
    held_out = configured_holdout(holdout) if holdout else None
    return Route(alias, 0, model.champion, splits[0] if splits else None, tuple(splits[1:]), held_out)


def configured_holdout(settings: HoldoutSettings) -> Holdout | None:
    """The users that no experiment touches, if there are to be any."""
    return Holdout(settings.share, settings.salt) if settings.share else None


def fixed_split(split: ExperimentSettings) -> Experiment:
    """A split of the configuration: its salt follows from its key, its slots from the weights it has ever had."""
    variants = tuple(Variant(variant.name, variant.model, variant.weight) for variant in split.variants)
    return Experiment(
        split.key,
        split.salt or f"{FIXED_SPLIT_SALT}/{split.key}",
        variants,
        phase=len(split.phases()) - 1,
        layer=layer_range(split.layer.name, split.layer.start, split.layer.end) if split.layer else None,
        slots=_slots(split) if split.allocation == "slots" else None,
    )


def _slots(split: ExperimentSettings) -> SlotTable:
    first, *later = [
        {variant.name: weight for variant, weight in zip(split.variants, weights, strict=True)}
        for weights in split.phases()
    ]
    table = new_table(first)
    for weights in later:
        table = reassigned(table, weights)
    return table


class RouteTable:
    """Reads the routing table on a thread of its own; `get` is a dictionary look-up."""

    def __init__(
        self,
        models: Mapping[str, ModelSettings],
        database: Database,
        spool: Spool,
        *,
        poll_s: float,
        holdout: HoldoutSettings | None = None,
    ) -> None:
        self._configured = {alias: configured_route(alias, model, holdout) for alias, model in models.items()}
        self._holdout = configured_holdout(holdout) if holdout else None
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
            self._overlay({alias: readable_route(data) for alias, data in orjson.loads(kept).items()})
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
        """Take over routes of known aliases, but for a fixed split in the configuration. True when any changed.

        The hold-out is the configuration's, whatever the table says of it.
        """
        routes = self._configured | {
            alias: replace(route, holdout=self._holdout)
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
        for variant, share in traffic_shares(route).items():
            ROLLOUT_WEIGHT.labels(model=alias, variant=variant).set(share)


def traffic_shares(route: Route) -> dict[str, float]:
    """How much of an alias's traffic each variant gets; what no experiment has is the control's."""
    held_out = route.holdout.share if route.holdout else 0.0
    left = 1.0 - held_out
    shares: dict[str, float] = {HOLDOUT: held_out} if held_out else {}
    for experiment in route.experiments:
        width = experiment.layer.share if experiment.layer else 1.0
        total = sum(variant.weight for variant in experiment.variants)
        for variant in experiment.variants:
            part = (1.0 - held_out) * width * variant.weight / total
            shares[variant.name] = shares.get(variant.name, 0.0) + part
        left -= (1.0 - held_out) * width
    if not route.experiment or left > 1e-9:
        shares[CONTROL] = shares.get(CONTROL, 0.0) + left
    return shares
