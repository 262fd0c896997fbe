"""One training in several processes, data parallel: each takes its share of every optimiser step's examples.

`retrain.training.batch_size` times `gradient_accumulation_steps` stays the number of examples in a step, whatever the
number of processes, so the same settings train the same adapter. The examples go to the processes through pipes; no
file holds them.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from feedback.pairs import UnpairedExample
from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import DistributedSettings
from retrain import dpo
from retrain.dataset import TrainingExample
from retrain.dpo import DPORun, TrainingResult
from retrain.errors import ProcessLost
from retrain.progress import LoggedStep, Report, ignore
from retrain.ranks import Group, Message, run_ranks
from retrain.termination import sigterm_noted

WORKER = (sys.executable, "-m", "retrain.train_worker")
LOOK_FOR_LEADER_EVERY_S = 2.0


@dataclass(frozen=True)
class Job:
    """What the processes do."""

    run: DPORun
    examples: tuple[TrainingExample, ...]
    unpaired: tuple[UnpairedExample, ...]
    resume: bool


JOB = TypeAdapter(Job)
RESULT = TypeAdapter(TrainingResult)


def train(
    run: DPORun,
    examples: Sequence[TrainingExample],
    report: Report = ignore,
    *,
    settings: DistributedSettings,
    unpaired: Sequence[UnpairedExample] = (),
    resume: bool = True,
) -> TrainingResult:
    """As `dpo.train`, in as many processes as the settings say; in this one if that is one.

    Raises:
        ConfigurationError: the examples of a step cannot be shared out.
        TrainingFailed, TrainingInterrupted: as from `dpo.train`; the text names the rank.
        ProcessLost: a process was killed, or lost touch with the others.
    """
    group = group_of(settings)
    if group.size == 1:
        return dpo.train(run, examples, report, unpaired=unpaired, resume=resume)
    job = Job(shared_out(run, group.size), tuple(examples), tuple(unpaired), resume)
    logs = run.output_dir / "ranks"
    results: list[TrainingResult] = []

    def on_message(message: Message) -> None:
        if "result" in message:
            results.append(RESULT.validate_python(message["result"]))
        elif "step" in message:
            report(LoggedStep(message["step"], message["n_steps"], message["values"]))

    with sigterm_noted() as termination:
        order = order_of(job)
        run_ranks(_command(settings), group, logs, on_message, order=order, termination=termination)
    if not results:
        raise ProcessLost(f"the training processes ended without a result; see {logs}")
    shutil.rmtree(logs)
    return results[0]


def order_of(job: Job) -> bytes:
    """One line of JSON, by the standard library: pydantic's writer and reader refuse half a surrogate in a text."""
    return json.dumps(JOB.dump_python(job, mode="json")).encode()


def job_of(order: bytes) -> Job:
    """What `order_of` wrote."""
    return JOB.validate_python(json.loads(order))


def join(settings: DistributedSettings, logs: Path) -> None:
    """Train with the first node's processes once it trains, on a node that is not the first.

    Raises:
        Unreachable: the first node did not begin to train in time.
        TrainingFailed, TrainingInterrupted, ProcessLost: as from `train`.
    """
    group = group_of(settings)
    with sigterm_noted() as termination:
        _wait_for(group, settings.join_hours * 3600)
        run_ranks(_command(settings), group, logs, lambda _: None, termination=termination)


def group_of(settings: DistributedSettings) -> Group:
    """The processes that train; without a number, one per GPU.

    Raises:
        ConfigurationError: the model is to be sharded, and there are no GPUs.
    """
    if settings.sharding == "fsdp" and not torch.cuda.is_available():
        raise ConfigurationError("retrain.distributed.sharding is fsdp, which takes GPUs; set it to none")
    processes = settings.processes or max(1, torch.cuda.device_count())
    port = settings.port if settings.nodes > 1 else _free_port()
    return Group(processes, settings.nodes, settings.node_rank, settings.leader, port)


def shared_out(run: DPORun, n_processes: int) -> DPORun:
    """The same run for one of several processes: together they take as many examples a step as one would alone.

    Raises:
        ConfigurationError: the batches of a step are not a multiple of the processes.
    """
    batches = run.training.gradient_accumulation_steps
    if batches % n_processes:
        raise ConfigurationError(
            f"retrain.training.gradient_accumulation_steps is {batches}, which {n_processes} processes cannot share;"
            " make it a multiple of them, and batch_size smaller by as much"
        )
    return replace(
        run, training=run.training.model_copy(update={"gradient_accumulation_steps": batches // n_processes})
    )


def _command(settings: DistributedSettings) -> list[str]:
    return [*WORKER, json.dumps({"timeout_s": settings.timeout_s, "sharding": settings.sharding})]


def _wait_for(group: Group, seconds: float) -> None:
    """Rank 0 listens only while it trains, and what comes before that on its node may take hours."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((group.address, group.port), timeout=5).close()
            return
        except OSError as exc:
            if time.monotonic() > until:
                raise Unreachable(f"{group.address}:{group.port} did not begin to train: {exc}") from exc
            time.sleep(LOOK_FOR_LEADER_EVERY_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
