"""Where a command has the history judged: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from pawl.cores import usable_cores
from pawl.settings import Settings

if TYPE_CHECKING:
    from feedback.part_work import Workplace


class Place(StrEnum):
    """As in `feedback.mining.on`."""

    PROCESSES = "processes"
    RAY = "ray"


OnOption = Annotated[
    Place | None,
    typer.Option("--on", help="Where to mine: `feedback.mining.on` unless given. Ray is found by RAY_ADDRESS."),
]


@contextmanager
def mining_place(settings: Settings, on: Place | None = None) -> Iterator[Workplace]:
    """Where parts of the history are worked on, one step after the other.

    Raises:
        ConfigurationError: Ray is asked for and not installed.
    """
    n = settings.feedback.mining.processes
    if (on or settings.feedback.mining.on) == Place.RAY:
        from feedback.on_ray import LOCAL, OnRay

        yield OnRay(settings.database, os.environ.get("RAY_ADDRESS") or LOCAL, n)
        return
    from feedback.part_workers import Processes, few_collections, keep_freed_memory

    keep_freed_memory()
    with few_collections(), Processes(settings.database, n or usable_cores()) as place:
        yield place
