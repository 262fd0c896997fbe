"""`pawl experiment`: fixed splits, and what an experiment has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    operator,
    print_json,
    print_rows,
)
from pawl.cli.rollouts import current_route
from pawl.clock import now
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict
from pawl.settings import Settings

if TYPE_CHECKING:
    from ab_testing.analysis.metrics import Metric
    from ab_testing.analysis.report import Report
    from ab_testing.experiment import Variant
    from ab_testing.experiment_table import Table

SHOWN = (
    "metric", "segment", "treatment", "control_value", "treatment_value", "estimate", "ci_lower", "ci_upper",
    "cs_lower", "cs_upper", "verdict", "notes",
)  # fmt: skip

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

experiment = typer.Typer(no_args_is_help=True, help="Experiments: fixed splits and canaries.")


class Segment(StrEnum):
    """What a report can be broken down by."""

    TENURE = "tenure"
    PHASE = "phase"


def register(app: typer.Typer) -> None:
    app.add_typer(experiment, name="experiment")


@experiment.command("start")
def start(
    key: Annotated[str, typer.Argument(help="Its name, which no other experiment has had.")],
    variants: Annotated[
        list[str],
        typer.Option("--variant", metavar="NAME=MODEL:WEIGHT", help="Two or more; `control` is compared with."),
    ],
    model: ModelOption = None,
) -> None:
    """Divide an alias's users between models. Weights are on any scale; nobody changes sides while it runs."""
    from ab_testing.split_orders import start_split

    settings = current_settings()
    alias = chosen_alias(settings, model)
    parsed = [parse_variant(text) for text in variants]
    with current_database(settings) as database:
        start_split(database, settings, alias, key, parsed, actor=operator(), clock=now)
    typer.echo(f"{key}: {alias} is split between {', '.join(variant.name for variant in parsed)}")


@experiment.command("stop")
def stop(
    key: Annotated[str | None, typer.Argument(help="Which; whatever runs without it.")] = None,
    model: ModelOption = None,
) -> None:
    """End a fixed split: everybody gets the champion again."""
    from ab_testing.split_orders import stop_split

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        before = stop_split(database, alias, key, actor=operator(), clock=now)
    ended = before.experiment.key if before.experiment else ""
    typer.echo(f"{ended}: {alias} answers with {before.champion} again")


def parse_variant(text: str) -> Variant:
    """
    >>> parse_variant("treatment=base--r0001-1a2b3c4d:0.5").weight
    0.5

    Raises:
        ConfigurationError: it is none.
    """
    from ab_testing.experiment import Variant

    name, _, rest = text.partition("=")
    model, _, weight = rest.rpartition(":")
    try:
        share = float(weight)
    except ValueError:
        share = -1.0
    if not name or not model or share < 0:
        raise ConfigurationError(f"--variant {text!r} must read NAME=MODEL:WEIGHT, the weight a number >= 0")
    return Variant(name, model, share)


@experiment.command("report")
def report(
    key: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT", help="A rollout's id or a split's key, else what runs now.")
    ] = None,
    model: ModelOption = None,
    control: Annotated[str, typer.Option("--control", help="The variant to compare with.")] = "control",
    by: Annotated[Segment | None, typer.Option("--by", help="Also each part of the users on its own.")] = None,
    return_days: Annotated[
        float, typer.Option("--return-days", min=1.0, help="Who is back within so many days has returned.")
    ] = 7.0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with drawings there, too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Every metric's effect with its interval. It informs: canaries are decided by evidence of their own."""
    from ab_testing.built_in_metrics import built_in
    from ab_testing.experiment_table import read_experiment, users_of
    from ab_testing.report_page import page

    settings = current_settings()
    with current_database(settings) as database:
        name = key or running_experiment(database, settings, model)
        table = read_experiment(database, name, now=now(), return_days=return_days)
    users = users_of(table)
    require_control(users, control, name)
    is_ramp = len(set(table["phase"].tolist())) > 1
    found = analysed(table, built_in(is_ramp=is_ramp), control, by, is_ramp=is_ramp)
    if html:
        facts = {f"users of {variant}": n for variant, n in users.items()}
        write_page(html, page(found, title=f"Experiment {name}", facts=facts))
    if as_json:
        print_json({"experiment": name, "users": users, "alpha": found.alpha, "effects": found.rows()})
    else:
        print_rows([_shown(row) for row in found.rows()], as_json=False, columns=SHOWN)


def running_experiment(database: Database, settings: Settings, model: str | None) -> str:
    """The key of the experiment that an alias is in now.

    Raises:
        NegativeVerdict: it is in none.
    """
    alias = chosen_alias(settings, model)
    running = current_route(database, settings, alias).experiment
    if running is None:
        raise NegativeVerdict(f"{alias} is in no experiment now; name one: `pawl rollout status` lists canaries")
    return running.key


def require_control(users: Mapping[str, int], control: str, name: str) -> None:
    """
    Raises:
        NegativeVerdict: there is nothing to compare with.
    """
    if control not in users:
        found = ", ".join(f"{n} of {variant!r}" for variant, n in users.items()) or "none at all"
        raise NegativeVerdict(f"{name} has no analysed users of {control!r} (--control); it has {found}")


def analysed(table: Table, metrics: Sequence[Metric], control: str, by: Segment | None, *, is_ramp: bool) -> Report:
    """The report on a table of `read_experiment`."""
    from ab_testing.analysis.table_analysis import Columns, analyse

    stratum = "phase" if is_ramp and by is not Segment.PHASE else None
    columns = Columns(stratum=stratum, segment=by.value if by else None, created_at="created_at")
    return analyse(table, metrics, columns=columns, control=control)


def write_page(path: Path, text: str) -> None:
    """
    Raises:
        ConfigurationError: nothing can be written there.
    """
    try:
        path.write_text(text)
    except OSError as exc:
        raise ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc


def _shown(row: Mapping[str, object]) -> dict[str, object]:
    """With as many digits as people read."""
    short = {name: format(value, ".4g") if isinstance(value, float) else value for name, value in row.items()}
    return {**short, "notes": row["reason"] or row["notes"]}
