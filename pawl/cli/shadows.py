"""`pawl rollout shadow`: a candidate answers beside the champion, and nobody sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    operator,
    print_fields,
    print_rows,
)
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict

if TYPE_CHECKING:
    from ab_testing.shadow_store import ShadowRun

COLUMNS = (
    "metric", "n_pairs", "n_users", "champion", "candidate", "difference", "ci_lower", "ci_upper",
    "n_users_up", "n_users_down", "p_value", "notes",
)  # fmt: skip

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]
RunArgument = Annotated[str | None, typer.Argument(metavar="SHADOW", help="Its id; the newest run without it.")]

shadow = typer.Typer(no_args_is_help=True, help="Answers in the dark, before any user sees one.")


def register(rollout: typer.Typer) -> None:
    rollout.add_typer(shadow, name="shadow")


@shadow.command("start")
def start(
    candidate: str,
    model: ModelOption = None,
    share: Annotated[
        float | None, typer.Option("--share", min=0.0, max=1.0, help="Of the champion's stored answers; else 0.1.")
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", min=2, help="Before the first verdict.")] = None,
    ramp: Annotated[bool, typer.Option("--ramp", help="Open a canary if it turns out no worse.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even a version that the gate rejected.")] = False,
) -> None:
    """Ask a registered version what users ask the champion; prints the run's id. Needs a running worker."""
    from ab_testing.shadow_orders import start_shadow

    settings = current_settings()
    alias = chosen_alias(settings, model)
    given = {"share": share, "min_pairs": pairs}
    wanted = settings.rollout.shadow.model_copy(update={name: one for name, one in given.items() if one is not None})
    with current_database(settings) as database:
        run = start_shadow(
            database, settings, alias, candidate,
            actor=operator(), clock=now, wanted=wanted, is_ramp=ramp, is_forced=force,
        )  # fmt: skip
    typer.echo(run.id)


@shadow.command("stop")
def stop(
    model: ModelOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Goes into the record.")] = "stopped by hand",
) -> None:
    """Ask no more; what was paired stays."""
    from ab_testing.shadow_orders import stop_shadow
    from ab_testing.shadow_store import running_shadow

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        run = running_shadow(database, alias)
        if run is None:
            raise NegativeVerdict(f"{alias} has no running shadow run")
        stop_shadow(database, run, reason, actor=operator(), clock=now)
    typer.echo(f"{run.id}: stopped")


@shadow.command("report")
def report(run_id: RunArgument = None, model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """Paired differences between the candidate's answers and the champion's, with 95 % intervals."""
    from ab_testing.shadow_orders import shadow_report

    with current_database(current_settings()) as database:
        found = shadow_report(database, named_or_newest(database, run_id, model))
    if as_json:
        print_fields(found, as_json=True)
        return
    shown = {name: value for name, value in found.items() if name not in ("differences", "created_at", "updated_at")}
    print_fields(shown, as_json=False)
    print_rows([_rounded(row) for row in found["differences"]], as_json=False, columns=COLUMNS)


def named_or_newest(database: Database, run_id: str | None, model: str | None) -> ShadowRun:
    """
    Raises:
        NegativeVerdict: there is none.
    """
    from ab_testing.shadow_store import get_shadow, newest_shadow

    found = get_shadow(database, run_id) if run_id else newest_shadow(database, model)
    if found is None:
        raise NegativeVerdict("there is no shadow run yet")
    return found


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: format(value, ".4g") if isinstance(value, float) else value for name, value in row.items()}
