"""What people order of rollouts, at the command line or over HTTP, and what follows when a rollout is over."""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ab_testing.canary import weight_of
from ab_testing.controller import Action, Controller, Tick, start_rollout, watched_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import Rollout, list_decisions, running_rollout
from ab_testing.route_store import load_route
from feedback.store import mark_pairs_used
from pawl import leases, registry
from pawl.clock import Clock
from pawl.database import Database
from pawl.engines import Engine, load_verified, prove_loaded
from pawl.errors import ConfigurationError, NegativeVerdict, UnknownModel
from pawl.fingerprints import fingerprint_of
from pawl.registry import Model, ModelState
from pawl.settings import ModelSettings, Settings

MAX_ACTOR_CHARS = 64


def open_rollout(
    database: Database,
    settings: Settings,
    alias: str,
    candidate: str,
    *,
    actor: str,
    clock: Clock,
    is_forced: bool = False,
) -> str:
    """Start the rollout of a registered candidate once every engine has proven to serve it; returns its id.

    Args:
        is_forced: Also one that the gate rejected.

    Raises:
        PawlError: it cannot be started; says why.
    """
    model = registry.get_model(database, candidate)
    served = settings.serving.models[alias]
    check_candidate(database, served, alias, model, is_forced=is_forced)
    canary_config(settings.rollout)  # Wrong settings are told before the engines are troubled.
    registry.take_up(database, candidate, now=clock())
    load_everywhere(served, model, settings.engine.max_lora_rank)
    route = load_route(database, alias) or Route(alias, 0, served.champion)
    epoch = leases.epoch_of(database, f"rollout/{alias}")
    rollout = start_rollout(
        database,
        settings.rollout,
        route,
        candidate,
        now=clock(),
        epoch=epoch,
        actor=actor[:MAX_ACTOR_CHARS],
        is_forced=is_forced,
    )
    return rollout.id


def check_candidate(database: Database, served: ModelSettings, alias: str, model: Model, *, is_forced: bool) -> None:
    """
    Raises:
        ConfigurationError: a version of another alias, or one that is split.
        NegativeVerdict: the gate rejected it, or another rollout runs.
    """
    if model.alias != alias:
        raise ConfigurationError(f"{model.name} is a version of {model.alias}, not of {alias}")
    if served.splits:
        raise ConfigurationError(f"serving.models.{alias} has a fixed split: a rollout needs the alias to itself")
    if model.state == ModelState.REJECTED and not is_forced:
        raise NegativeVerdict(f"{model.name} was rejected: {gate_reason(database, model)}; --force overrides this")
    if (running := running_rollout(database, alias)) is not None:
        raise NegativeVerdict(f"{alias} has a running rollout: {running.id}")


def gate_reason(database: Database, model: Model) -> str:
    """Why the gate turned a version down, as its run has it."""
    try:
        return str(registry.get_run(database, model.run_id or "").detail.get("reason") or "no reason is recorded")
    except UnknownModel:
        return "its run is not recorded"


def load_everywhere(served: ModelSettings, model: Model, max_rank: int | None) -> None:
    """Load a version into every engine of its alias and prove that it is served as it was trained.

    Where its files cannot be looked through, as in a gateway, every engine must have loaded it already.

    Raises:
        BadAdapter: its files are not those that were sealed.
        PublishFailed: an engine refuses it, or serves something else.
        Unreachable: an engine does not answer.
    """
    if model.path is None:  # A base model has no adapter to load: the engines were started with it.
        return
    path = Path(model.path)
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(Engine(url))) for url in served.engines]
        if path.exists():
            load_verified(engines, model.name, path, model.base, max_rank=max_rank, sha256=model.sha256)
        else:
            prove_loaded(engines, model.name, path, model.base, fingerprint_of(model.manifest))


def controller_of(database: Database, clock: Clock) -> Controller:
    """A controller that keeps the registry and the pairs in step with the rollouts it ends."""
    return Controller(database, clock=clock, on_end=lambda ended, _: end_rollout(database, ended, now=clock()))


def carry_out(database: Database, rollout: Rollout, action: Action, reason: str, *, actor: str, clock: Clock) -> Tick:
    """Do what a person orders of a rollout.

    Raises:
        NegativeVerdict: it is over.
        StaleWrite: others kept writing meanwhile; nothing was changed.
    """
    running = running_rollout(database, rollout.alias)
    if running is None and action == "roll_back":
        running = watched_rollout(database, rollout.alias)
    if running is None or running.id != rollout.id:
        raise NegativeVerdict(f"{rollout.id} is over: {rollout.state.status}")
    epoch = leases.epoch_of(database, f"rollout/{rollout.alias}")
    controller = controller_of(database, clock)
    tick = controller.act(
        rollout.alias, action, plain(reason), actor=actor[:MAX_ACTOR_CHARS], epoch=epoch, rollout_id=rollout.id
    )
    if tick is None:
        raise NegativeVerdict(f"{rollout.id} is over")
    return tick


def plain(reason: str) -> str:
    """Without what is no text to a database: half characters, as arguments may hold them, and NUL.

    >>> plain("too slow" + chr(0))
    'too slow?'
    """
    return reason.encode("utf-8", "replace").decode().replace("\x00", "?")


def end_rollout(database: Database, rollout: Rollout, *, now: float) -> None:
    """A rollout is over: the pairs that taught the champion follow; the registry did with the rollout's last write.

    Safe to repeat, and to do late: a model that has moved on since stays as it is.
    """
    is_promoted = rollout.state.status == "promoted"
    state = ModelState.CHAMPION if is_promoted else ModelState.RETIRED
    registry.set_state(database, rollout.candidate, state, now=now, expected=(ModelState.CHALLENGER,))
    model = registry.get_model(database, rollout.candidate)
    if is_promoted and model.run_id:
        with suppress(UnknownModel):  # A training outside the rounds uses no pairs up.
            run = registry.get_run(database, model.run_id)
            mark_pairs_used(database, run.detail.get("new_pair_ids", []), model.run_id)


def describe_rollout(found: Rollout) -> dict[str, Any]:
    """Where it stands."""
    return {
        "id": found.id,
        "alias": found.alias,
        "champion": found.champion,
        "candidate": found.candidate,
        "status": found.state.status,
        "held_reason": found.state.held_reason,
        "weight": weight_of(found.state, found.config),
        "control": sum(count.control for count in found.state.phases),
        "treatment": sum(count.treatment for count in found.state.phases),
        "created_at": found.created_at,
        "updated_at": found.updated_at,
        "watched_until": None if found.watch is None or found.watch.is_over else found.watch.until,
    }


def explain_rollout(database: Database, found: Rollout) -> dict[str, Any]:
    """Where it stands, and every decision on the way there, oldest first."""
    decisions = [asdict(record) for record in list_decisions(database, found.id)]
    return describe_rollout(found) | {"decisions": decisions}
