"""The background duties of one worker process: scoring, rollouts, adapters. Each runs and fails on its own."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import get_args

import sqlalchemy as sa
import structlog
from prometheus_client import Counter as Series

from ab_testing.canary_state import Status
from ab_testing.rollout_orders import controller_of
from ab_testing.rollout_store import Rollout, count_rollbacks, newest_rollout
from feedback.erasure_run import LEASE
from feedback.retention import Limits, prune
from feedback.store import count_pairs
from feedback.tombstone_store import FILE as TOMBSTONES
from feedback.tombstone_store import TombstoneBook, has_any, has_open
from monitoring.errors import ScorerUnavailable
from monitoring.metrics import (
    BUILD_INFO,
    GATE_VERDICTS,
    PAIRS,
    PAIRS_REJECTED,
    RETRAIN_LAST_SUCCESS,
    RETRAIN_RUNS,
    RETRAIN_SKIPS,
    ROLLBACKS,
    ROLLOUT_BLIND,
    ROLLOUT_STATE,
)
from monitoring.score_api import Score, ScoreServer, SharedScorer
from monitoring.scoring import ScoringDuty
from monitoring.toxicity import limit_threads, load_scorer
from pawl import leases, registry
from pawl.cli.adapter_keeper import KEEP_S, AdapterKeeper
from pawl.cli.erasing import eraser_of
from pawl.cli.lexicon import load_lexicon
from pawl.cli.notifying import WebhookKeeper
from pawl.cli.scheduled_rounds import ScheduledRounds
from pawl.cli.shadowing import ShadowKeeper
from pawl.clock import now
from pawl.database import AWAY, Database
from pawl.errors import ConfigurationError, PawlError
from pawl.registry import RunStatus
from pawl.round_checks import count_skips
from pawl.secrets import signing_secret
from pawl.settings import ScoringSettings, Settings

log = structlog.get_logger()

SCORER_RETRY_S = 60.0
METRICS_S = 5.0
SCHEDULE_S = 15.0
SHADOW_S = 1.0
WEBHOOKS_S = 2.0
ERASURES_S = 30.0
ERASURE_LEASE_S = 60.0


class Worker:
    """Runs the duties until told to stop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._holder = leases.this_process()
        self._is_stopping = threading.Event()
        self._adapters = AdapterKeeper(settings, database, self._holder, now)
        self._scorer: SharedScorer | None = None
        self._scoring: ScoringDuty | None = None
        self._rounds = ScheduledRounds(settings.retrain, database, now)
        self._shadows = ShadowKeeper(settings, database, self._holder)
        self._webhooks = WebhookKeeper(settings, database, self._holder)
        self._runs_seen: Counter[str] = Counter()
        self._skips_seen: Counter[str] = Counter()
        self._pairs_seen: Counter[str] = Counter()
        self._rejected_seen: Counter[str] = Counter()
        self._rollbacks_seen: Counter[str] = Counter()

    def run(self) -> None:
        """Block until SIGTERM or SIGINT.

        Raises:
            ConfigurationError: the port of the metrics is taken, or may not be used.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._is_stopping.set())
        BUILD_INFO.labels(version=version("pawl")).set(1)
        settings = self._settings.worker
        try:
            server = ScoreServer(settings.host, settings.metrics_port, self._find_scorer)
        except OSError as exc:
            raise ConfigurationError(f"worker.metrics_port {settings.metrics_port}: {exc.strerror or exc}") from exc
        server.start()
        duties = [
            self._every(settings.poll_s, "scoring", self.score),
            self._every(self._settings.rollout.tick_s, "rollouts", self.tick_rollouts),
            self._every(KEEP_S, "adapters", self.reload_adapters),
            self._every(SHADOW_S, "shadow", self.mirror),
            self._every(WEBHOOKS_S, "webhooks", self._webhooks.look),
            self._every(METRICS_S, "metrics", self.show_learning),
            self._every(SCHEDULE_S, "schedule", self.start_rounds),
            self._every(ERASURES_S, "erasures", self.finish_erasures),
            self._every(self._settings.retention.every_s, "retention", self.prune),
        ]
        log.info("worker_started", metrics_port=settings.metrics_port)
        for duty in duties:
            duty.start()
        self._is_stopping.wait()
        self._rounds.stop()
        for duty in duties:
            duty.join(10)
        self._release_leases()
        server.shutdown()

    def _every(self, pause_s: float, name: str, duty: Callable[[], float | None]) -> threading.Thread:
        """A thread that does `duty`, then pauses as long as it says (or `pause_s`), for ever."""

        def loop() -> None:
            while not self._is_stopping.is_set():
                wait_s = pause_s
                with surviving(name):
                    wait_s = pause_s if (said := duty()) is None else said
                self._is_stopping.wait(wait_s)

        return threading.Thread(target=loop, name=name, daemon=True)

    def _find_scorer(self) -> Score | None:
        return self._scorer.score_now if self._scorer is not None else None

    def score(self) -> float | None:
        """Score all that waits; the pause to make when there is nobody to score."""
        if self._scoring is None:
            try:
                self._scorer = load_shared_scorer(self._settings.worker.scoring)
                self._scoring = make_scoring(self._settings.worker.scoring, self._database, self._scorer)
            except ScorerUnavailable as exc:
                log.error("scorer_absent", reason=str(exc))
                return SCORER_RETRY_S
        while not self._is_stopping.is_set():
            if not self._scoring.run_once() and not self._shadows.score(self._scoring):
                break
        return None

    def tick_rollouts(self) -> None:
        """Look at every rollout whose lease this worker has or gets."""
        ttl_s = max(self._settings.worker.lease_s, 3 * self._settings.rollout.tick_s)
        for alias in self._settings.serving.models:
            with surviving("rollouts", alias=alias), saying_blind(alias):
                epoch = leases.acquire(self._database, f"rollout/{alias}", self._holder, ttl_s=ttl_s, now=now())
                if epoch is not None:
                    fenced = leases.FencedDatabase(self._database, f"rollout/{alias}", epoch)
                    controller_of(fenced, now).tick(alias, epoch=epoch)

    def mirror(self) -> float | None:
        """Ask the candidates of shadow runs what the champions have answered; at once again while there is more."""
        is_more = False
        for alias in self._settings.serving.models:
            with surviving("shadow", alias=alias):
                is_more |= self._shadows.look(alias)
        return 0.0 if is_more else None

    def reload_adapters(self) -> None:
        """Every engine has every adapter that may be asked for; vLLM forgets them when it restarts."""
        if not self._adapters.has_duty():
            return
        desired = {}
        for alias in self._settings.serving.models:
            with surviving("adapters", alias=alias):
                self._adapters.settle(alias)
                desired[alias] = self._adapters.desired(alias)
        self._adapters.keep(desired)

    def start_rounds(self) -> None:
        """Retraining by the clock, where `retrain.schedule` is set."""
        if self._settings.retrain.schedule is None:
            return
        for alias in retrained(self._settings):
            with surviving("schedule", alias=alias):
                self._rounds.look(alias)

    def finish_erasures(self) -> None:
        """Erasures whose process was killed, and those that a restored backup has undone."""
        path = self._settings.state_dir / TOMBSTONES
        if not path.exists() and not has_any(self._database):
            return
        secret = signing_secret(self._settings.auth, self._settings.state_dir)
        TombstoneBook(self._database, path, secret, clock=now).copy_both_ways()
        eraser = eraser_of(self._settings, self._database, actor="worker")
        ttl_s = ERASURE_LEASE_S
        if has_open(self._database) and leases.acquire(self._database, LEASE, self._holder, ttl_s=ttl_s, now=now()):
            with leases.held(self._database, LEASE, self._holder, ttl_s=ttl_s, clock=now):
                eraser.finish_open()
        eraser.mark_late_models()

    def prune(self) -> float | None:
        """Delete what has been kept for as long as the settings say; comes back sooner while there is more."""
        wanted = self._settings.retention
        limits = Limits(wanted.interactions_days, wanted.pairs_days, wanted.dead_letters_days)
        ttl_s = max(self._settings.worker.lease_s, 3 * wanted.every_s)
        if not any(limits) or not leases.acquire(self._database, "retention", self._holder, ttl_s=ttl_s, now=now()):
            return None
        pruned = prune(self._database, limits, now(), batch_rows=wanted.batch_rows, max_batches=wanted.batches)
        if pruned.counts:
            log.info("records_pruned", **pruned.counts)
        return wanted.every_s / 10 if pruned.is_more else None

    def show_learning(self) -> None:
        """Runs, pairs and orders of people happen in short-lived processes; this one shows them."""
        runs = [run for alias in self._settings.serving.models for run in registry.list_runs(self._database, alias)]
        counts = Counter(run.status.value for run in runs if run.status.is_final)
        for status, n in (counts - self._runs_seen).items():
            RETRAIN_RUNS.labels(outcome=status).inc(n)
            if status in VERDICTS:
                GATE_VERDICTS.labels(verdict=VERDICTS[status]).inc(n)
        self._runs_seen = counts
        RETRAIN_LAST_SUCCESS.set(max((run.updated_at for run in runs if run.status == RunStatus.PASSED), default=0.0))
        grow(RETRAIN_SKIPS, self._skips_seen, count_skips(self._database))
        grow(PAIRS, self._pairs_seen, count_pairs(self._database))
        grow(PAIRS_REJECTED, self._rejected_seen, rejected_pairs(runs))
        grow(ROLLBACKS, self._rollbacks_seen, count_rollbacks(self._database))
        self._show_rollouts()

    def _show_rollouts(self) -> None:
        for alias in self._settings.serving.models:
            with surviving("metrics", alias=alias):
                if (rollout := newest_rollout(self._database, alias)) is not None:
                    show_rollout(rollout)

    def _release_leases(self) -> None:
        try:
            for alias in self._settings.serving.models:
                leases.release(self._database, f"rollout/{alias}", self._holder)
            leases.release(self._database, "retention", self._holder)
            self._shadows.release()
            self._webhooks.release()
            self._adapters.release()
        except sa.exc.SQLAlchemyError as exc:
            log.warning("leases_kept", reason=type(exc).__name__)


def retrained(settings: Settings) -> list[str]:
    """The aliases that the schedule is for: the one that is named, else all."""
    return [settings.retrain.alias] if settings.retrain.alias else list(settings.serving.models)


VERDICTS = {"passed": "pass", "failed": "fail", "cannot_tell": "cannot_tell"}


@contextmanager
def saying_blind(alias: str) -> Iterator[None]:
    """Tell whether the database answers a look at the rollouts: if not, nothing is decided and no weight moves."""
    try:
        yield
    except AWAY:
        ROLLOUT_BLIND.labels(model=alias).set(1)
        log.warning("rollout_weights_hold", alias=alias, reason="the database does not answer")
        raise
    ROLLOUT_BLIND.labels(model=alias).set(0)


@contextmanager
def surviving(duty: str, **fields: str) -> Iterator[None]:
    """Log what goes wrong in a block and go on after it."""
    try:
        yield
    except (PawlError, sa.exc.SQLAlchemyError, OSError) as exc:
        log.warning("duty_failed", duty=duty, reason=type(exc).__name__, detail=str(exc)[:200], **fields)
    except Exception:
        log.exception("duty_broken", duty=duty, **fields)


def load_shared_scorer(settings: ScoringSettings) -> SharedScorer:
    """The real scorer, for the scoring duty and for gateways that ask.

    Raises:
        ScorerUnavailable: the toxicity model cannot be loaded or fails its self-test.
    """
    limit_threads(settings.threads)
    scorer = load_scorer(settings.toxicity_checkpoint, settings.toxicity_config_dir, settings.toxicity_model)
    return SharedScorer(scorer.score)


def make_scoring(settings: ScoringSettings, database: Database, scorer: SharedScorer) -> ScoringDuty:
    """The scoring duty.

    Raises:
        ConfigurationError: the harmful patterns cannot be read.
    """
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


def grow(series: Series, seen: Counter[str], totals: Counter[str]) -> None:
    """Raise a series with one label to the totals, as far as they are over what was seen before."""
    for label, n in (totals - seen).items():
        series.labels(label).inc(n)
    seen |= totals


def rejected_pairs(runs: Iterable[registry.Run]) -> Counter[str]:
    """What gave no pair, by reason, in the mining of each alias's newest run."""
    newest = {run.alias: run for run in sorted(runs, key=lambda run: run.created_at) if "skipped" in run.detail}
    return sum((Counter(run.detail["skipped"]) for run in newest.values()), Counter())


def show_rollout(rollout: Rollout) -> None:
    """The rollout's state as a metric."""
    for status in get_args(Status):
        ROLLOUT_STATE.labels(model=rollout.alias, state=status).set(rollout.state.status == status)
