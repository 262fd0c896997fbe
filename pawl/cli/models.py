"""`pawl models`: versions, where they come from, whether they are served as they were trained, and what follows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pawl.adapter_files import verify_adapter
from pawl.audit import AuditEvent, latest_events
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
from pawl.engines import Engine, verify
from pawl.errors import NegativeVerdict, PawlError
from pawl.fingerprints import fingerprint_of
from pawl.registry import (
    RESTING,
    Model,
    ModelState,
    get_model,
    lineage,
    list_models,
    mark_files_deleted,
    retire_model,
)
from pawl.settings import Settings

HISTORY = 200
DAY_S = 86400.0

ForceOption = Annotated[bool, typer.Option("--force", help="Even a version that the gate rejected.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Of this model alias only.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]

models = typer.Typer(no_args_is_help=True, help="Model versions.")


def register(app: typer.Typer) -> None:
    app.add_typer(models, name="models")


@models.command("list")
def models_list(
    model: ModelOption = None,
    state: Annotated[ModelState | None, typer.Option("--state", help="Only versions in this state.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Registered versions, the newest of each alias first."""
    settings = current_settings()
    aliases = [chosen_alias(settings, model)] if model else list(settings.serving.models)
    with current_database(settings) as database:
        rows = [listed(found) for alias in aliases for found in list_models(database, alias, state)]
    print_rows(rows, as_json=as_json, columns=("name", "alias", "state", "parent", "run_id", "erased"))


def listed(model: Model) -> dict[str, Any]:
    """As the list shows it, with whether pairs it learned from have been erased since."""
    erased = model.manifest.get("erased")
    learned = None if not erased else f"{erased['pairs']} pairs" if erased["pairs"] else f"through {erased['through']}"
    return asdict(model) | {"state": model.state.value, "erased": learned}


@models.command("show")
def models_show(name: NameArgument, as_json: JsonFlag = False) -> None:
    """One version, its line of descent, and everything that was done to it."""
    with current_database(current_settings()) as database:
        found = get_model(database, name)
        line = [ancestor.name for ancestor in lineage(database, name)]
        events = latest_events(database, subject=name, limit=HISTORY)[::-1]
    fields = asdict(found) | {"state": found.state.value, "lineage": line, "history": [told(one) for one in events]}
    if not as_json:  # The fingerprint's numbers say nothing to people.
        fields["manifest"] = {key: value for key, value in found.manifest.items() if key != "fingerprint"}
    print_fields(fields, as_json=as_json)


def told(event: AuditEvent) -> dict[str, Any]:
    """A line of a version's history."""
    return {"at": event.at, "action": event.action, "actor": event.actor, "detail": dict(event.detail)}


@models.command("promote")
def models_promote(name: NameArgument, force: ForceOption = False, as_json: JsonFlag = False) -> None:
    """Open a canary for a registered version: it becomes the champion if its users are no worse off."""
    from ab_testing.rollout_orders import open_rollout

    settings = current_settings()
    with current_database(settings) as database:
        alias = chosen_alias(settings, get_model(database, name).alias)
        opened = open_rollout(database, settings, alias, name, actor=operator(), clock=now, is_forced=force)
    if as_json:
        print_fields({"rollout": opened, "alias": alias, "candidate": name}, as_json=True)
    else:
        typer.echo(opened)


@models.command("retire")
def models_retire(name: NameArgument, as_json: JsonFlag = False) -> None:
    """Take a version out of consideration. The champion cannot be retired: promote another first."""
    with current_database(current_settings()) as database:
        retired = retire_model(database, name, now=now(), actor=operator())
    if as_json:
        print_fields(listed(retired), as_json=True)
    else:
        typer.echo(f"{name} retired")


@dataclass(frozen=True)
class Finding:
    """Whether a version is what it should be in one place."""

    name: str
    place: str
    """`files`, or an engine's address."""
    is_right: bool
    reason: str


@models.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Else all that should be served now.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look through adapters' files, and ask every engine whether it serves them as they were trained; 1 if not."""
    settings = current_settings()
    with current_database(settings) as database:
        chosen = [get_model(database, name)] if name else _wanted(database, settings)
    findings = [finding for model in chosen for finding in examine(model, settings)]
    columns = ("name", "place", "is_right", "reason")
    print_rows([asdict(finding) for finding in findings], as_json=as_json, columns=columns)
    if wrong := sum(not finding.is_right for finding in findings):
        raise NegativeVerdict(f"{wrong} of {len(findings)} are not as they should be")


def _wanted(database: Database, settings: Settings) -> list[Model]:
    from pawl.cli.adapter_keeper import desired_of

    serving = settings.serving
    names = [one.name for alias in serving.models for one in desired_of(database, serving, alias, now()).wanted]
    return [get_model(database, name) for name in dict.fromkeys(names)]


def examine(model: Model, settings: Settings) -> Iterator[Finding]:
    """The version's files, then every engine of its alias. Nothing is loaded or unloaded."""
    if model.path is None:
        return
    yield _finding(model.name, "files", partial(_check_files, model, settings.engine.max_lora_rank))
    served = settings.serving.models.get(model.alias)
    for url in served.engines if served else ():
        yield _finding(model.name, url, partial(_check_served, model, url))


def _finding(name: str, place: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except PawlError as exc:
        return Finding(name, place, False, str(exc))
    return Finding(name, place, True, "as it should be")


def _check_files(model: Model, max_rank: int) -> None:
    verify_adapter(Path(model.path or ""), max_rank, sha256=model.sha256)


def _check_served(model: Model, url: str) -> None:
    with closing(Engine(url)) as engine:
        root = engine.served().get(model.name)
        if root != str(Path(model.path or "").absolute()):
            raise NegativeVerdict(f"served from {root or 'nowhere'}, not from {model.path}")
        verify(engine, model.name, model.base, fingerprint_of(model.manifest))


@models.command("export")
def models_export(
    name: NameArgument,
    to: Annotated[str, typer.Option("--to", help="A directory, or the http:// address of an MLflow server.")],
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Of the MLflow server: a file with a bearer token.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy a version's files to a directory, or into an MLflow server's registry under the alias's name."""
    from retrain.mlflow_export import MlflowServer

    settings = current_settings()
    with current_database(settings) as database:
        model = get_model(database, name)
    adapter = verify_adapter(Path(model.path or ""), settings.engine.max_lora_rank, sha256=model.sha256)
    if not to.startswith(("http://", "https://")):
        shutil.copytree(adapter.path, Path(to) / adapter.name)
        print_fields({"path": str(Path(to) / adapter.name)}, as_json=as_json)
        return
    token = token_file.read_text().strip() if token_file else None
    with closing(MlflowServer(to, token)) as server:
        print_fields(server.export(model, adapter)._asdict(), as_json=as_json)


@models.command("prune")
def models_prune(
    older_than: Annotated[float, typer.Option("--older-than", min=0.0, help="Days of rest.", metavar="DAYS")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete the files of versions that have rested and that no engine has loaded; their records stay."""
    from retrain.adapters import delete_files, sweep

    settings = current_settings()
    since = now() - older_than * DAY_S
    with current_database(settings) as database:
        unused = list(prunable(database, settings, since))
        for model in unused if not dry_run else ():
            if mark_files_deleted(database, model.name, rested_since=since, now=now(), actor=operator()):
                delete_files(Path(model.path or ""))
    if not dry_run:
        sweep(settings.retrain.adapters_dir, now() - DAY_S)
    rows = [{"name": model.name, "path": model.path, "state": model.state.value} for model in unused]
    print_rows(rows, as_json=as_json, columns=("name", "state", "path"))


def prunable(database: Database, settings: Settings, before: float) -> Iterator[Model]:
    """Versions that have rested since `before`, whose files are here, and that nothing needs any more.

    Raises:
        PawlError: an engine does not tell what it has loaded. It dies if the files of that go.
    """
    from pawl.cli.adapter_keeper import desired_of, drain_s, is_rested

    serving = settings.serving
    found = [model for alias in serving.models for model in list_models(database, alias)]
    needed = {one.name for alias in serving.models for one in desired_of(database, serving, alias, now()).wanted}
    needed |= {model.parent for model in found if model.state not in RESTING and model.parent}
    loaded = _loaded_anywhere(settings)
    for model in found:
        has_rested = is_rested(model, now(), drain_s(serving)) and model.updated_at <= before
        is_free = model.name not in needed and model.path not in loaded
        if has_rested and is_free and model.path and Path(model.path).is_dir():
            yield model


def _loaded_anywhere(settings: Settings) -> frozenset[str]:
    """The directories that engines have adapters from."""
    urls = {url for model in settings.serving.models.values() for url in model.engines}
    roots: set[str] = set()
    for url in sorted(urls):
        with closing(Engine(url)) as engine:
            roots |= set(engine.served().values())
    return frozenset(roots)
