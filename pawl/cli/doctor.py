"""`pawl doctor`: what is installed, reachable and compatible, and what to do about the rest."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import typer

from pawl.cli.context import JsonFlag, config_path, current_database, current_settings, print_rows
from pawl.compiled import compiled
from pawl.database import WAL_SAFE_SINCE
from pawl.errors import ConfigurationError, NegativeVerdict, Unreachable
from pawl.settings import Settings

State = Literal["ok", "note", "problem"]
EXTRAS = {"train": ("torch", "trl", "peft"), "score": ("torch", "detoxify")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    todo: str = ""


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: JsonFlag = False) -> None:
    """Look at everything Pawl needs; exit code 1 if something that is needed is missing."""
    settings = current_settings()
    findings = [finding for check in CHECKS for finding in check(settings)]
    print_rows([asdict(finding) for finding in findings], as_json=as_json, columns=("what", "state", "found", "todo"))
    problems = [finding.what for finding in findings if finding.state == "problem"]
    if problems:
        raise NegativeVerdict(f"needs attention: {', '.join(problems)}")


def _python(_: Settings) -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    yield Finding("configuration", "ok", str(config_path() or "defaults and environment"))


def _hot_path(_: Settings) -> Iterator[Finding]:
    modules, stale = compiled()
    if stale:
        found = f"compiled from other sources: {', '.join(stale)}"
        yield Finding("hot path", "problem", found, "make compiled, or make interpreted")
    else:
        yield Finding("hot path", "ok", f"compiled, {len(modules)} modules" if modules else "interpreted")


def _sqlite(settings: Settings) -> Iterator[Finding]:
    if sqlite3.sqlite_version_info >= WAL_SAFE_SINCE:
        yield Finding("sqlite", "ok", sqlite3.sqlite_version)
        return
    safe = ".".join(map(str, WAL_SAFE_SINCE))
    shared = settings.database.url.startswith("sqlite")
    found = f"{sqlite3.sqlite_version}, older than {safe}: " + (
        "the shared file uses a rollback journal, since several writers can corrupt a WAL file"
        if shared
        else "only the spools use it, one writer each"
    )
    yield Finding("sqlite", "note", found, f"Python with SQLite {safe} or PostgreSQL is faster" if shared else "")


def _database(settings: Settings) -> Iterator[Finding]:
    try:
        with current_database(settings) as database:
            yield Finding("database", "ok", database.engine.url.render_as_string(hide_password=True))
    except Unreachable as exc:
        yield Finding("database", "problem", str(exc), "start it, or correct database.url")
    except ConfigurationError as exc:
        yield Finding("database", "problem", str(exc), "pawl db upgrade, or correct database.url")


def _models(settings: Settings) -> Iterator[Finding]:
    from serving.engine_process import is_healthy

    if not settings.serving.models:
        yield Finding("models", "problem", "serving.models is empty", "name a model and its engines")
    for alias, model in settings.serving.models.items():
        for url in model.engines:
            healthy = is_healthy(url)
            todo = "" if healthy else "pawl engine --model ..."
            state: State = "ok" if healthy else "problem"
            yield Finding(f"engine of {alias}", state, f"{url} {'answers' if healthy else 'does not answer'}", todo)


def _extras(_: Settings) -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if installed(package) is None]
        found = f"without {', '.join(missing)}" if missing else ", ".join(f"{p} {installed(p)}" for p in packages)
        yield Finding(
            f"extra {extra}", "note" if missing else "ok", found, f"pip install pawl[{extra}]" if missing else ""
        )


def _state(settings: Settings) -> Iterator[Finding]:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    writable = os.access(settings.state_dir, os.W_OK)
    yield Finding(
        "state_dir", "ok" if writable else "problem", str(settings.state_dir), "" if writable else "make it writable"
    )


def installed(package: str) -> str | None:
    """A package's version without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _python,
    _hot_path,
    _sqlite,
    _state,
    _database,
    _models,
    _extras,
)
