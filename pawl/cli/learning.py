"""`pawl retrain`: what is learned and what becomes of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
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
    print_fields,
    print_rows,
)
from pawl.cli.due_rounds import answered, decide_now
from pawl.cli.mining_place import mining_place
from pawl.cli.selecting import select_mined, select_stored, select_thumbs
from pawl.clock import now
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.registry import Run, RunStatus, get_run, lineage, list_runs
from pawl.round_checks import add_check, count_skips, newest_check
from pawl.round_due import Code, Decision
from pawl.schedule import next_moment
from pawl.settings import RetrainSettings, Settings

if TYPE_CHECKING:
    from feedback.pairs import UnpairedExample
    from monitoring.scoring import ScoreToxicity
    from retrain.pipeline import Forget, OpenCanary, RoundOptions, RunOutcome
    from retrain.progress import Report

log = structlog.get_logger()
MomentOption = Annotated[
    float | None, typer.Option("--moment", hidden=True, help="The moment of the schedule that this answers to.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

retrain = typer.Typer(no_args_is_help=True, help="Retraining rounds.")


def register(app: typer.Typer) -> None:
    app.add_typer(retrain, name="retrain")


@retrain.command("run")
def retrain_run(
    model: ModelOption = None,
    if_due: Annotated[bool, typer.Option("--if-due", help="Do nothing unless a round is due.")] = False,
    cycle: Annotated[
        str | None, typer.Option("--cycle", help="What the round is for; else the unfinished one, or this week.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train on fewer pairs than retrain.min_pairs.")] = False,
    moment: MomentOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Mine, train, judge, publish, open the canary. Running it again resumes where it was; one process at a time."""
    from retrain.progress import reporting

    settings = current_settings(quiet_logs=False)
    if settings.retrain.distributed.node_rank:
        join_training(settings)
        return
    alias = chosen_alias(settings, model)
    lease, ttl_s = retrain_lease(alias), settings.worker.lease_s
    with (
        current_database(settings) as shared,
        leases.held(shared, lease, leases.this_process(), ttl_s=ttl_s, clock=now, patience_s=2 * ttl_s) as epoch,
        reporting(sys.stderr) as report,
    ):
        database = leases.FencedDatabase(shared, lease, epoch)
        said = answered(database, alias, moment) if moment is not None else None
        if said is not None:
            print_not_due(f"this moment of the schedule has its answer: {said}", as_json=as_json)
            return
        mined, decision = mine_and_decide(database, settings, alias, if_due=if_due)
        if decision is not None:
            add_check(database, alias, decision, at=now(), moment=moment)
            if not decision.is_due:
                print_not_due(decision.reason, as_json=as_json)
                return
        options = options_for(database, alias, decision, cycle, force=force)
        outcome = train_and_judge(database, settings, alias, mined, options, report)
    print_outcome(outcome, as_json=as_json)
    if outcome.status.value in ("failed", "cannot_tell", "given_up"):
        raise NegativeVerdict(f"run {outcome.run_id}: {outcome.reason}")


def join_training(settings: Settings) -> None:
    """On a node that is not the first: lend its processes to the round that runs there, for one training."""
    from retrain.distributed import join

    join(settings.retrain.distributed, settings.state_dir / "joined")
    typer.echo("trained with the first node")


def retrain_lease(alias: str) -> str:
    """The name of the lease of whoever works on an alias's rounds."""
    return f"retrain/{alias}"


def mine_and_decide(
    database: Database, settings: Settings, alias: str, *, if_due: bool
) -> tuple[Counter[str], Decision | None]:
    """What gave no pair, by reason; and, if asked, whether there is enough for a round."""
    from feedback.mining import mine_alias
    from feedback.retention import kept_since
    from feedback.similarity.configured import similarity_of

    at = now()
    since = kept_since(settings.retention.pairs_days, at)
    least, near = settings.feedback.judge.min_margin, similarity_of(settings.feedback.similarity)
    with mining_place(settings) as place:
        mined = mine_alias(database, alias, at, since=since, min_judged_margin=least, place=place, similarity=near)
        found = select_mined(database, settings, alias, place=place) if if_due else None
    decision = decide_now(database, settings, alias, len(found.new), found.left_out) if found else None
    return Counter(mined.skipped), decision


def options_for(
    database: Database, alias: str, decision: Decision | None, cycle: str | None, *, force: bool
) -> RoundOptions:
    """An alarm waives most of the pairs; the run remembers why it was due."""
    from retrain.pipeline import RoundOptions  # Loads torch: not to find that nothing is due.

    if decision is None or decision.code == Code.UNFINISHED:
        return RoundOptions(cycle=cycle, force=force)
    unused = cycle or next_cycle(database, alias, now())
    return RoundOptions(cycle=unused, force=force or decision.code == Code.ALARM, note=f"due: {decision.reason}")


def next_cycle(database: Database, alias: str, at: float) -> str:
    """This week; or, when it has had its round and another is due all the same, this week's second, third, ..."""
    from retrain.pipeline import iso_week

    week, used = iso_week(at), {run.cycle for run in list_runs(database, alias)}
    names = (week, *(f"{week}.{number}" for number in range(2, len(used) + 3)))
    return next(name for name in names if name not in used)


def train_and_judge(
    database: Database,
    settings: Settings,
    alias: str,
    unmined: Counter[str],
    options: RoundOptions,
    report: Report,
) -> RunOutcome:
    """The round itself.

    Args:
        database: fenced by the round's lease.
        unmined: what gave no pair, by reason.
    """
    from feedback.erasure_files import mark_late_models
    from feedback.pair_stream import PairsById
    from feedback.tombstone_store import has_any
    from retrain.pipeline import RoundInputs, run_round

    score_toxicity = toxicity_scorer(settings)
    selected = select_mined(database, settings, alias, score_toxicity)
    inputs = RoundInputs(
        new=PairsById(database, selected.new),
        earlier=PairsById(database, selected.earlier),
        score_toxicity=score_toxicity,
        open_canary=canary_opener(database, settings, alias),
        unpaired=thumbs_to_learn_from(database, settings, alias),
        skipped=unmined + selected.left_out,
        forget=forgetter(settings, database),
        may_be_erased=lambda: has_any(database),
        report=report,
        epoch=database.epoch if isinstance(database, leases.FencedDatabase) else 0,
    )
    outcome = run_round(database, settings, alias, inputs, options)
    mark_late_models(database, settings.retrain.runs_dir, now())
    return outcome


def thumbs_to_learn_from(database: Database, settings: Settings, alias: str) -> Sequence[UnpairedExample]:
    """None unless the objective learns from single thumbs: to find them the whole history is walked through."""
    if settings.retrain.training.objective != "kto":
        return ()
    with mining_place(settings) as place:
        return select_thumbs(database, settings, alias, place=place)[0]


def print_outcome(outcome: RunOutcome, *, as_json: bool) -> None:
    shown = {"run": outcome.run_id, "status": outcome.status.value, "model": outcome.model, "reason": outcome.reason}
    print_fields(shown | {"rollout": outcome.rollout_id}, as_json=as_json)


def print_not_due(reason: str, *, as_json: bool) -> None:
    """That nothing was done is not an error."""
    if as_json:
        print_fields({"run": None, "status": "not_due", "reason": reason}, as_json=True)
    else:
        typer.echo(f"not due: {reason}")


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
    from ab_testing.route_store import load_route
    from retrain.errors import CanaryTaken

    if not settings.rollout.auto_start:
        return None

    def open_canary(candidate: str) -> str:
        if (opened := newest_rollout(database, alias, candidate=candidate)) is not None:
            return opened.id
        if (running := running_rollout(database, alias)) is not None:
            raise CanaryTaken(f"{alias} has a running rollout: {running.id}; promote {candidate} when it is over")
        route = load_route(database, alias)
        if route is not None and route.experiment is not None:
            split = route.experiment.key
            raise CanaryTaken(f"{alias} is split by the experiment {split}; promote {candidate} when it has ended")
        if settings.rollout.shadow.share:
            raise CanaryTaken(begin_in_shadow(database, settings, alias, candidate))
        return open_rollout(database, settings, alias, candidate, actor="retrain", clock=now)

    return open_canary


def begin_in_shadow(database: Database, settings: Settings, alias: str, candidate: str) -> str:
    """Have a candidate answer in the dark before its canary; why there is no canary yet. Safe to repeat."""
    from ab_testing.shadow_orders import start_shadow
    from ab_testing.shadow_store import newest_shadow, running_shadow

    known = newest_shadow(database, alias, candidate=candidate)
    if known is None:
        if (running := running_shadow(database, alias)) is not None:
            return f"{alias} has a running shadow run: {running.id}; promote {candidate} when it is over"
        known = start_shadow(database, settings, alias, candidate, actor="retrain", clock=now, is_ramp=True)
    return f"the shadow run {known.id} comes first ({known.status})"


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
    """What runs now, when the next round is due, and why not yet, by the pairs that the last mining stored."""
    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings) as database:
        fields = status_of(database, settings, alias)
    print_fields(fields, as_json=as_json)


def status_of(database: Database, settings: Settings, alias: str) -> dict[str, Any]:
    """How retraining of an alias stands."""
    selected = select_stored(database, settings, alias)
    newest = next(iter(list_runs(database, alias)), None)
    decision = decide_now(database, settings, alias, len(selected.new), selected.left_out)
    fields: dict[str, Any] = {"alias": alias, "working": leases.holding(database, retrain_lease(alias), now())}
    fields |= {"new_pairs": len(selected.new), "left_out": dict(selected.left_out)}
    fields |= {"due": decision.is_due, "why_due": decision.reason if decision.is_due else None}
    fields |= {"why_not_due": None if decision.is_due else decision.reason}
    fields |= {"next_scheduled": next_scheduled(settings.retrain, now())}
    fields |= {"run": newest.id, "status": newest.status.value, "step": newest.step} if newest else {"run": None}
    fields |= {"run_failed": why_failed(newest) if newest else None}
    left_out = newest.detail.get("left_out", {}) if newest else {}
    fields |= {"run_left_out": {name: n for name, n in left_out.items() if n}}
    checked = newest_check(database, alias)
    said = {"at": moment_shown(checked.at), "due": checked.is_due, "reason": checked.reason} if checked else None
    return fields | {"last_check": said, "skips": dict(count_skips(database, alias))}


def why_failed(run: Run) -> str | None:
    """What a round broke on, if it did: why it was given up, or why it waits to be tried again."""
    if run.status == RunStatus.GIVEN_UP:
        return str(run.detail.get("reason"))
    failures = run.detail.get("failures", {}).get("n", 0)
    return f"{run.detail.get('error')} (failures in a row: {failures})" if run.status == RunStatus.ERROR else None


def next_scheduled(settings: RetrainSettings, at: float) -> str | None:
    """When the worker looks next whether a round is due; None where no schedule is set."""
    if settings.schedule is None:
        return None
    return moment_shown(next_moment(settings.schedule, settings.time_zone, at))


def moment_shown(at: float) -> str:
    """
    >>> moment_shown(0.0)
    '1970-01-01T00:00:00+00:00'
    """
    return datetime.fromtimestamp(round(at), UTC).isoformat()


@retrain.command("list")
def retrain_list(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """All runs, the newest first."""
    with current_database(current_settings()) as database:
        found = list_runs(database, model)
    rows = [
        asdict(run)
        | {"status": run.status.value, "model": run.detail.get("model"), "started": moment_shown(run.created_at)}
        for run in found
    ]
    print_rows(rows, as_json=as_json, columns=("id", "alias", "cycle", "status", "step", "model", "started"))


@retrain.command("explain")
def retrain_explain(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: JsonFlag = False) -> None:
    """What each step of a run did, what the gate said, and where its model comes from. All that is recorded as JSON."""
    with current_database(current_settings()) as database:
        run = get_run(database, run_id)
        told = explained(database, run)
    print_fields((asdict(run) if as_json else {}) | told, as_json=as_json)


def explained(database: Database, run: Run) -> dict[str, Any]:
    """A run for people."""
    detail, at_work = run.detail, leases.holding(database, retrain_lease(run.alias), now())
    told: dict[str, Any] = {"id": run.id, "alias": run.alias, "cycle": run.cycle, "status": run.status.value}
    told |= {"step": run.step, "working": None if run.status.is_final else at_work}
    told |= {"started": moment_shown(run.created_at), "changed": moment_shown(run.updated_at)}
    told |= {name: detail[name] for name in ("note", "reason", "error") if detail.get(name)}
    told["steps"] = [
        {"step": name, "did": done.get("did", ""), "seconds": done.get("seconds")}
        for name, done in sorted(detail.get("steps", {}).items(), key=lambda item: float(item[1].get("at", 0.0)))
    ]
    checks = (detail.get("gate") or {}).get("checks", ())
    told["checks"] = {check["name"]: f"{check['verdict']}: {check['reason']}" for check in checks}
    told["lineage"] = line_of(database, detail.get("model"), detail.get("parent"))
    return told


def line_of(database: Database, model: str | None, parent: str | None) -> list[str]:
    """A run's model and its ancestors, the youngest first; the base, which need not be registered, last."""
    if model is None:
        return [parent] if parent else []
    line = lineage(database, model)
    last = line[-1].parent or line[-1].base
    return [ancestor.name for ancestor in line] + ([last] if last not in {one.name for one in line} else [])
