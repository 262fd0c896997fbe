"""Which replica of the engine answers: the conversation's own while it is healthy, so that its prefix stays cached.

A conversation is known by how it opens, whoever holds it: later turns repeat the opening word for word.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from monitoring.metrics import ENGINE_EJECTED
from serving.request_fields import CompletionRequest

FAILURES_TO_EJECT = 3
EJECTION_S = 5.0
PROMPT_CHARS = 256
"""Of a plain prompt, which grows at its end from turn to turn."""


@dataclass
class Replica:
    """One engine and how it has been answering."""

    url: str
    n_failures: int = 0
    ejected_until: float = 0.0

    def is_ejected(self, now_s: float) -> bool:
        return now_s < self.ejected_until


class ReplicaSet:
    """The replicas of one alias. Failures in a row eject one for a while; the next success clears it.

    The only replica is never ejected: there is nobody to take its place.
    """

    def __init__(self, alias: str, urls: Sequence[str]) -> None:
        self.alias = alias
        self._replicas = [Replica(url) for url in urls]
        for replica in self._replicas:
            _expose(alias, replica)

    def in_order(self, affinity: str) -> list[Replica]:
        """Every replica, best first: by rendezvous hash of the conversation, the ejected ones last."""
        now_s = time.monotonic()
        if len(self._replicas) == 1:
            return list(self._replicas)
        return sorted(self._replicas, key=lambda replica: (replica.is_ejected(now_s), _draw(affinity, replica.url)))

    def note_success(self, replica: Replica) -> None:
        if replica.n_failures:
            replica.n_failures, replica.ejected_until = 0, 0.0

    def note_failure(self, replica: Replica) -> None:
        replica.n_failures += 1
        if replica.n_failures >= FAILURES_TO_EJECT and len(self._replicas) > 1:
            replica.ejected_until = time.monotonic() + EJECTION_S


def _expose(alias: str, replica: Replica) -> None:
    """Let every scrape see whether the replica is ejected at that moment: an ejection ends without an event."""
    ENGINE_EJECTED.labels(model=alias, replica=replica.url).set_function(
        lambda: float(replica.is_ejected(time.monotonic()))
    )


def conversation_of(request: CompletionRequest) -> str:
    """The same for every turn of a conversation: a hash of the alias and of how the conversation opens."""
    messages = request.body.get("messages")
    opening = _opening(messages) if messages else (request.body.get("prompt") or "")[:PROMPT_CHARS]
    return hashlib.blake2b(orjson.dumps([request.alias, opening]), digest_size=16).hexdigest()


def _opening(messages: Sequence[Mapping[str, Any]]) -> list[object]:
    """What was said up to the user's first message: all that the first turn has, and every later one too."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    return [message.get("content") for message in messages[: first + 1]]


def _draw(affinity: str, url: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\x1f{url}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
