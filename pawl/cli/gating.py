"""`pawl gate`: judge a run's candidate, by what was measured or by asking both models again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer

from pawl import leases
from pawl.cli.context import JsonFlag, current_database, current_settings, print_fields
from pawl.clock import now
from pawl.database import Database
from pawl.engines import Engine, load_verified
from pawl.errors import NegativeVerdict
from pawl.registry import Run, get_run
from pawl.settings import ModelSettings, Settings

if TYPE_CHECKING:
    from retrain.evaluation import EvaluationPlan
    from retrain.measurements import Measurements

log = structlog.get_logger()
EvaluateOption = Annotated[
    bool, typer.Option("--evaluate", help="Ask both models again, on the engine, instead of what was measured.")
]


def register(app: typer.Typer) -> None:
    app.command()(gate)


def gate(
    run_id: Annotated[str, typer.Argument(metavar="RUN")], evaluate: EvaluateOption = False, as_json: JsonFlag = False
) -> None:
    """Judge a run's candidate by the settings as they are now, check by check; exit code 1 unless it passes.

    Where the run's directory is on this machine a report is written into it, as a page; elsewhere the verdict that was
    recorded is shown. Nothing else changes: what was published stays published.
    """
    settings = current_settings()
    with current_database(settings) as database:
        run = get_run(database, run_id)
        directory = settings.retrain.runs_dir.absolute() / run.id
        measurements = _measured(database, settings, run, directory, again=evaluate)
    recorded = run.detail.get("gate")
    report = judged(settings, directory, measurements) or recorded
    if report is None:
        raise NegativeVerdict(f"run {run_id} has not reached the gate: it is {run.status.value} at {run.step}")
    if as_json:
        print_fields({**report, "recorded_verdict": recorded and recorded["verdict"]}, as_json=True)
    else:
        for line in lines_of(report, recorded):
            typer.echo(line)
    if report["verdict"] != "pass":
        raise NegativeVerdict(f"run {run_id}: the gate says {report['verdict']}")


def lines_of(report: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> Iterator[str]:
    """The report for a terminal.

    >>> list(lines_of({"verdict": "pass", "checks": []}, {"verdict": "fail"}))
    ['pass', 'recorded when the round was run: fail']
    """
    yield f"{report['verdict']}"
    for check in report["checks"]:
        veto = "" if check.get("is_required", True) else " (a veto only)"
        yield f"  {check['verdict']:<12}{check['reason']}{veto}"
    if recorded and recorded["verdict"] != report["verdict"]:
        yield f"recorded when the round was run: {recorded['verdict']}"
    if report.get("page"):
        yield f"report: {report['page']}"


def judged(settings: Settings, directory: Path, measurements: Measurements | None) -> dict[str, Any] | None:
    """What today's settings make of measurements, with the page that was written; None without measurements."""
    if measurements is None:
        return None
    from retrain.gate import judge, report_as_dict
    from retrain.gate_report import write_page

    report = judge(measurements, settings.retrain.gate)
    try:
        page: Path | None = write_page(directory, report, measurements, settings.retrain)
    except OSError as exc:
        log.warning("no_page", reason=str(exc))
        page = None
    return {**report_as_dict(report), "page": str(page) if page else None}


def _measured(database: Database, settings: Settings, run: Run, directory: Path, *, again: bool) -> Measurements | None:
    if again:
        return measure_again(database, settings, run, directory)
    if not directory.is_dir():
        return None
    from retrain.gate_report import read_measurements

    return read_measurements(directory)


def measure_again(database: Database, settings: Settings, run: Run, directory: Path) -> Measurements:
    """Compare the run's candidate with its parent anew, on the first engine of its alias.

    Raises:
        NegativeVerdict: the run has trained nothing yet, its directory is not here, or somebody else is just doing so.
        PawlError: something could not be measured.
    """
    from pawl.cli.learning import toxicity_scorer
    from retrain.examination import examine, plan_of
    from retrain.gate_report import contenders_of, read_holdout, scratch_for_benchmarks
    from retrain.pipeline import resolve_base

    contenders = contenders_of(directory)
    if contenders is None:
        raise NegativeVerdict(f"run {run.id} has no trained candidate in {directory}")
    base = resolve_base(settings, run.alias)
    holdout = read_holdout(directory)
    plan = plan_of(settings, run.alias, base, contenders, holdout)
    with _served(database, settings, plan), scratch_for_benchmarks() as scratch:
        return examine(settings, plan, holdout, toxicity_scorer(settings), scratch).measurements


@contextmanager
def _served(database: Database, settings: Settings, plan: EvaluationPlan) -> Iterator[None]:
    """Both models on one engine; what was not there before is taken out again, unless it came to be wanted meanwhile.

    Whoever else would take one of them out, the worker or another evaluation, sees that they are being asked.

    Raises:
        NegativeVerdict: another evaluation has one of them.
    """
    from pawl.cli.adapter_keeper import asking_lease

    adapters = [(one.name, one.adapter) for one in (plan.parent, plan.candidate) if one.adapter is not None]
    rank, ttl_s, holder = settings.engine.max_lora_rank, settings.worker.lease_s, leases.this_process()
    with closing(Engine(plan.engine_url)) as engine, ExitStack() as stack:
        for name, _ in sorted(adapters):  # In one order everywhere: of two evaluations one gets both.
            stack.enter_context(leases.held(database, asking_lease(name), holder, ttl_s=ttl_s, clock=now))
        before = engine.served()
        for name, path in adapters:
            if name not in before:  # Noted before it is loaded: what proves to be something else is there, too.
                stack.callback(_unload_unless_wanted, database, settings, engine, name)
            load_verified([engine], name, path, plan.base_served, max_rank=rank)
        yield


def _unload_unless_wanted(database: Database, settings: Settings, engine: Engine, name: str) -> None:
    """A rollout may have begun on it, or it was promoted."""
    from pawl.cli.adapter_keeper import desired_of

    serving = settings.serving
    aliases = [alias for alias, served in serving.models.items() if engine.url in _addresses(served)]
    wanted = {one.name for alias in aliases for one in desired_of(database, serving, alias, now()).wanted}
    if name not in wanted:
        engine.unload(name)


def _addresses(served: ModelSettings) -> set[str]:
    return {url.rstrip("/") for url in served.engines}
