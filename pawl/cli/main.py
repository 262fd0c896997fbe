"""The `pawl` command: the root that puts everything together and that nobody imports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pawl.cli import data, doctor, learning, rollouts, servers
from pawl.cli.context import remember_config
from pawl.errors import PawlError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model, learn from what its users say, put the better one into service.",
)
servers.register(app)
data.register(app)
learning.register(app)
rollouts.register(app)
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
    """Run a command. Exit codes: 0 done, 1 a negative verdict, 2 wrong use or configuration, 3 something unreachable."""
    try:
        app(args=config_first(sys.argv[1:]))
    except PawlError as exc:
        typer.echo(f"pawl: {' '.join(str(exc).split())}", err=True)
        raise SystemExit(exc.exit_code) from exc
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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
