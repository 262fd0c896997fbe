"""`pawl experiment`: fixed splits, and what an experiment has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import inf
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
    from ab_testing.experiment import Variant
    from ab_testing.experiment_report import ExperimentReport

CONTROL_NAME = "control"
SHOWN = (
    "metric", "segment", "treatment", "control_value", "treatment_value", "estimate", "ci_lower", "ci_upper",
    "cs_lower", "cs_upper", "verdict", "notes",
)  # fmt: skip

PLANNED = (
    "metric", "role", "value", "effect", "users", "users_at_any_look", "days", "detectable", "reason",
)  # fmt: skip

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

experiment = typer.Typer(no_args_is_help=True, help="Experiments: fixed splits and canaries.")


class Allocation(StrEnum):
    """How users are given to variants."""

    HASH = "hash"
    SLOTS = "slots"


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
    layer: Annotated[
        str | None, typer.Option("--layer", help="Splits that share a layer, of whatever alias, never share a user.")
    ] = None,
    share: Annotated[
        float, typer.Option("--share", help="Of all users; the others see the champion and are not analysed.")
    ] = 1.0,
    allocation: Annotated[
        Allocation, typer.Option("--allocation", help="`slots` if one variant alone is to give up traffic later.")
    ] = Allocation.HASH,
) -> None:
    """Divide an alias's users between models. Weights are on any scale; nobody changes sides while they stay."""
    from ab_testing.split_orders import Placement, start_split

    settings = current_settings()
    alias = chosen_alias(settings, model)
    parsed = [parse_variant(text) for text in variants]
    place = Placement(layer, share, allocation.value)
    with current_database(settings) as database:
        route = start_split(database, settings, alias, key, parsed, actor=operator(), clock=now, place=place)
    (started,) = [each for each in route.experiments if each.key == key]
    where = f", {started.layer.share:g} of all users, layer {started.layer.name}" if started.layer else ""
    typer.echo(f"{key}: {alias} is split between {', '.join(variant.name for variant in parsed)}{where}")


@experiment.command("weigh")
def weigh(
    weights: Annotated[
        list[str], typer.Option("--weight", metavar="NAME=WEIGHT", help="Variants not named keep theirs.")
    ],
    key: Annotated[str | None, typer.Argument(help="Which; needed when several run.")] = None,
    model: ModelOption = None,
) -> None:
    """Move a split's weights: its next phase. As few users as possible change sides."""
    from ab_testing.split_orders import weigh_split

    settings = current_settings()
    alias = chosen_alias(settings, model)
    parsed = dict(parse_weight(text) for text in weights)
    with current_database(settings) as database:
        route = weigh_split(database, alias, key, parsed, actor=operator(), clock=now)
    for each in route.experiments:
        if key in (None, each.key):
            shares = ", ".join(f"{variant.name} {variant.weight:g}" for variant in each.variants)
            typer.echo(f"{each.key}: phase {each.phase}: {shares}")


@experiment.command("stop")
def stop(
    key: Annotated[str | None, typer.Argument(help="Which; needed when several run.")] = None,
    model: ModelOption = None,
) -> None:
    """End a fixed split: its users get the champion again."""
    from ab_testing.split_orders import stop_split

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        route, ended = stop_split(database, alias, key, actor=operator(), clock=now)
    typer.echo(f"{ended.key}: {alias} answers with {route.champion} again")


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


def parse_weight(text: str) -> tuple[str, float]:
    """
    >>> parse_weight("treatment=20")
    ('treatment', 20.0)

    Raises:
        ConfigurationError: it is none.
    """
    name, _, weight = text.rpartition("=")
    try:
        share = float(weight)
    except ValueError:
        share = -1.0
    if not name or not 0 <= share < inf:
        raise ConfigurationError(f"--weight {text!r} must read NAME=WEIGHT, the weight a number >= 0")
    return name, share


@experiment.command("report")
def report(
    key: Annotated[
        str | None,
        typer.Argument(metavar="EXPERIMENT", help="A rollout's id or a split's key, else the one that runs."),
    ] = None,
    model: ModelOption = None,
    control: Annotated[str, typer.Option("--control", help="The variant to compare with.")] = CONTROL_NAME,
    by: Annotated[Segment | None, typer.Option("--by", help="Also each part of the users on its own.")] = None,
    return_days: Annotated[
        float, typer.Option("--return-days", min=1.0, help="Who is back within so many days has returned.")
    ] = 7.0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with drawings there, too.")] = None,
    holdout: Annotated[
        bool, typer.Option("--holdout", help="Not of one experiment: everybody else beside the held-out users.")
    ] = False,
    days: Annotated[
        float | None, typer.Option("--days", min=0.01, help="With --holdout: so far back; 28 where it is not said.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Every metric's effect with its interval. It informs: canaries are decided by evidence of their own."""
    from ab_testing.experiment_report import Wanted, report_experiment
    from ab_testing.holdout_report import HoldoutReport, WantedHoldout, report_holdout

    if holdout and (key or by or control != CONTROL_NAME):
        raise ConfigurationError("--holdout is of no one experiment: EXPERIMENT, --by and --control do not go with it")
    if days is not None and not holdout:
        raise ConfigurationError("--days goes with --holdout: an experiment is reported from its start")
    settings = current_settings()
    maturity_s = settings.rollout.maturity_s
    with current_database(settings) as database:
        if holdout:
            of = WantedHoldout(chosen_alias(settings, model), return_days=return_days, maturity_s=maturity_s)
            of = of if days is None else of._replace(days=days)
            found: HoldoutReport | ExperimentReport = report_holdout(database, of, now=now())
        else:
            name = key or running_experiment(database, settings, model)
            wanted = Wanted(name, control, by.value if by else None, return_days, maturity_s)
            found = report_experiment(database, wanted, now=now())
    if html:
        write_page(html, found.to_html())
    if as_json:
        print_json(found.to_json())
        return
    for warning in found.warnings():
        typer.echo(f"pawl: {warning}", err=True)
    if isinstance(found, HoldoutReport):
        typer.echo(found.summary())
    print_rows([_shown(row) for row in found.report.rows()], as_json=False, columns=SHOWN)


@experiment.command("plan")
def plan(
    model: ModelOption = None,
    days: Annotated[
        float, typer.Option("--days", min=0.01, help="Of the past, to learn traffic and rates from.")
    ] = 7.0,
    horizon_days: Annotated[float, typer.Option("--horizon-days", min=0.01, help="How long a split may run.")] = 14.0,
    users_per_hour: Annotated[
        float | None, typer.Option("--users-per-hour", min=0.001, help="Instead of what was measured.")
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="METRIC=SHARE", help="A metric's value now, instead of what was measured."),
    ] = None,
    effect: Annotated[
        list[str] | None,
        typer.Option("--effect", metavar="METRIC=CHANGE", help="What a split should show; else the metric's margin."),
    ] = None,
    times: Annotated[
        float, typer.Option("--times", min=1.01, help="How many times as common a canary makes each harm.")
    ] = 4.0,
    share: Annotated[float, typer.Option("--share", min=0.001, max=0.999, help="Of a split's treatment.")] = 0.5,
    power: Annotated[float, typer.Option("--power", min=0.06, max=0.999, help="To be had of a split.")] = 0.8,
    as_json: JsonFlag = False,
) -> None:
    """Before a launch: how soon a canary would be stopped, and how many users a split needs, at your traffic."""
    from ab_testing.plan import Question
    from ab_testing.planning import plan_experiment, sentences

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        question = Question(
            users_per_hour=users_per_hour,
            treatment_share=share,
            power=power,
            horizon_hours=horizon_days * 24,
            rates=parse_numbers("--rate", rate or []),
            effects=parse_numbers("--effect", effect or []),
            times=times,
        )
        found = plan_experiment(database, settings.rollout, alias, question, days=days, now=now())
    if as_json:
        print_json(found.to_json())
        return
    for line in sentences(found):
        typer.echo(line)
    print_rows([_shown(row) for row in found.split_rows()], as_json=False, columns=PLANNED)


def parse_numbers(option: str, texts: Sequence[str]) -> dict[str, float]:
    """
    >>> parse_numbers("--rate", ["toxicity=0.005"])
    {'toxicity': 0.005}

    Raises:
        ConfigurationError: one is not written so.
    """
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigurationError(f"{option} {text!r} must read METRIC=NUMBER") from None
    return found


def running_experiment(database: Database, settings: Settings, model: str | None) -> str:
    """The key of the experiment that an alias is in now.

    Raises:
        NegativeVerdict: it is in none, or in several.
    """
    alias = chosen_alias(settings, model)
    running = [each.key for each in current_route(database, settings, alias).experiments]
    if not running:
        raise NegativeVerdict(f"{alias} is in no experiment now; name one: `pawl rollout status` lists canaries")
    if len(running) > 1:
        raise NegativeVerdict(f"{alias} has {' and '.join(running)} running: name one")
    return running[0]


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
    return {**short, "notes": row.get("reason") or row.get("notes")}
