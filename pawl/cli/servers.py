"""`pawl serve | engine | worker | up | demo`: the processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pawl.cli.context import config_path, current_database, current_settings
from pawl.cli.selecting import select_mined
from pawl.errors import ConfigurationError, NegativeVerdict
from pawl.settings import ENV_PREFIX, load_settings


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(engine)
    app.command()(worker)
    app.command()(up)
    app.command()(demo)


def serve(
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; else serving.workers.", min=1)] = None,
) -> None:
    """Run the gateway. SIGHUP restarts it with the configuration as it is then, without dropping a connection."""
    from serving.supervisor import supervise

    overrides = {"PAWL_CONFIG": str(path.resolve()) if (path := config_path()) else None}
    overrides[f"{ENV_PREFIX}SERVING__WORKERS"] = str(workers) if workers else None
    os.environ.update({name: value for name, value in overrides.items() if value})  # For the children, and for later.
    settings = current_settings(quiet_logs=False)
    raise typer.Exit(supervise(settings, os.environ, lambda: load_settings(config_path(), os.environ)))


def engine(
    model: Annotated[str | None, typer.Option("--model", help="Directory or hub name; else engine.model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Run a vLLM server with the flags Pawl needs; what follows `--` in engine.extra_args is passed on."""
    from serving.engine_process import describe_command, engine_command, engine_environment, has_gpu

    settings = current_settings(quiet_logs=False)
    chosen = model or settings.engine.model
    if chosen is None:
        raise ConfigurationError("name the model with --model, or set engine.model")
    on_cpu = not has_gpu()
    command = engine_command(settings.engine, chosen, on_cpu=on_cpu)
    environment = engine_environment(os.environ, chosen, on_cpu=on_cpu)
    if dry_run:
        typer.echo(describe_command(command, environment))
        return
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError as exc:
        raise ConfigurationError(f"engine.python {command[0]} does not exist; `make up` installs the engine") from exc


def worker() -> None:
    """Run the background duties: scoring, rollouts, adapters."""
    from pawl.cli.worker import Worker

    settings = current_settings(quiet_logs=False)
    with current_database(settings) as database:
        Worker(settings, database).run()


def up(
    model: Annotated[
        str | None, typer.Option("--model", help="Directory or hub name; else engine.model, else the practice model.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Of the gateway; else serving.port.")] = None,
) -> None:
    """Run everything on this machine: engine, gateway and worker, as supervised processes with SQLite."""
    from serving.stack import Stack, on_one_machine, run_until_signalled

    settings = current_settings(quiet_logs=False)
    chosen = model or settings.engine.model
    if chosen is None:
        from practice.world import with_practice_model

        settings = with_practice_model(settings, Path("var/practice"))
    settings = on_one_machine(settings, chosen, port)
    stack = Stack(settings, settings.state_dir / "up")

    def announce() -> None:
        typer.echo(f"ready: {stack.url}/v1 serves {', '.join(settings.serving.models)}")
        typer.echo(f"logs: {stack.directory}/logs; for other commands: export PAWL_CONFIG={stack.config}")

    run_until_signalled(stack, announce)


def demo(
    directory: Annotated[Path, typer.Option("--out", help="Where the report and all records go.")] = Path("var/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Of the simulated users.")] = 7,
) -> None:
    """One full turn of the loop on the practice model, with simulated users and a report at the end."""
    from practice.demo import run_demo

    problems = run_demo(directory, seed=seed, select=select_mined)
    if problems:
        raise NegativeVerdict(f"the demo did not do its job: {'; '.join(problems)}")
