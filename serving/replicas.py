"""Which replica of the engine answers: the conversation's own while it is healthy, so that its prefix stays cached."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from monitoring.metrics import ENGINE_EJECTED

FAILURES_TO_EJECT = 3
EJECTION_S = 5.0


@dataclass
class Replica:
    """One engine and how it has been answering."""

    url: str
    n_failures: int = 0
    ejected_until: float = 0.0

    def is_ejected(self, now_s: float) -> bool:
        return now_s < self.ejected_until


class ReplicaSet:
    """The replicas of one alias. Failures in a row eject one for a while; the next success clears it."""

    def __init__(self, alias: str, urls: Sequence[str]) -> None:
        self.alias = alias
        self._replicas = [Replica(url) for url in urls]
        for url in urls:
            ENGINE_EJECTED.labels(model=alias, replica=url).set(0)

    def in_order(self, affinity: str) -> list[Replica]:
        """Every replica, best first: by rendezvous hash of the conversation, the ejected ones last."""
        now_s = time.monotonic()
        if len(self._replicas) == 1:
            return list(self._replicas)
        return sorted(self._replicas, key=lambda replica: (replica.is_ejected(now_s), _draw(affinity, replica.url)))

    def note_success(self, replica: Replica) -> None:
        if replica.n_failures:
            replica.n_failures, replica.ejected_until = 0, 0.0
            ENGINE_EJECTED.labels(model=self.alias, replica=replica.url).set(0)

    def note_failure(self, replica: Replica) -> None:
        replica.n_failures += 1
        if replica.n_failures >= FAILURES_TO_EJECT:
            replica.ejected_until = time.monotonic() + EJECTION_S
            ENGINE_EJECTED.labels(model=self.alias, replica=replica.url).set(1)


def _draw(affinity: str, url: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\x1f{url}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
