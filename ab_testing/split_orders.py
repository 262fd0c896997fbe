"""What people order of fixed splits: to start one on an alias, and to end it. A change is a new experiment."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import sqlalchemy as sa

from ab_testing.experiment import Experiment, Route, Variant
from ab_testing.rollout_orders import load_everywhere
from ab_testing.rollout_store import running_rollout
from ab_testing.route_store import load_route, write_route
from pawl import leases, registry
from pawl.audit import AuditEvent, note
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict, UnknownModel
from pawl.registry import ModelState
from pawl.schema import audit_events, interactions
from pawl.settings import ModelSettings, Settings

START = "experiment.start"
"""In the audit trail."""


def start_split(
    database: Database,
    settings: Settings,
    alias: str,
    key: str,
    variants: Sequence[Variant],
    *,
    actor: str,
    clock: Clock,
) -> Route:
    """Divide an alias's users between models that its engines serve, until `stop_split`.

    Args:
        variants: with weights on any scale; who is in which follows from the key's own random salt.

    Raises:
        InvalidExperiment: names or weights make no split.
        ConfigurationError: the configuration has a split of this alias, or a model is none of the alias's.
        NegativeVerdict: the alias is in an experiment, or the key was used before.
        StaleWrite: somebody moved the alias's traffic meanwhile; nothing was changed.
        PublishFailed, Unreachable: an engine does not serve one of the models.
    """
    served = settings.serving.models[alias]
    split = Experiment(key, secrets.token_hex(16), tuple(variants))
    _check_alias(database, served, alias, key)
    for variant in split.variants:
        _check_model(database, settings, alias, variant.model)
    current = load_route(database, alias) or Route(alias, 0, served.champion)
    if current.experiment is not None:
        raise NegativeVerdict(f"{alias} has the experiment {current.experiment.key} running")
    shares = {variant.name: f"{variant.model}:{variant.weight:g}" for variant in split.variants}
    event = AuditEvent(clock(), actor, START, key, {"alias": alias, **shares})
    return _write(database, Route(alias, current.version, current.champion, split), event)


def stop_split(database: Database, alias: str, key: str | None, *, actor: str, clock: Clock) -> Route:
    """Give all of the alias's traffic back to its champion; returns the route as it was.

    Args:
        key: which experiment is meant, so that no other is ended; None for whatever runs.

    Raises:
        NegativeVerdict: no such split runs.
        StaleWrite: somebody moved the alias's traffic meanwhile; nothing was changed.
    """
    current = load_route(database, alias)
    running = current.experiment if current else None
    if current is None or running is None or key not in (None, running.key):
        named = "no experiment that was started here" if running is None else f"{running.key} running, not {key}"
        raise NegativeVerdict(f"{alias} has {named}")
    if running.is_canary:
        raise NegativeVerdict(f"{running.key} is a canary: `pawl rollout rollback` ends it")
    event = AuditEvent(clock(), actor, "experiment.stop", running.key, {"alias": alias})
    _write(database, Route(alias, current.version, current.champion), event)
    return current


def _write(database: Database, route: Route, event: AuditEvent) -> Route:
    epoch = leases.epoch_of(database, f"rollout/{route.alias}")
    with database.write() as connection:
        if event.action == START:
            _check_key(connection, event.subject)
        written = write_route(connection, route, epoch=epoch, at=event.at)
        note(connection, event)
    return written


def _check_alias(database: Database, served: ModelSettings, alias: str, key: str) -> None:
    if served.experiment is not None:
        raise ConfigurationError(f"serving.models.{alias} has a fixed split in the configuration: end that first")
    if (running := running_rollout(database, alias)) is not None:
        raise NegativeVerdict(f"{alias} has a running rollout: {running.id}")
    with database.read() as connection:
        _check_key(connection, key)


def _check_key(connection: sa.Connection, key: str) -> None:
    """Of one that was ended a moment ago the answers may not have come in yet, but the audit trail has it."""
    noted, answered = audit_events.c, interactions.c
    traces = (
        sa.select(noted.id).where(noted.subject == key, noted.action == START),
        sa.select(answered.id).where(answered.experiment == key),
    )
    if any(connection.execute(query.limit(1)).first() is not None for query in traces):
        raise NegativeVerdict(f"there was an experiment {key} already: a new one needs a new key")


def _check_model(database: Database, settings: Settings, alias: str, name: str) -> None:
    """A registered version of the alias, proven to be on every engine, or what the engines serve from the start."""
    served = settings.serving.models[alias]
    try:
        model = registry.get_model(database, name)
    except UnknownModel:
        if name in (served.champion, settings.engine.served_name):
            return
        raise ConfigurationError(f"{name} is neither registered nor the champion of {alias}") from None
    if model.alias != alias:
        raise ConfigurationError(f"{name} is a version of {model.alias}, not of {alias}")
    if model.state in (ModelState.REJECTED, ModelState.RETIRED):
        raise NegativeVerdict(f"{name} is {model.state.value}")
    load_everywhere(served, model, settings.engine.max_lora_rank)
