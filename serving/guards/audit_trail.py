"""Lines of the audit trail from the event loop: queued here, written on a thread, and never waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import sqlalchemy as sa
import structlog

from pawl.audit import AuditEvent, save_events
from pawl.database import Database

log = structlog.get_logger()

MAX_WAITING = 2000
"""Findings are counted in the metrics too, so one that does not fit here is not wholly lost."""
BATCH = 200
RETRY_S = 2.0


class AuditTrail:
    """Writes in batches; with the database away a bounded number of lines waits, and the rest is dropped, aloud."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: queue.Queue[AuditEvent] = queue.Queue(MAX_WAITING)
        self._is_stopping = threading.Event()
        self._has_news = threading.Event()
        self._n_dropped = 0
        self._thread = threading.Thread(target=self._run, name="guard-audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, event: AuditEvent) -> None:
        """Queue a line; costs microseconds."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._n_dropped += 1
        self._has_news.set()

    def stop(self, timeout_s: float) -> None:
        """Write what waits, if the database takes it in time."""
        self._is_stopping.set()
        self._has_news.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        batch: list[AuditEvent] = []
        while True:
            batch = batch or self._take()
            if batch and not self._save(batch):
                if self._is_stopping.wait(RETRY_S):
                    return
                continue
            if not batch and self._is_stopping.is_set():
                return
            if not batch:
                self._has_news.wait()
                self._has_news.clear()
            batch = []

    def _take(self) -> list[AuditEvent]:
        taken: list[AuditEvent] = []
        while len(taken) < BATCH:
            try:
                taken.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return taken

    def _save(self, batch: Sequence[AuditEvent]) -> bool:
        try:
            save_events(self._database, batch)
        except sa.exc.SQLAlchemyError as exc:
            log.warning("audit_paused", reason=type(exc).__name__)
            return False
        if self._n_dropped:
            log.warning("audit_dropped", lines=self._n_dropped)
            self._n_dropped = 0
        return True
