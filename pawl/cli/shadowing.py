"""The worker's duty to ask candidates in the dark, under a lease for each alias, and to have what they say scored."""

from __future__ import annotations

from ab_testing.shadow_duty import ShadowDuty
from ab_testing.shadow_store import running_shadow, save_answer_scores, unscored_answers
from monitoring.metrics import SHADOW_ANSWERS
from monitoring.scoring import ScoringDuty
from pawl import leases
from pawl.clock import now
from pawl.database import Database
from pawl.settings import Settings

LEASE_REST_S = 30.0
"""A lease must outlast what one look may take, or two workers would ask the same."""


class ShadowKeeper:
    """Of several workers one at a time asks an alias's candidate."""

    def __init__(self, settings: Settings, database: Database, holder: str) -> None:
        self._settings = settings
        self._database = database
        self._holder = holder
        self._duty = ShadowDuty(settings, clock=now, count=_count)

    def look(self, alias: str) -> bool:
        """Do what there is to do for an alias, if this worker has its lease; True if there may be more at once."""
        if running_shadow(self._database, alias) is None:
            return False
        ttl_s = max(self._settings.worker.lease_s, self._settings.rollout.shadow.timeout_s + LEASE_REST_S)
        lease = _lease(alias)
        epoch = leases.acquire(self._database, lease, self._holder, ttl_s=ttl_s, now=now())
        if epoch is None:
            return False
        return self._duty.look(leases.FencedDatabase(self._database, lease, epoch), alias)

    def score(self, scoring: ScoringDuty) -> int:
        """Score one batch of what candidates said; how many answers it was."""
        batch = unscored_answers(self._database, self._settings.worker.scoring.batch_size)
        if batch:
            found = scoring.scores_of([one.interaction for one in batch])
            save_answer_scores(self._database, [one.run_id for one in batch], found)
        return len(batch)

    def release(self) -> None:
        """Let another worker take over at once."""
        for alias in self._settings.serving.models:
            leases.release(self._database, _lease(alias), self._holder)


def _lease(alias: str) -> str:
    return f"shadow/{alias}"


def _count(alias: str, outcome: str) -> None:
    SHADOW_ANSWERS.labels(model=alias, outcome=outcome).inc()
