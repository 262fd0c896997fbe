"""What people order of fixed splits: to start one on an alias, to move its weights, to end it.

Any other change is a new experiment.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import sqlalchemy as sa

from ab_testing.built_in_metrics import launch_hashes
from ab_testing.experiment import Experiment, LayerRange, Route, Variant, reweighed
from ab_testing.layers import free_range, layer_range
from ab_testing.rollout_orders import load_everywhere
from ab_testing.rollout_store import running_rollout
from ab_testing.route_store import load_route, lock_layers, read_routes, write_route
from ab_testing.slot_table import new_table
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


class Placement(NamedTuple):
    """Which users a split gets, and how they are divided."""

    layer: str | None = None
    """Splits that share one never share a user. Without a name the split has a layer of its own."""
    share: float = 1.0
    """Of all users."""
    allocation: Literal["hash", "slots"] = "hash"


EVERYBODY = Placement()


class RunningSplit(NamedTuple):
    """A split, and the route it is part of."""

    route: Route
    split: Experiment


def start_split(
    database: Database,
    settings: Settings,
    alias: str,
    key: str,
    variants: Sequence[Variant],
    *,
    actor: str,
    clock: Clock,
    place: Placement = EVERYBODY,
) -> Route:
    """Divide an alias's users between models that its engines serve, until `stop_split`.

    Args:
        variants: with weights on any scale; who is in which follows from the key's own random salt.
        place: which users; those of other splits in the same layer are never among them.

    Raises:
        InvalidExperiment: names or weights make no split, or the layer has no room for it.
        ConfigurationError: the configuration has a split of this alias, or a model is none of the alias's.
        NegativeVerdict: the alias is in an experiment of another layer, or the key was used before.
        StaleWrite: somebody moved the alias's traffic meanwhile; nothing was changed.
        PublishFailed, Unreachable: an engine does not serve one of the models.
    """
    served = settings.serving.models[alias]
    slots = new_table({each.name: each.weight for each in variants}) if place.allocation == "slots" else None
    split = Experiment(key, secrets.token_hex(16), tuple(variants), slots=slots)
    _check_alias(database, served, alias, key)
    with database.read() as connection:  # Before the engines are troubled.
        _route_with(split, place, read_routes(connection), settings, alias)
    for variant in split.variants:
        _check_model(database, settings, alias, variant.model)
    epoch, at = leases.epoch_of(database, f"rollout/{alias}"), clock()
    with database.write() as connection:
        lock_layers(connection)  # First: a key that is given away meanwhile, on another alias, is to be seen.
        _check_key(connection, key)
        route = _route_with(split, place, read_routes(connection), settings, alias)
        written = write_route(connection, route, epoch=epoch, at=at)
        started = _launch(route.experiments[-1], settings.rollout.maturity_s)
        note(connection, AuditEvent(at, actor, START, key, {"alias": alias, **started}))
    return written


def _launch(split: Experiment, maturity_s: float) -> dict[str, object]:
    """What the audit trail keeps of it."""
    shares = {variant.name: f"{variant.model}:{variant.weight:g}" for variant in split.variants}
    return {**shares, **launch_hashes(split.to_json(), maturity_s)}


def weigh_split(
    database: Database, alias: str, key: str | None, weights: Mapping[str, float], *, actor: str, clock: Clock
) -> Route:
    """Give a running split other weights, as its next phase, in which as few users as possible change sides.

    Args:
        key: which experiment is meant; None where but one runs.
        weights: by variant; those that are not named keep theirs.

    Raises:
        InvalidExperiment: it has no such variant, or no weight is positive.
        NegativeVerdict: no such split runs.
        StaleWrite: somebody moved the alias's traffic meanwhile; nothing was changed.
    """
    current, split = _running_split(database, alias, key)
    moved = reweighed(split, weights)
    experiments = [moved if each is split else each for each in current.experiments]
    told = {name: f"{weight:g}" for name, weight in weights.items()}
    event = AuditEvent(clock(), actor, "experiment.weigh", split.key, {"alias": alias, **told})
    return _write(database, _route_of(current, experiments), event)


def stop_split(database: Database, alias: str, key: str | None, *, actor: str, clock: Clock) -> RunningSplit:
    """Give the users of a split back to the alias's champion; returns what has ended, as it was.

    Args:
        key: which experiment is meant, so that no other is ended; None where but one runs.

    Raises:
        NegativeVerdict: no such split runs.
        StaleWrite: somebody moved the alias's traffic meanwhile; nothing was changed.
    """
    current, split = running = _running_split(database, alias, key)
    event = AuditEvent(clock(), actor, "experiment.stop", split.key, {"alias": alias})
    _write(database, _route_of(current, [each for each in current.experiments if each is not split]), event)
    return running


def _running_split(database: Database, alias: str, key: str | None) -> RunningSplit:
    current = load_route(database, alias)
    running = current.experiments if current else ()
    named = [each for each in running if key in (None, each.key)]
    if current is None or not named:
        keys = " and ".join(each.key for each in running)
        raise NegativeVerdict(
            f"{alias} has {f'{keys} running, not {key}' if keys else 'no experiment that was started here'}"
        )
    if len(named) > 1:
        raise NegativeVerdict(f"{alias} has {' and '.join(each.key for each in named)} running: name one")
    if named[0].is_canary:
        raise NegativeVerdict(f"{named[0].key} is a canary: `pawl rollout` moves it, `pawl rollout rollback` ends it")
    return RunningSplit(current, named[0])


def _route_of(current: Route, experiments: Sequence[Experiment]) -> Route:
    return replace(current, experiment=experiments[0] if experiments else None, more=tuple(experiments[1:]))


def _route_with(
    split: Experiment, place: Placement, routes: Mapping[str, Route], settings: Settings, alias: str
) -> Route:
    """The alias's route with one more split, in the first free part of its layer."""
    current = routes.get(alias) or Route(alias, 0, settings.serving.models[alias].champion)
    for running in current.experiments:
        if place.layer is None or running.layer is None or running.layer.name != place.layer:
            raise NegativeVerdict(
                f"{alias} has the experiment {running.key} running: a second one must share a layer with it (--layer)"
            )
    if place.layer is not None or place.share != 1.0:
        taken = [each.layer for route in routes.values() for each in route.experiments if each.layer]
        found = free_range(place.layer or split.key, place.share, [*taken, *_configured_ranges(settings)])
        split = replace(split, layer=found)
    return _route_of(current, [*current.experiments, split])


def _configured_ranges(settings: Settings) -> list[LayerRange]:
    layers = [split.layer for model in settings.serving.models.values() for split in model.splits if split.layer]
    return [layer_range(layer.name, layer.start, layer.end) for layer in layers]


def _write(database: Database, route: Route, event: AuditEvent) -> Route:
    epoch = leases.epoch_of(database, f"rollout/{route.alias}")
    with database.write() as connection:
        written = write_route(connection, route, epoch=epoch, at=event.at)
        note(connection, event)
    return written


def _check_alias(database: Database, served: ModelSettings, alias: str, key: str) -> None:
    if served.splits:
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
