"""What every child of `serving.supervisor` does first: its parent's numbers, configuration, logging, clear errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from monitoring.board import Board
from monitoring.exposition import Place
from pawl.errors import ConfigurationError, PawlError
from pawl.logs import configure_logging
from pawl.settings import Settings, find_config, load_settings


class Inheritance(NamedTuple):
    """What a child has from its parent."""

    parent: int
    """The parent's process id."""
    listeners: list[int]
    """Descriptors of the sockets to accept from; none for a child that serves nobody."""
    place: Place
    """Where this process writes its metrics."""
    on_ready: Callable[[], None]
    """To be called once."""


def run_child(work: Callable[[Settings, Inheritance], None], arguments: Sequence[str] | None = None) -> int:
    """Read the configuration and work; the exit codes are those of the `pawl` command."""
    given = inheritance(arguments)
    if os.getppid() != given.parent:
        return 0  # It died before the kernel knew that we end with it.
    try:
        settings = load_settings(find_config(None, os.environ), os.environ)
        configure_logging(settings.log)
        work(settings, given)
    except PawlError as exc:
        return complain(str(exc), exc.exit_code)
    except OSError as exc:
        return complain(f"{exc.filename or 'system'}: {exc.strerror or exc}", ConfigurationError.exit_code)
    return 0


def inheritance(arguments: Sequence[str] | None) -> Inheritance:
    """What the parent says on the command line; see `serving.supervisor.arguments_of`."""
    parser = argparse.ArgumentParser()
    for name in ("--parent", "--ready", "--board", "--page"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--listen", type=int, action="append", default=[])
    options = parser.parse_args(arguments)
    place = Place(Board(options.board), options.page)
    return Inheritance(options.parent, options.listen, place, partial(announce, options.ready))


def announce(descriptor: int) -> None:
    """One byte down the parent's pipe."""
    os.write(descriptor, b"1")
    os.close(descriptor)


def complain(message: str, exit_code: int) -> int:
    """One line on standard error."""
    print(f"pawl: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return exit_code
