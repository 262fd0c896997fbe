"""`pawl rollout | assignments`: who sees which version, and why."""

from __future__ import annotations

import getpass
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    model_settings,
    print_fields,
    print_rows,
)
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import Settings

if TYPE_CHECKING:
    from ab_testing.controller import Action
    from ab_testing.experiment import Route
    from ab_testing.rollout_store import DecisionRecord, Rollout

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Even a version that the gate rejected.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Goes into the record.")]

rollout = typer.Typer(no_args_is_help=True, help="Canary rollouts.")


def register(app: typer.Typer) -> None:
    app.add_typer(rollout, name="rollout")
    app.command()(assignments)


@rollout.command("start")
def start(candidate: str, model: ModelOption = None, force: ForceOption = False) -> None:
    """Send a registered version out as a canary; prints the rollout's id."""
    from pawl.cli.learning import open_rollout

    settings = current_settings()
    with current_database(settings) as database:
        typer.echo(open_rollout(database, settings, chosen_alias(settings, model), candidate, is_forced=force))


@rollout.command("status")
def status(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """All rollouts, the newest first."""
    from ab_testing.rollout_store import list_rollouts

    with current_database(current_settings()) as database:
        rows = [_described(found) for found in list_rollouts(database, model)]
    print_rows(rows, as_json=as_json, columns=("id", "alias", "candidate", "status", "weight", "control", "treatment"))


@rollout.command("advance")
def advance(model: ModelOption = None, reason: ReasonOption = "advanced by hand") -> None:
    """Take the next step now, whatever the evidence."""
    _order(model, "advance", reason)


@rollout.command("hold")
def hold(model: ModelOption = None, reason: ReasonOption = "held by hand") -> None:
    """Stay at this weight until resumed."""
    _order(model, "hold", reason)


@rollout.command("resume")
def resume(model: ModelOption = None, reason: ReasonOption = "resumed by hand") -> None:
    """End a hold."""
    _order(model, "resume", reason)


@rollout.command("rollback")
def rollback(model: ModelOption = None, reason: ReasonOption = "rolled back by hand") -> None:
    """Give all traffic back to the champion now."""
    _order(model, "roll_back", reason)


@rollout.command("explain")
def explain(
    rollout_id: Annotated[str | None, typer.Argument(metavar="ROLLOUT")] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Every decision of a rollout, in plain words; the newest rollout by default."""
    from ab_testing.rollout_store import get_rollout, list_decisions, list_rollouts

    with current_database(current_settings()) as database:
        found = [get_rollout(database, rollout_id)] if rollout_id else list_rollouts(database, model)[:1]
        if not found:
            raise NegativeVerdict("there is no rollout yet")
        records = list_decisions(database, found[0].id)
    if as_json:
        decisions = [record.__dict__ for record in records]
        print_fields(_described(found[0]) | {"decisions": decisions}, as_json=True)
        return
    typer.echo(f"{found[0].id}: {found[0].candidate} against {found[0].champion}: {found[0].state.status}")
    for record in records:
        typer.echo(f"  {decision_line(record)}")


def decision_line(record: DecisionRecord) -> str:
    """A decision in plain words; times are UTC."""
    at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    reason = " ".join(record.reason.split())
    return f"{at}  {record.verdict:<9} {100 * record.weight:>5.3g}%  {reason} [{record.actor}]"


def assignments(
    user: str,
    model: Annotated[str | None, typer.Option("--model", help="The model alias.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Which variant a user sees, and why."""
    from ab_testing.assignment import assign

    settings = current_settings()
    with current_database(settings) as database:
        route = current_route(database, settings, chosen_alias(settings, model))
    assigned = assign(route, user)
    fields = {"user": user, "alias": route.alias, "route_version": route.version, **assigned._asdict()}
    print_fields(fields | {"why": _why(assigned.experiment, assigned.is_analysed)}, as_json=as_json)


def current_route(database: Database, settings: Settings, alias: str) -> Route:
    """The route in force: a fixed split of the configuration, else the routing table's, else the configuration's."""
    from ab_testing.route_store import load_route
    from serving.routing import configured_route

    configured = configured_route(alias, model_settings(settings, alias))
    return configured if configured.experiment else load_route(database, alias) or configured


def _why(experiment: str | None, is_analysed: bool) -> str:
    if experiment is None:
        return "no experiment runs: everybody sees the champion"
    if is_analysed:
        return "hash of the experiment's salt and the user; the user's outcome counts"
    return "hash of the experiment's salt and the user; not analysed, since a later step may move this user"


def _order(model: str | None, action: Action, reason: str) -> None:
    from ab_testing.controller import Controller
    from pawl import leases
    from pawl.cli.worker import end_rollout

    settings = current_settings()
    alias = chosen_alias(settings, model)
    actor = f"operator:{_person()}"[:64]
    with current_database(settings) as database:
        controller = Controller(database, clock=now, on_end=lambda ended, _: end_rollout(database, ended))
        epoch = leases.epoch_of(database, f"rollout/{alias}")
        tick = controller.act(alias, action, _plain(reason), actor=actor, epoch=epoch)
    if tick is None:
        raise NegativeVerdict(f"{alias} has no running rollout")
    typer.echo(f"{tick.rollout.id}: {tick.rollout.state.status}, weight {tick.decision.weight:g}")


def _plain(reason: str) -> str:
    """Without the bytes of an argument that are no text: the database keeps text only."""
    return reason.encode("utf-8", "replace").decode()


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user need not have a name.
        return str(os.getuid())


def _described(found: Rollout) -> dict[str, Any]:
    from ab_testing.canary import weight_of

    counts = found.state.phases
    return {
        "id": found.id,
        "alias": found.alias,
        "champion": found.champion,
        "candidate": found.candidate,
        "status": found.state.status,
        "held_reason": found.state.held_reason,
        "weight": weight_of(found.state, found.config),
        "control": sum(count.control for count in counts),
        "treatment": sum(count.treatment for count in counts),
        "created_at": found.created_at,
    }
