"""The `pawl` command: the root that puts everything together and that nobody imports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import httpx2
import sqlalchemy as sa
import typer

from ab_testing.errors import ABTestingError
from pawl.cli import (
    data,
    doctor,
    erase,
    experiments,
    gating,
    keys,
    learning,
    models,
    rollouts,
    servers,
    shadows,
    training,
    webhooks,
)
from pawl.cli.context import remember_config
from pawl.database import AWAY
from pawl.errors import ConfigurationError, PawlError, Unreachable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model, learn from what its users say, put the better one into service.",
)
servers.register(app)
data.register(app)
erase.register(app)
keys.register(app)
learning.register(app)
training.register(learning.retrain)
gating.register(app)
models.register(app)
rollouts.register(app)
shadows.register(rollouts.rollout)
webhooks.register(app)
experiments.register(app)
doctor.register(app)


@app.callback()
def root(
    config: Annotated[
        Path | None, typer.Option("--config", help="Configuration file; else PAWL_CONFIG, else ./pawl.yaml.")
    ] = None,
) -> None:
    """Options that stand before or after any command."""
    remember_config(config)


def main() -> None:
    """Run the command that the program was started with."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command. Exit codes: 0 done, 1 a negative verdict, 2 wrong use or configuration, 3 out of reach."""
    try:
        code = app(args=config_first(arguments), prog_name="pawl", standalone_mode=False)
    except typer.TyperException as exc:
        return _complain(exc.format_message(), exc.exit_code)
    except PawlError as exc:
        return _complain(str(exc), exc.exit_code)
    except ABTestingError as exc:
        return _complain(str(exc), ConfigurationError.exit_code)
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as exc:
        return _complain(f"no answer: {type(exc).__name__} {exc}", Unreachable.exit_code)
    except OSError as exc:
        return _complain(f"{exc.filename or 'system'}: {exc.strerror or exc}", ConfigurationError.exit_code)
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as exc:
        told = str(getattr(exc, "orig", None) or exc).strip().splitlines() or [type(exc).__name__]
        is_away = isinstance(exc, AWAY)
        return _complain(f"the database failed: {told[0]}", (Unreachable if is_away else ConfigurationError).exit_code)
    return code if isinstance(code, int) else 0


def _complain(message: str, exit_code: int) -> int:
    """One line on standard error; none where the help is what was printed instead."""
    if message:
        typer.echo(f"pawl: {' '.join(message.split())}", err=True)
    return exit_code


def config_first(arguments: Sequence[str]) -> list[str]:
    """Move `--config X` to the front, so that it may stand after the command too.

    >>> config_first(["serve", "--config", "a.yaml"])
    ['--config', 'a.yaml', 'serve']
    """
    rest = list(arguments)
    for index, argument in enumerate(rest):
        if argument == "--config" and index + 1 < len(rest):
            return [*rest[index : index + 2], *rest[:index], *rest[index + 2 :]]
        if argument.startswith("--config="):
            return [argument, *rest[:index], *rest[index + 1 :]]
    return rest


if __name__ == "__main__":
    main()
