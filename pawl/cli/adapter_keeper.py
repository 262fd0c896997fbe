"""The worker's duty to keep every replica in step with the registry: what it should serve, and what no longer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import structlog

from ab_testing.rollout_orders import end_rollout
from ab_testing.rollout_store import newest_rollout, running_rollout
from ab_testing.route_store import load_route
from ab_testing.shadow_store import running_shadow
from monitoring.metrics import ADAPTER_CHANGES, ADAPTERS_MISSING
from pawl import leases, registry
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import UnknownModel
from pawl.reconciliation import Desired, Reconciliation, Wanted, reconcile
from pawl.registry import RESTING, Model, ModelState, RunStatus
from pawl.settings import ModelSettings, ServingSettings, Settings

log = structlog.get_logger()

LEASE = "adapters"
KEEP_S = 10.0
"""Between two looks."""
LEASE_S = 150.0
"""Longer than a look takes with a replica that hangs: two workers at once would tidy each other's trial names away."""
ROUTE_LAG_S = 30.0
"""Gateways read the routing table every half second; one that was cut off from the database may be later."""


class AdapterKeeper:
    """Puts replicas right, and remembers what it has proven of them. Of several workers one at a time does it."""

    def __init__(self, settings: Settings, database: Database, holder: str, clock: Clock) -> None:
        self._settings = settings
        self._database = database
        self._holder = holder
        self._clock = clock
        self._proven: dict[str, frozenset[str]] = {}
        self._settled: set[str] = set()

    def has_duty(self) -> bool:
        """Whether it is this worker that looks after the replicas now."""
        ttl_s = max(self._settings.worker.lease_s, LEASE_S)
        if leases.acquire(self._database, LEASE, self._holder, ttl_s=ttl_s, now=self._clock()) is not None:
            return True
        self._proven = {}
        ADAPTERS_MISSING.clear()
        return False

    def release(self) -> None:
        """Let another worker take over at once."""
        leases.release(self._database, LEASE, self._holder)

    def desired(self, alias: str) -> Desired:
        """What the alias's replicas should serve now and no longer."""
        return desired_of(self._database, self._settings.serving, alias, self._clock())

    def keep(self, by_alias: Mapping[str, Desired]) -> None:
        """Put the replicas of these aliases right."""
        engines = {alias: self._settings.serving.models[alias].engines for alias in by_alias}
        desired = desired_by_replica(by_alias, engines)
        max_rank = self._settings.engine.max_lora_rank
        done = reconcile(desired, self._proven, self._is_still_unwanted, max_rank=max_rank)
        self._proven = {one.engine: one.proven for one in done}
        for one in done:
            tell(one)
        failed = {one.engine: {failure.name for failure in one.failures} for one in done}
        for alias, urls in engines.items():
            wanted = {one.name for one in by_alias[alias].wanted}
            for url in urls:
                ADAPTERS_MISSING.labels(model=alias, replica=url).set(len(wanted & failed[url]))

    def settle(self, alias: str) -> None:
        """Finish what a process that died at the end of a rollout left undone; once for each rollout."""
        rollout = newest_rollout(self._database, alias)
        if rollout is None or not rollout.state.is_final or rollout.id in self._settled:
            return
        try:
            end_rollout(self._database, rollout, now=self._clock())
        except UnknownModel:
            log.info("rollout_of_unregistered", rollout=rollout.id, candidate=rollout.candidate)
        self._settled.add(rollout.id)

    def _is_still_unwanted(self, name: str) -> bool:
        found, at = registry.get_model(self._database, name), self._clock()
        is_being_asked = leases.holding(self._database, asking_lease(name), at) is not None
        return is_rested(found, at, drain_s(self._settings.serving)) and not is_being_asked


def asking_lease(model: str) -> str:
    """Of whoever evaluates a model that may not be wanted any more: it stays loaded meanwhile."""
    return f"asking/{model}"


def desired_of(database: Database, serving: ServingSettings, alias: str, now: float) -> Desired:
    """What an alias's replicas should serve and no longer serve.

    Wanted is whatever may be asked for: champion, challenger, the last champion (kept for a way back), what the route,
    a running rollout or a running shadow run names, and the newest candidate that has passed its gate and waits. A
    candidate that is just being evaluated is neither: its round loads it, and takes it out again.
    """
    models = registry.list_models(database, alias)
    names = _named_by_routes(database, serving.models[alias], alias) | _waiting(database, models)
    wanted = [model for model in models if model.state in registry.SOLE or model.name in names]
    rested = {model.name for model in models if is_rested(model, now, drain_s(serving))}
    return Desired(
        tuple(Wanted(model.name, Path(model.path), model.base, model.sha256) for model in wanted if model.path),
        frozenset(rested - {model.name for model in wanted}),
    )


def desired_by_replica(desired: Mapping[str, Desired], engines: Mapping[str, Iterable[str]]) -> dict[str, Desired]:
    """By address: aliases may share a replica, which then serves what any of them wants."""
    found: dict[str, Desired] = {}
    for alias, one in desired.items():
        for url in engines[alias]:
            before = found.get(url, Desired())
            wanted = tuple({each.name: each for each in (*before.wanted, *one.wanted)}.values())
            unwanted = before.unwanted | one.unwanted
            found[url] = Desired(wanted, unwanted - {each.name for each in wanted})
    return found


def drain_s(serving: ServingSettings) -> float:
    """After so long no request can still be answered by a model that nothing has been routed to since."""
    return serving.timeouts.total_s + serving.queue.max_wait_s + ROUTE_LAG_S


def is_rested(model: Model, now: float, rest_s: float) -> bool:
    """Whether nobody has been sent to a model for so long."""
    return model.state in RESTING and model.path is not None and now - model.updated_at >= rest_s


def _named_by_routes(database: Database, served: ModelSettings, alias: str) -> set[str]:
    named = {served.champion}
    named |= {variant.model for split in served.splits for variant in split.variants}
    if (route := load_route(database, alias)) is not None:
        named |= {route.champion}
        named |= {variant.model for experiment in route.experiments for variant in experiment.variants}
    if (running := running_rollout(database, alias)) is not None:
        named |= {running.champion, running.candidate}
    if (shadow := running_shadow(database, alias)) is not None:
        named |= {shadow.champion, shadow.candidate}
    if (promotion := newest_rollout(database, alias, status="promoted")) is not None:
        named |= {promotion.champion}
    return named


def _waiting(database: Database, models: Iterable[Model]) -> set[str]:
    """The newest candidate whose round passed: a person, or the end of another rollout, may send it out."""
    newest = next((model for model in models if model.state == ModelState.CANDIDATE and model.run_id), None)
    if newest is None:
        return set()
    try:
        status = registry.get_run(database, newest.run_id or "").status
    except UnknownModel:
        return set()
    return {newest.name} if status == RunStatus.PASSED else set()


def tell(done: Reconciliation) -> None:
    """Log and count what was put right, and what could not be."""
    for name, change in done.changes:
        ADAPTER_CHANGES.labels(replica=done.engine, action=change).inc()
        log.info(f"adapter_{change}", engine=done.engine, name=name)
    for failure in done.failures:
        log.warning("adapter_missing", engine=failure.engine, name=failure.name, reason=failure.reason)
