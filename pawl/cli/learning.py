"""`pawl retrain | gate | models`: what is learned and what becomes of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer

from pawl import leases
from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    operator,
    print_fields,
    print_rows,
)
from pawl.cli.mining_place import mining_place
from pawl.cli.selecting import counts_shown, select_mined, select_stored
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.registry import Model, get_model, get_run, lineage, list_models, list_runs, retire_model, unfinished_run
from pawl.settings import Settings

if TYPE_CHECKING:
    from monitoring.scoring import ScoreToxicity
    from retrain.pipeline import Forget, OpenCanary

log = structlog.get_logger()
ForceOption = Annotated[bool, typer.Option("--force", help="Even a version that the gate rejected.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

retrain = typer.Typer(no_args_is_help=True, help="Retraining rounds.")
models = typer.Typer(no_args_is_help=True, help="Model versions.")


def register(app: typer.Typer) -> None:
    app.add_typer(retrain, name="retrain")
    app.add_typer(models, name="models")
    app.command()(gate)


@retrain.command("run")
def retrain_run(
    model: ModelOption = None,
    if_due: Annotated[bool, typer.Option("--if-due", help="Do nothing unless a round is due.")] = False,
    cycle: Annotated[
        str | None, typer.Option("--cycle", help="What the round is for; else the unfinished one, or this week.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train on fewer pairs than retrain.min_pairs.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Mine, train, judge, publish, open the canary. Running it again resumes where it was; one process at a time."""
    from feedback.erasure_files import mark_late_models
    from feedback.mining import mine_alias
    from feedback.pair_stream import PairsById
    from feedback.retention import kept_since
    from feedback.similarity.configured import similarity_of
    from retrain.progress import reporting

    settings = current_settings(quiet_logs=False)
    alias = chosen_alias(settings, model)
    lease, ttl_s = f"retrain/{alias}", settings.worker.lease_s
    with (
        current_database(settings) as database,
        leases.held(database, lease, leases.this_process(), ttl_s=ttl_s, clock=now) as epoch,
        reporting(sys.stderr) as report,
    ):
        at = now()
        since = kept_since(settings.retention.pairs_days, at)
        least, near = settings.feedback.judge.min_margin, similarity_of(settings.feedback.similarity)
        with mining_place(settings) as place:
            mined = mine_alias(database, alias, at, since=since, min_judged_margin=least, place=place, similarity=near)
            found = select_mined(database, settings, alias, place=place) if if_due else None
        reason = why_not_due(database, settings, alias, len(found.new), found.left_out) if found else None
        if reason:
            print_not_due(reason, as_json=as_json)
            return
        from retrain.pipeline import (
            RoundInputs,
            RoundOptions,
            run_round,
        )  # Loads torch: not to find that nothing is due.

        score_toxicity = toxicity_scorer(settings)
        selected = select_mined(database, settings, alias, score_toxicity)
        inputs = RoundInputs(
            new=PairsById(database, selected.new),
            earlier=PairsById(database, selected.earlier),
            score_toxicity=score_toxicity,
            open_canary=canary_opener(database, settings, alias),
            skipped=Counter(mined.skipped) + selected.left_out,
            forget=forgetter(settings, database),
            report=report,
            epoch=epoch,
        )
        outcome = run_round(database, settings, alias, inputs, RoundOptions(cycle=cycle, force=force))
        mark_late_models(database, settings.retrain.runs_dir, now())
    shown = {"run": outcome.run_id, "status": outcome.status.value, "model": outcome.model, "reason": outcome.reason}
    print_fields(shown | {"rollout": outcome.rollout_id}, as_json=as_json)
    if outcome.status.value in ("failed", "cannot_tell"):
        raise NegativeVerdict(f"run {outcome.run_id}: {outcome.reason}")


def print_not_due(reason: str, *, as_json: bool) -> None:
    """That nothing was done is not an error."""
    if as_json:
        print_fields({"run": None, "status": "not_due", "reason": reason}, as_json=True)
    else:
        typer.echo(f"not due: {reason}")


def why_not_due(
    database: Database, settings: Settings, alias: str, n_new: int, left_out: Mapping[str, int]
) -> str | None:
    """Why no round should start now; None when one should.

    Args:
        left_out: pairs that are not trained on, by reason: without them "0 new pairs" would be a riddle.
    """
    if unfinished_run(database, alias):
        return None
    if n_new < settings.retrain.min_pairs:
        others = f"; left out: {counts_shown(left_out)}" if left_out else ""
        return f"{n_new} new pairs, retrain.min_pairs is {settings.retrain.min_pairs}{others}"
    last = max((run.created_at for run in list_runs(database, alias)), default=0.0)
    hours = (now() - last) / 3600
    if hours < settings.retrain.interval_hours:
        return (
            f"the last round was {hours:.1f} hours ago, retrain.interval_hours is {settings.retrain.interval_hours:g}"
        )
    return None


def toxicity_scorer(settings: Settings) -> ScoreToxicity | None:
    """The scorer for the gate; None when it is absent, and then the gate says no."""
    from monitoring.errors import ScorerUnavailable
    from monitoring.toxicity import load_scorer

    scoring = settings.worker.scoring
    try:
        return load_scorer(scoring.toxicity_checkpoint, scoring.toxicity_config_dir, scoring.toxicity_model).score
    except ScorerUnavailable as exc:
        log.error("scorer_absent", reason=str(exc))
        return None


def canary_opener(database: Database, settings: Settings, alias: str) -> OpenCanary | None:
    """What a passed gate calls to open the canary; None when `rollout.auto_start` is off."""
    from ab_testing.rollout_orders import open_rollout
    from ab_testing.rollout_store import newest_rollout, running_rollout
    from retrain.errors import CanaryTaken

    if not settings.rollout.auto_start:
        return None

    def open_canary(candidate: str) -> str:
        if (opened := newest_rollout(database, alias, candidate=candidate)) is not None:
            return opened.id
        if (running := running_rollout(database, alias)) is not None:
            raise CanaryTaken(f"{alias} has a running rollout: {running.id}; promote {candidate} when it is over")
        return open_rollout(database, settings, alias, candidate, actor="retrain", clock=now)

    return open_canary


def forgetter(settings: Settings, database: Database) -> Forget:
    """What a round calls when it has written files: people may have been erased since it read the pairs."""
    from feedback.tombstone_store import has_any
    from pawl.cli.erasing import eraser_of

    def forget(run: Path) -> None:
        if has_any(database):
            eraser_of(settings, database, actor="retrain").erase_late(run)

    return forget


@retrain.command("status")
def retrain_status(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """The newest run, and whether another is due, by the pairs that the last mining stored."""
    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        selected = select_stored(database, settings, alias)
        newest = next(iter(sorted(list_runs(database, alias), key=lambda run: -run.created_at)), None)
        n_new, left_out = len(selected.new), selected.left_out
        reason = why_not_due(database, settings, alias, n_new, left_out)
    fields: dict[str, Any] = {"alias": alias, "new_pairs": n_new, "left_out": dict(left_out)}
    fields |= {"due": reason is None, "why_not_due": reason}
    fields |= {"run": newest.id, "status": newest.status.value, "step": newest.step} if newest else {"run": None}
    run_left_out = newest.detail.get("left_out", {}) if newest else {}
    fields |= {"run_left_out": {name: n for name, n in run_left_out.items() if n}}
    print_fields(fields, as_json=as_json)


@retrain.command("list")
def retrain_list(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """All runs, the newest first."""
    with current_database(current_settings()) as database:
        found = sorted(list_runs(database, model), key=lambda run: -run.created_at)
    rows = [asdict(run) | {"status": run.status.value} for run in found]
    print_rows(rows, as_json=as_json, columns=("id", "alias", "cycle", "status", "step"))


@retrain.command("explain")
def retrain_explain(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: JsonFlag = False) -> None:
    """Everything recorded about one run."""
    with current_database(current_settings()) as database:
        run = get_run(database, run_id)
    print_fields(asdict(run) | {"status": run.status.value}, as_json=as_json)


def gate(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: JsonFlag = False) -> None:
    """What the gate said about a run's candidate, check by check; exit code 1 unless it passed."""
    with current_database(current_settings()) as database:
        run = get_run(database, run_id)
    report = run.detail.get("gate")
    if report is None:
        raise NegativeVerdict(f"run {run_id} has not reached the gate: it is {run.status.value} at {run.step}")
    if as_json:
        print_fields(report, as_json=True)
    else:
        typer.echo(f"{report['verdict']}")
        for check in report["checks"]:
            typer.echo(f"  {check['verdict']:<12}{check['reason']}")
    if report["verdict"] != "pass":
        raise NegativeVerdict(f"run {run_id}: the gate says {report['verdict']}")


@models.command("list")
def models_list(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """Registered model versions."""
    settings = current_settings()
    with current_database(settings) as database:
        aliases = [model] if model else list(settings.serving.models)
        rows = [listed(model) for alias in aliases for model in list_models(database, alias)]
    print_rows(rows, as_json=as_json, columns=("name", "alias", "state", "parent", "run_id", "erased"))


def listed(model: Model) -> dict[str, Any]:
    """As the list shows it, with whether pairs it learned from have been erased since."""
    erased = model.manifest.get("erased")
    learned = None if not erased else f"{erased['pairs']} pairs" if erased["pairs"] else f"through {erased['through']}"
    return asdict(model) | {"state": model.state.value, "erased": learned}


@models.command("show")
def models_show(name: str, as_json: JsonFlag = False) -> None:
    """One version and its line of descent."""
    with current_database(current_settings()) as database:
        found = get_model(database, name)
        line = [ancestor.name for ancestor in lineage(database, name)]
    print_fields(asdict(found) | {"state": found.state.value, "lineage": line}, as_json=as_json)


@models.command("promote")
def models_promote(name: str, force: ForceOption = False) -> None:
    """Open a canary for a registered version: it becomes the champion if its users are no worse off."""
    from ab_testing.rollout_orders import open_rollout

    settings = current_settings()
    with current_database(settings) as database:
        alias = chosen_alias(settings, get_model(database, name).alias)
        typer.echo(open_rollout(database, settings, alias, name, actor=operator(), clock=now, is_forced=force))


@models.command("retire")
def models_retire(name: str) -> None:
    """Take a version out of consideration. The champion cannot be retired: promote another first."""
    with current_database(current_settings()) as database:
        retire_model(database, name, now=now(), actor=operator())
    typer.echo(f"{name} retired")
