"""Rounds in processes of their own, which are killed, stopped, and race one another.

The processes are forked from a server that has loaded torch, so that each is there at once; they are real ones all the
same, with their own ids, connections and leases.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa

from feedback.pairs import PreferencePair
from pawl import clock, leases, registry
from pawl.database import Database, open_database
from pawl.errors import NegativeVerdict, PawlError, StaleWrite
from pawl.registry import Run
from pawl.schema import models, rollouts, routes, runs
from pawl.settings import (
    DatabaseSettings,
    EngineSettings,
    GateSettings,
    MixSettings,
    ModelSettings,
    RetrainSettings,
    RolloutSettings,
    ServingSettings,
    Settings,
)
from tests.retrain.tiny_model import TRAINING, make_pair

ALIAS = "assistant"
LEASE = f"retrain/{ALIAS}"
POLL_S = 0.1
PATIENCE_S = 240.0
STALE_EXIT = 7
"""How a process ends that finds its lease taken."""
RENEWING = threading.Lock()
"""Of whoever renews the lease, and of a process that is about to stop."""
REFUSAL = "I'm sorry, but I can't help with that."


@dataclass(frozen=True)
class Scene:
    """What a round is about; the same scene in another directory makes the same weights."""

    directory: Path
    database: str
    base: Path
    engine: str
    ttl_s: float = 30.0
    n_pairs: int = 45
    """New pairs."""
    stop_at: str | None = None
    """A moment at which the process stops itself, as if it were frozen (see `Moments`)."""
    kill_at: str | None = None
    """A moment at which it kills itself."""


def well_behaved(_model: str, prompt: str) -> str:
    """What engines of these rounds answer."""
    return REFUSAL if prompt.startswith("harm") else "a good kind answer"


def settings_of(scene: Scene) -> Settings:
    """A gate that the tiny model passes, and little to do."""
    for kind in ("harmful", "benign"):
        path = scene.directory / f"{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([f"{kind[:4]} request {n}" for n in range(60)]))
    loose = GateSettings(
        preference_margin=0.5,
        source_margin=1.0,
        harmful_refusal_margin=0.1,
        over_refusal_margin=0.1,
        toxicity_margin=0.1,
        echo_margin=0.1,
        stop_margin=0.1,
        length_ratio=(0.5, 2.0),
    )
    return Settings(
        serving=ServingSettings(models={ALIAS: ModelSettings(engines=[scene.engine], champion="tiny")}),
        engine=EngineSettings(model=str(scene.base)),
        rollout=RolloutSettings(),
        retrain=RetrainSettings(
            adapters_dir=scene.directory / "adapters",
            runs_dir=scene.directory / "runs",
            min_pairs=20,
            holdout_share=0.3,
            mix=MixSettings(new=1.0, original=0.0, earlier=0.0),
            harmful_probes=scene.directory / "harmful.json",
            benign_probes=scene.directory / "benign.json",
            training=TRAINING.model_copy(update={"batch_size": 2, "epochs": 2.0, "checkpoint_steps": 4}),
            gate=loose,
        ),
    )


def pairs_of(scene: Scene) -> list[PreferencePair]:
    return [make_pair(number) for number in range(scene.n_pairs)]


def harmless(texts: Sequence[str]) -> list[float]:
    return [0.0 for _ in texts]


def take_part(scene: Scene) -> None:
    """The process: get the lease, run the round, and leave as the command would."""
    os.environ["OMP_NUM_THREADS"] = "1"
    database = open_database(DatabaseSettings(url=scene.database))
    renew = leases.renew

    def renew_undisturbed(*given: Any, **named: Any) -> bool:
        with RENEWING:
            return renew(*given, **named)

    try:
        with patch.object(leases, "renew", renew_undisturbed), _held(database, scene) as epoch:
            _run(leases.FencedDatabase(database, LEASE, epoch), scene, epoch)
    except StaleWrite:
        raise SystemExit(STALE_EXIT) from None
    except PawlError as exc:
        raise SystemExit(f"{type(exc).__name__}: {exc}") from exc
    finally:
        database.close()


@contextmanager
def _held(database: Database, scene: Scene) -> Iterator[int]:
    """The lease, as soon as it is free."""
    until = time.monotonic() + PATIENCE_S
    with ExitStack() as stack:
        while True:
            try:
                block = leases.held(database, LEASE, leases.this_process(), ttl_s=scene.ttl_s, clock=clock.now)
                epoch = stack.enter_context(block)
                break
            except NegativeVerdict:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
        yield epoch


def _run(database: leases.FencedDatabase, scene: Scene, epoch: int) -> None:
    from pawl.cli.learning import canary_opener
    from retrain.pipeline import RoundInputs, run_round

    moments = Moments(scene)
    settings = settings_of(scene)
    inputs = RoundInputs(
        new=pairs_of(scene),
        score_toxicity=lambda texts: moments.before("scores", harmless)(texts),
        open_canary=moments.after("canary", canary_opener(database, settings, ALIAS)),
        report=lambda logged: moments.reach(f"step {logged.step}"),
        epoch=epoch,
    )
    with moments.watching():
        run_round(database, settings, ALIAS, inputs)


class Moments:
    """Where a process stops or kills itself."""

    def __init__(self, scene: Scene) -> None:
        self._signals = {scene.stop_at: signal.SIGSTOP, scene.kill_at: signal.SIGKILL}

    def reach(self, moment: str) -> None:
        """This is the moment; a stopped process goes on from here when it is woken."""
        if (sent := self._signals.pop(moment, None)) is not None:
            with RENEWING:  # Frozen in the midst of a write it would keep the database's lock.
                os.kill(os.getpid(), sent)

    def before(self, moment: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            self.reach(moment)
            return call(*given, **named)

        return wrapped

    def after(self, moment: str, call: Callable[..., Any] | None) -> Callable[..., Any]:
        assert call is not None

        def wrapped(*given: Any, **named: Any) -> Any:
            found = call(*given, **named)
            self.reach(moment)
            return found

        return wrapped

    def watching(self) -> Any:
        """Moments inside the round's own code: around the end of each step, and the registration."""
        from retrain import steps

        finish = steps.finish

        def watched(part: Path, directory: Path, found: Any) -> None:
            self.reach(f"before {directory.name} counts")
            finish(part, directory, found)
            self.reach(f"{directory.name} counts")

        return patch.object(steps, "finish", watched)


def servers() -> ForkServerContext:
    """Starts such processes quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.retrain.round_process", "retrain.pipeline", "pawl.cli.learning"])
    return context


def begin(scene: Scene) -> BaseProcess:
    """Start a process; it is not waited for."""
    process = servers().Process(target=take_part, args=(scene,), daemon=True)
    process.start()
    return process


def end(process: BaseProcess, timeout_s: float = PATIENCE_S) -> int | None:
    """Wait for a process; its exit code, or the number of the signal it died of, negative."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the round takes too long")
    return process.exitcode


def is_stopped(process: BaseProcess) -> bool:
    """Whether it is frozen."""
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


@dataclass(frozen=True)
class Published:
    """What can be seen from outside of what a round did."""

    models: tuple[tuple[str, str, str], ...]
    """Name, state and sha256 of the weights, of each registered model."""
    rollouts: tuple[str, ...]
    """Their candidates."""
    routes: tuple[tuple[str, int], ...]
    runs: tuple[tuple[str, str], ...]


def published(database: Database) -> Published:
    with database.read() as connection:
        found = [
            tuple(tuple(row) for row in connection.execute(query))
            for query in (
                sa.select(models.c.name, models.c.state, models.c.sha256).order_by(models.c.name),
                sa.select(rollouts.c.candidate).order_by(rollouts.c.id),
                sa.select(routes.c.alias, routes.c.version),
                sa.select(runs.c.id, runs.c.status).order_by(runs.c.id),
            )
        ]
    return Published(found[0], tuple(row[0] for row in found[1]), found[2], found[3])


def the_run(database: Database) -> Run | None:
    """The newest run, if there is one."""
    return next(iter(registry.list_runs(database, ALIAS)), None)


def elsewhere(scene: Scene, directory: Path, database: str) -> Scene:
    """The same scene, with nothing done yet."""
    return replace(scene, directory=directory, database=database)
