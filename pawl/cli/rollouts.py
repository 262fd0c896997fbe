"""`pawl rollout | assignments`: who sees which version, and why."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    model_settings,
    operator,
    print_fields,
    print_json,
    print_rows,
)
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.settings import Settings

if TYPE_CHECKING:
    from ab_testing.canary_state import HeldReason
    from ab_testing.controller import Action
    from ab_testing.experiment import Route
    from ab_testing.replay import Replayed
    from ab_testing.rollout_store import DecisionRecord, Rollout

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Even a version that the gate rejected.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Goes into the record.")]

SHOWN = ("id", "alias", "candidate", "status", "held_reason", "weight", "control", "treatment", "watched_until")

rollout = typer.Typer(no_args_is_help=True, help="Canary rollouts.")


def register(app: typer.Typer) -> None:
    app.add_typer(rollout, name="rollout")
    app.command()(assignments)


@rollout.command("start")
def start(
    candidate: str,
    model: ModelOption = None,
    force: ForceOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and start nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Send a registered version out as a canary; prints the rollout's id."""
    from ab_testing.rollout_orders import open_rollout

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        if dry_run:
            _print_plan(database, settings, alias, candidate, force=force, as_json=as_json)
            return
        typer.echo(open_rollout(database, settings, alias, candidate, actor=operator(), clock=now, is_forced=force))


def _print_plan(
    database: Database, settings: Settings, alias: str, candidate: str, *, force: bool, as_json: bool
) -> None:
    from ab_testing.rollout_orders import check_candidate
    from ab_testing.rollout_plan import plan_rollout, sentences
    from pawl.registry import get_model

    check_candidate(database, settings.serving.models[alias], alias, get_model(database, candidate), is_forced=force)
    plan = plan_rollout(database, settings.rollout, alias, now=now())
    if as_json:
        print_json({"alias": alias, "candidate": candidate, **plan.to_json()})
        return
    typer.echo(f"{candidate} as a canary of {alias}; nothing is started:")
    for sentence in sentences(plan):
        typer.echo(f"  {sentence}")


@rollout.command("status")
def status(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """All rollouts, the newest first."""
    from ab_testing.rollout_orders import describe_rollout
    from ab_testing.rollout_store import list_rollouts

    with current_database(current_settings()) as database:
        rows = [describe_rollout(found) for found in list_rollouts(database, model)]
    print_rows(rows, as_json=as_json, columns=SHOWN)


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


@rollout.command("approve")
def approve(model: ModelOption = None, reason: ReasonOption = "approved by hand") -> None:
    """Promote the candidate whose evidence suffices, and which waits for a person to say so."""
    _order(model, "advance", reason, only_held="approval")


@rollout.command("rollback")
def rollback(model: ModelOption = None, reason: ReasonOption = "rolled back by hand") -> None:
    """Give all traffic back to the champion now; after a promotion, as long as it is watched, to the old one."""
    _order(model, "roll_back", reason)


@rollout.command("explain")
def explain(
    rollout_id: Annotated[str | None, typer.Argument(metavar="ROLLOUT")] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Every decision of a rollout, in plain words; the newest rollout by default."""
    from ab_testing.rollout_orders import explain_rollout
    from ab_testing.rollout_store import list_decisions

    with current_database(current_settings()) as database:
        found = named_or_newest(database, rollout_id, model)
        if as_json:
            print_fields(explain_rollout(database, found), as_json=True)
            return
        records = list_decisions(database, found.id)
    typer.echo(f"{found.id}: {found.candidate} against {found.champion}: {found.state.status}")
    for record in records:
        typer.echo(f"  {decision_line(record)}")


@rollout.command("replay")
def replay_rollout(
    rollout_id: Annotated[str | None, typer.Argument(metavar="ROLLOUT")] = None,
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make every decision again from its recorded inputs; exit code 1 if one comes out otherwise."""
    from ab_testing.eprocess import METHOD
    from ab_testing.replay import Inputs, replay
    from ab_testing.rollout_store import CONTROLLER, count_of_other_rules, decision_inputs, read_history

    with current_database(current_settings()) as database:
        found, records = read_history(database, named_or_newest(database, rollout_id, model).id)
        given, foreign = decision_inputs(database, found.id), count_of_other_rules(database, found)
    if any(record.actor == CONTROLLER and record.id not in given for record in records):
        raise NegativeVerdict(f"{found.id} has decisions from before their inputs were kept; it cannot be replayed")
    if foreign:
        raise NegativeVerdict(
            f"{found.id}: {foreign} of {len(records)} decisions are of another version of the statistics than {METHOD};"
            " it cannot be replayed"
        )
    inputs = {key: Inputs.from_json(value) for key, value in given.items()}
    remade = list(replay(found, [(record, inputs.get(record.id)) for record in records]))
    rows = [replayed_row(one) for one in remade]
    ends_alike = not remade or (remade[-1].state, remade[-1].watch) == (found.state, found.watch)
    if as_json:
        print_json({"rollout": found.id, "ends_alike": ends_alike, "decisions": rows})
    else:
        for one in remade:
            typer.echo(f"{'differs' if one.differences else 'same':<8}{decision_line(one.record)}")
    if not ends_alike or any(one.differences for one in remade):
        changed = sum(bool(one.differences) for one in remade)
        raise NegativeVerdict(f"{found.id}: {changed} of {len(remade)} decisions come out otherwise now")


def named_or_newest(database: Database, rollout_id: str | None, model: str | None) -> Rollout:
    """A rollout by its id, else the newest, of one model if it is named.

    Raises:
        NegativeVerdict: there is none.
    """
    from ab_testing.rollout_store import get_rollout, list_rollouts

    found = [get_rollout(database, rollout_id)] if rollout_id else list_rollouts(database, model)[:1]
    if not found:
        raise NegativeVerdict("there is no rollout yet")
    return found[0]


def replayed_row(one: Replayed) -> dict[str, object]:
    """For programs."""
    again = one.again.to_json()
    return {"id": one.record.id, "at": one.record.at, "differences": list(one.differences), "again": again}


def decision_line(record: DecisionRecord) -> str:
    """A decision in plain words; times are UTC."""
    at = datetime.fromtimestamp(record.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    reason = " ".join(record.reason.split())
    return f"{at}  {record.verdict:<9} {100 * record.weight:>5.3g}%  {reason} [{record.actor}]"


def assignments(
    user: str,
    model: Annotated[str | None, typer.Option("--model", help="The model alias.")] = None,
    key: Annotated[str, typer.Option("--key", help="The id of the API key that the user belongs to.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Which variant a user sees, and why."""
    from ab_testing.assignment_story import explain

    settings = current_settings()
    with current_database(settings) as database:
        route = current_route(database, settings, chosen_alias(settings, model))
    found = explain(route, f"{key}/{user}" if key else user)
    shown = {"user": user, "alias": route.alias, "route_version": route.version, **found.assignment._asdict()}
    draws = {"place": found.place, "layer": found.layer, "layer_slot": found.layer_slot, "slot": found.slot}
    if as_json:
        print_json({**shown, **draws, "steps": found.steps, "why": "; ".join(found.steps)})
        return
    known = {name: value for name, value in draws.items() if value is not None}
    print_fields({**shown, **known, "why": "; ".join(found.steps)}, as_json=False)


def current_route(database: Database, settings: Settings, alias: str) -> Route:
    """The route in force: a fixed split of the configuration, else the routing table's, else the configuration's."""
    from ab_testing.route_store import load_route
    from serving.routing import configured_route

    configured = configured_route(alias, model_settings(settings, alias), settings.serving.holdout)
    if configured.experiment:
        return configured
    return replace(load_route(database, alias) or configured, holdout=configured.holdout)


def _order(model: str | None, action: Action, reason: str, *, only_held: HeldReason | None = None) -> None:
    from ab_testing.controller import watched_rollout
    from ab_testing.rollout_orders import carry_out
    from ab_testing.rollout_store import running_rollout

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        running = running_rollout(database, alias)
        if running is None and action == "roll_back":
            running = watched_rollout(database, alias)
        if running is None:
            raise NegativeVerdict(f"{alias} has no running rollout")
        if only_held is not None and running.state.held_reason != only_held:
            raise NegativeVerdict(f"{running.id} does not wait for {only_held}: {running.state.status}")
        tick = carry_out(database, running, action, reason, actor=operator(), clock=now)
    typer.echo(f"{tick.rollout.id}: {tick.rollout.state.status}, weight {tick.decision.weight:g}")
