"""What every command needs: the settings, the database, and one way to print."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pawl.database import Database, open_database, require_current_schema
from pawl.errors import ConfigurationError
from pawl.logs import configure_logging
from pawl.settings import ModelSettings, Settings, find_config, load_settings

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

MAX_ACTOR_CHARS = 64
PIPED_WIDTH = 10_000
"""Without a terminal a row stays one line, whole, for whatever reads it."""

_config: list[Path] = []


def remember_config(path: Path | None) -> None:
    """Keep what `--config` said for the command that follows."""
    _config[:] = [path] if path else []


def current_settings(*, quiet_logs: bool = True) -> Settings:
    """The settings this command runs with; logging is set up by them.

    Raises:
        ConfigurationError: see `pawl.settings.load_settings`.
    """
    settings = load_settings(config_path(), os.environ)
    configure_logging(settings.log.model_copy(update={"level": "warning"}) if quiet_logs else settings.log)
    return settings


def config_path() -> Path | None:
    """The configuration file in force, if there is one."""
    return find_config(_config[0] if _config else None, os.environ)


@contextmanager
def current_database(settings: Settings, *, reads_much: bool = False) -> Iterator[Database]:
    """The shared database, with the schema this version needs; `reads_much` as in `open_database`.

    Raises:
        ConfigurationError: the schema is another.
        Unreachable: the database does not answer.
    """
    database = open_database(settings.database, reads_much=reads_much)
    try:
        require_current_schema(database)
        yield database
    finally:
        database.close()


def chosen_alias(settings: Settings, given: str | None) -> str:
    """The model alias a command is about: the one given, else `retrain.alias`, else the only one there is.

    Raises:
        ConfigurationError: there is no such alias, or several to choose from.
    """
    models = settings.serving.models
    alias = given or settings.retrain.alias or (next(iter(models)) if len(models) == 1 else None)
    if alias is None:
        raise ConfigurationError(f"name the model with --model: one of {', '.join(models) or '(none configured)'}")
    if alias not in models:
        raise ConfigurationError(f"serving.models has no {alias!r}; it has {', '.join(models) or 'none'}")
    return alias


def model_settings(settings: Settings, alias: str) -> ModelSettings:
    """The settings of an alias that `chosen_alias` returned."""
    return settings.serving.models[alias]


def operator() -> str:
    """Who sits at this command line, for the audit trail."""
    try:
        person = getpass.getuser()
    except (KeyError, OSError):  # A container's user need not have a name.
        person = str(os.getuid())
    return f"operator:{person}@{socket.gethostname()}"[:MAX_ACTOR_CHARS]


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool, columns: Sequence[str]) -> None:
    """A table for people, or all fields as JSON for programs."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        typer.echo("none")
        return
    table = Table(*(Column(name, overflow="fold") for name in columns), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column))) for column in columns))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_fields(fields: Mapping[str, Any], *, as_json: bool) -> None:
    """One record: a line per field, what is nested below it and indented, or JSON."""
    if as_json:
        print_json(dict(fields))
        return
    for line in field_lines(fields):
        typer.echo(line)


def field_lines(fields: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a record for people.

    >>> list(field_lines({"id": "r1", "gate": {"verdict": "pass"}, "checks": [{"name": "kl", "ok": True}]}))
    ['id      r1', 'gate', '  verdict  pass', 'checks', '  - name  kl', '    ok    true']
    """
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        nested = list(_nested_lines(value))
        yield name if nested else f"{name:<{width}}  {_cell(value)}"
        yield from (f"  {line}" for line in nested)


def _nested_lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from field_lines(value)
    elif isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from (f"{'  ' if n else '- '}{line}" for n, line in enumerate(field_lines(item)))


def _cell(value: Any) -> str:
    """One line of text; what a terminal would act on is escaped, since people and models wrote some of it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)


def refuse(message: str) -> ConfigurationError:
    """Wrong use of a command."""
    return ConfigurationError(message)
