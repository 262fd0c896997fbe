"""The background duties of one worker process: scoring, rollouts, adapters. Each runs and fails on its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import sqlalchemy as sa
import structlog
from prometheus_client import start_http_server

from ab_testing.canary import Decision
from ab_testing.canary_state import Status
from ab_testing.controller import Controller
from ab_testing.rollout_store import Rollout, list_rollouts
from feedback.store import count_pairs, mark_pairs_used
from monitoring.errors import ScorerUnavailable
from monitoring.harm import DEFAULT_PATTERNS, HarmLexicon
from monitoring.metrics import (
    BUILD_INFO,
    GATE_VERDICTS,
    PAIRS,
    REGISTRY,
    RETRAIN_LAST_SUCCESS,
    RETRAIN_RUNS,
    ROLLBACKS,
    ROLLOUT_STATE,
)
from monitoring.scoring import ScoringDuty
from monitoring.toxicity import load_scorer
from pawl import leases
from pawl.clock import now
from pawl.database import Database
from pawl.errors import ConfigurationError, PawlError
from pawl.settings import ScoringSettings, Settings
from retrain import registry
from retrain.publish import Engine, reconcile
from retrain.registry import ModelState, RunStatus

log = structlog.get_logger()

RECONCILE_S = 10.0
SCORER_RETRY_S = 60.0
METRICS_S = 5.0


class Worker:
    """Runs the duties until told to stop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._is_stopping = threading.Event()
        self._controller = Controller(database, clock=now, on_end=self._rollout_ended)
        self._scoring: ScoringDuty | None = None
        self._runs_seen: Counter[str] = Counter()
        self._pairs_seen: Counter[str] = Counter()

    def run(self) -> None:
        """Block until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._is_stopping.set())
        BUILD_INFO.labels(version=version("pawl")).set(1)
        settings = self._settings.worker
        server, _ = start_http_server(settings.metrics_port, settings.host, REGISTRY)
        duties = [
            self._every(settings.poll_s, "scoring", self._score),
            self._every(self._settings.rollout.tick_s, "rollouts", self._tick_rollouts),
            self._every(RECONCILE_S, "adapters", self._reconcile),
            self._every(METRICS_S, "metrics", self._show_learning),
        ]
        log.info("worker_started", metrics_port=settings.metrics_port)
        for duty in duties:
            duty.start()
        self._is_stopping.wait()
        for duty in duties:
            duty.join(10)
        self._release_leases()
        server.shutdown()

    def _every(self, pause_s: float, name: str, duty: Callable[[], float | None]) -> threading.Thread:
        """A thread that does `duty`, then pauses as long as it says (or `pause_s`), for ever."""

        def loop() -> None:
            while not self._is_stopping.is_set():
                wait_s = pause_s
                try:
                    wait_s = pause_s if (said := duty()) is None else said
                except (PawlError, sa.exc.SQLAlchemyError, OSError) as exc:
                    log.warning("duty_failed", duty=name, reason=type(exc).__name__, detail=str(exc)[:200])
                except Exception:
                    log.exception("duty_broken", duty=name)
                self._is_stopping.wait(wait_s)

        return threading.Thread(target=loop, name=name, daemon=True)

    def _score(self) -> float | None:
        if self._scoring is None:
            try:
                self._scoring = make_scoring(self._settings.worker.scoring, self._database)
            except ScorerUnavailable as exc:
                log.error("scorer_absent", reason=str(exc))
                return SCORER_RETRY_S
        while self._scoring.run_once() and not self._is_stopping.is_set():
            pass
        return None

    def _tick_rollouts(self) -> None:
        for alias in self._settings.serving.models:
            lease = f"rollout/{alias}"
            ttl_s = max(self._settings.worker.lease_s, 3 * self._settings.rollout.tick_s)
            epoch = leases.acquire(self._database, lease, self._holder, ttl_s=ttl_s, now=now())
            if epoch is None:
                continue
            tick = self._controller.tick(alias, epoch=epoch)
            if tick is not None:
                show_rollout(tick.rollout)

    def _rollout_ended(self, rollout: Rollout, decision: Decision) -> None:
        end_rollout(self._database, rollout)
        if rollout.state.status == "rolled_back":
            ROLLBACKS.labels(metric=decision.metric or decision.cause).inc()

    def _reconcile(self) -> None:
        """Every engine has every adapter that may be asked for; vLLM forgets them when it restarts."""
        for alias, model in self._settings.serving.models.items():
            settle_ended(self._database, alias)
            wanted = wanted_adapters(self._database, alias)
            if not wanted:
                continue
            engines = [Engine(url) for url in model.engines]
            try:
                done = reconcile(engines, wanted)
            finally:
                for engine in engines:
                    engine.close()
            for url, name in done.loaded:
                log.info("adapter_reloaded", engine=url, name=name)
            for failure in done.failures:
                log.warning("adapter_missing", engine=failure.engine, name=failure.name, reason=failure.reason)

    def _show_learning(self) -> None:
        """Runs and pairs happen in short-lived jobs; this process shows them."""
        runs = [run for alias in self._settings.serving.models for run in registry.list_runs(self._database, alias)]
        counts = Counter(run.status.value for run in runs if run.status.is_final)
        for status, n in (counts - self._runs_seen).items():
            RETRAIN_RUNS.labels(outcome=status).inc(n)
            if status in VERDICTS:
                GATE_VERDICTS.labels(verdict=VERDICTS[status]).inc(n)
        self._runs_seen = counts
        RETRAIN_LAST_SUCCESS.set(max((run.updated_at for run in runs if run.status == RunStatus.PASSED), default=0.0))
        pairs = count_pairs(self._database)
        for source, n in (pairs - self._pairs_seen).items():
            PAIRS.labels(source=source).inc(n)
        self._pairs_seen |= pairs

    def _release_leases(self) -> None:
        try:
            for alias in self._settings.serving.models:
                leases.release(self._database, f"rollout/{alias}", self._holder)
        except sa.exc.SQLAlchemyError as exc:
            log.warning("leases_kept", reason=type(exc).__name__)


VERDICTS = {"passed": "pass", "failed": "fail", "cannot_tell": "cannot_tell"}


def make_scoring(settings: ScoringSettings, database: Database) -> ScoringDuty:
    """The scoring duty with its real scorer.

    Raises:
        ScorerUnavailable: the toxicity model cannot be loaded or fails its self-test.
        ConfigurationError: the harmful patterns cannot be read.
    """
    scorer = load_scorer(settings.toxicity_checkpoint, settings.toxicity_config_dir, settings.toxicity_model)
    name = settings.toxicity_checkpoint.parent.name if settings.toxicity_checkpoint else settings.toxicity_model
    return ScoringDuty(
        database,
        scorer.score,
        load_lexicon(settings.harmful_patterns),
        threshold=settings.toxicity_threshold,
        batch_size=settings.batch_size,
        scorer_name=f"detoxify-{name}"[:100],
        clock=now,
    )


def load_lexicon(path: Path | None) -> HarmLexicon:
    """The configured patterns, else the built-in ones.

    Raises:
        ConfigurationError: the file is not a JSON list of patterns.
    """
    if path is None:
        return HarmLexicon.from_patterns(DEFAULT_PATTERNS)
    try:
        return HarmLexicon.from_patterns(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigurationError(f"worker.scoring.harmful_patterns {path}: {exc}") from exc


def wanted_adapters(database: Database, alias: str) -> dict[str, Path]:
    """Adapters that may be asked for: the champion, the challenger, and the last champion, kept for a way back."""
    models = registry.list_models(database, alias)
    serving = [model for model in models if model.state in (ModelState.CHAMPION, ModelState.CHALLENGER)]
    retired = [model for model in models if model.state == ModelState.RETIRED]
    last = sorted(retired, key=lambda model: model.updated_at)[-1:]
    return {model.name: Path(model.path) for model in (*serving, *last) if model.path}


def end_rollout(database: Database, rollout: Rollout) -> None:
    """A rollout is over: the registry and the pairs that taught the champion follow."""
    is_promoted = rollout.state.status == "promoted"
    state = ModelState.CHAMPION if is_promoted else ModelState.RETIRED
    registry.set_state(database, rollout.candidate, state, now=now())
    model = registry.get_model(database, rollout.candidate)
    if is_promoted and model.run_id:
        run = registry.get_run(database, model.run_id)
        mark_pairs_used(database, run.detail.get("new_pair_ids", []), model.run_id)


def settle_ended(database: Database, alias: str) -> None:
    """Finish what a worker that died between a rollout's end and the registry left undone."""
    for rollout in list_rollouts(database, alias)[:1]:
        is_open = registry.get_model(database, rollout.candidate).state == ModelState.CHALLENGER
        if rollout.state.is_final and is_open:
            end_rollout(database, rollout)


def show_rollout(rollout: Rollout) -> None:
    """The rollout's state as a metric."""
    for status in get_args(Status):
        ROLLOUT_STATE.labels(model=rollout.alias, state=status).set(rollout.state.status == status)
