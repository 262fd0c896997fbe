"""The worker's duty to tell others of decisions, under a lease, so that each is told by one worker."""

from __future__ import annotations

import os
import random

from monitoring.metrics import WEBHOOK_DELIVERIES
from pawl import leases
from pawl.clock import now
from pawl.database import Database
from pawl.settings import Settings
from pawl.webhooks import PATIENCE_S, WebhookDuty, endpoints_of

LEASE = "webhooks"
LEASE_REST_S = 30.0


class WebhookKeeper:
    """Of several workers one at a time sends.

    Raises:
        ConfigurationError: the secret of an endpoint cannot be read.
    """

    def __init__(self, settings: Settings, database: Database, holder: str) -> None:
        endpoints = endpoints_of(settings.webhooks, os.environ)
        slowest_s = max((endpoint.timeout_s for endpoint in endpoints), default=0.0)
        self._ttl_s = max(settings.worker.lease_s, PATIENCE_S + slowest_s + LEASE_REST_S)
        self._database = database
        self._holder = holder
        self._duty = WebhookDuty(database, endpoints, clock=now, draw=random.random)

    def look(self) -> None:
        """Send what is due, if this worker has the lease."""
        if not self._duty.has_work():
            return
        if leases.acquire(self._database, LEASE, self._holder, ttl_s=self._ttl_s, now=now()) is None:
            return
        for outcome, n in self._duty.look().items():
            WEBHOOK_DELIVERIES.labels(outcome=outcome).inc(n)

    def release(self) -> None:
        """Let another worker take over at once."""
        leases.release(self._database, LEASE, self._holder)
