"""Whether a replica can be trusted with work: from how its requests end, and from asking it.

`Health` decides and is told the time; `HealthProbes` asks. Every gateway process judges for itself: a replica that
one of them cannot reach may be well in another's eyes, and what they ask costs the engine nothing to speak of.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import orjson
import structlog

from pawl.settings import ReplicaSettings
from serving.connections import EnginePool, Reason

log = structlog.get_logger()

WINDOW_S: Final = 10
"""Over how long failures are counted as a share."""
MAX_EJECT_S: Final = 60.0
FORGIVEN_AFTER_S: Final = 60.0
"""A replica that has been back for this long begins again with the shortest ejection."""
MAX_RELAPSES: Final = 16
MIN_SHARE: Final = 0.1
"""What a replica that has just returned gets of its full share; Envoy's slow start begins there too."""
PROBES_TO_FAIL: Final = 2
TICK_S: Final = 1.0
MAX_PROBE_BYTES: Final = 1024 * 1024
NEVER: Final = float("-inf")


class RecentCount:
    """Events of the last seconds, the present one included, in buckets of one second."""

    __slots__ = ("_buckets", "_newest", "total")

    def __init__(self, n_seconds: int) -> None:
        self._buckets = [0] * n_seconds
        self._newest = 0
        self.total = 0
        """What was counted as of the last call; `at` brings it up to date."""

    def add(self, now_s: float) -> None:
        """Count one event."""
        second = int(now_s)
        if second > self._newest:
            self._turn_to(second)
        self._buckets[self._newest % len(self._buckets)] += 1
        self.total += 1

    def at(self, now_s: float) -> int:
        """How many there were."""
        second = int(now_s)
        if second > self._newest:
            self._turn_to(second)
        return self.total

    def clear(self) -> None:
        self._buckets = [0] * len(self._buckets)
        self.total = 0

    def _turn_to(self, second: int) -> None:
        n_buckets = len(self._buckets)
        for passed in range(max(self._newest, second - n_buckets) + 1, second + 1):
            self.total -= self._buckets[passed % n_buckets]
            self._buckets[passed % n_buckets] = 0
        self._newest = second


class Health:
    """What one replica's requests and probes have shown. It is in service, out, or back with a part of its share.

    Out it goes for some seconds after failures in a row or a high share of them, and for as long as its probes fail.
    """

    __slots__ = (
        "_back_at",
        "_ejected_until",
        "_failures",
        "_has_succeeded",
        "_is_dead",
        "_n_failed_probes",
        "_n_in_a_row",
        "_n_relapses",
        "_outcomes",
        "_rules",
    )

    def __init__(self, rules: ReplicaSettings) -> None:
        self._rules = rules
        self._n_in_a_row = 0
        self._outcomes, self._failures = RecentCount(WINDOW_S), RecentCount(WINDOW_S)
        self._ejected_until = NEVER
        self._n_relapses = 0
        self._n_failed_probes = 0
        self._has_succeeded = False
        self._is_dead = False
        self._back_at = NEVER

    def note(self, is_ok: bool, now_s: float) -> bool:
        """One request has ended; return whether that took the replica out of service.

        What ends while it is out was begun before, or for want of a better replica, and says nothing new.
        """
        if now_s < self._ejected_until or self._is_dead:
            return False
        self._outcomes.add(now_s)
        if is_ok:
            self._n_in_a_row, self._has_succeeded = 0, True
            return False
        self._n_in_a_row += 1
        self._failures.add(now_s)
        if not self._has_failed_enough(now_s):
            return False
        self._eject(now_s)
        return True

    def _has_failed_enough(self, now_s: float) -> bool:
        if self._n_in_a_row >= self._rules.eject_after:
            return True
        n_outcomes = self._outcomes.at(now_s)
        return (
            n_outcomes >= self._rules.eject_min_requests
            and self._failures.at(now_s) >= self._rules.eject_share * n_outcomes
        )

    def _eject(self, now_s: float) -> None:
        is_relapse = now_s - self._returned_at() <= FORGIVEN_AFTER_S
        self._n_relapses = min(self._n_relapses + 1, MAX_RELAPSES) if is_relapse else 0
        shortest_s = self._rules.eject_s
        self._ejected_until = now_s + min(shortest_s * 2**self._n_relapses, max(shortest_s, MAX_EJECT_S))
        self._forget()

    def _forget(self) -> None:
        self._n_in_a_row = 0
        self._outcomes.clear()
        self._failures.clear()

    def note_probe(self, is_ok: bool, now_s: float) -> bool:
        """The replica was asked; return whether that changed anything.

        A good probe does not end an ejection: an engine can say that it is well and fail at every request. A failed one
        counts only if no request has succeeded since the one before: an engine that is busy may be slow to say so.
        """
        has_succeeded, self._has_succeeded = self._has_succeeded, False
        if not is_ok:
            self._n_failed_probes += not has_succeeded
            was_dead, self._is_dead = self._is_dead, self._n_failed_probes >= PROBES_TO_FAIL
            return self._is_dead and not was_dead
        self._n_failed_probes = 0
        if not self._is_dead:
            return False
        self._is_dead, self._back_at = False, now_s
        self._forget()
        return True

    def share(self, now_s: float) -> float:
        """What it may be given, from 0 (it is out) to 1, as a part of what the others get."""
        if now_s < self._ejected_until or self._is_dead:
            return 0.0
        back_for_s = now_s - self._returned_at()
        if back_for_s >= self._rules.slow_start_s:
            return 1.0
        return max(MIN_SHARE, back_for_s / self._rules.slow_start_s)

    def _returned_at(self) -> float:
        return max(self._ejected_until, self._back_at)


class Probed(Protocol):
    """A replica, as far as probes are concerned."""

    @property
    def pool(self) -> EnginePool: ...

    def probed(self, is_alive: bool, models: frozenset[str] | None) -> None:
        """Take in what a probe found; `models` is None when the replica did not say."""


class Fetched(NamedTuple):
    """An engine's whole answer."""

    status: int
    body: bytes


class ProbeAnswer:
    """Collects one answer, of bounded size, for whoever waits for `done`."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Fetched | None] = asyncio.get_running_loop().create_future()
        """None: no answer that can be used."""
        self.is_over = False
        """Nothing is left to abort."""
        self.was_stale = False
        self._status = 0
        self._body = bytearray()

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:  # noqa: ARG002 - they say nothing
        self._status = status

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_PROBE_BYTES:
            self._body.clear()
            self._settle(None)

    def on_end(self) -> None:
        self.is_over = True
        self._settle(Fetched(self._status, bytes(self._body)))

    def on_failure(self, reason: Reason, was_sent: bool) -> None:  # noqa: ARG002 - a GET may be sent twice
        self.is_over = True
        self.was_stale = reason == "stale"
        self._settle(None)

    def _settle(self, result: Fetched | None) -> None:
        if not self.done.done():
            self.done.set_result(result)


class HealthProbes:
    """Asks every replica, for as long as it runs, whether it is alive and which models it has."""

    def __init__(
        self,
        replicas: Sequence[Probed],
        rules: ReplicaSettings,
        *,
        on_tick: Sequence[Callable[[], None]] = (),
        rng: random.Random | None = None,
    ) -> None:
        """Args:
        on_tick: called about once a second, for what changes by the mere passing of time.
        """
        self._replicas = replicas
        self._rules = rules
        self._on_tick = on_tick
        self._rng = rng or random.Random()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, at a moment of its own for each replica, so that many gateways do not ask all at once."""
        probes = [self._probe_for_ever(replica) for replica in self._replicas]
        self._tasks = [asyncio.create_task(task) for task in (*probes, self._tick_for_ever())]

    async def stop(self) -> None:
        """End every probe under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _probe_for_ever(self, replica: Probed) -> None:
        await asyncio.sleep(self._rng.random() * self._rules.probe_every_s)
        while True:
            try:
                is_alive, models = await probe(replica.pool, self._rules.probe_timeout_s)
                replica.probed(is_alive, models)
            except Exception as exc:
                log.error("probe_failed", reason=type(exc).__name__, exc_info=exc)
            await asyncio.sleep(self._rules.probe_every_s * self._rng.uniform(0.9, 1.1))

    async def _tick_for_ever(self) -> None:
        while True:
            for tell in self._on_tick:
                try:
                    tell()
                except Exception as exc:
                    log.error("tick_failed", reason=type(exc).__name__, exc_info=exc)
            await asyncio.sleep(TICK_S)


async def probe(pool: EnginePool, timeout_s: float) -> tuple[bool, frozenset[str] | None]:
    """Whether an engine is alive, and the models it lists, None if it does not say.

    vLLM answers /health with 503 once its engine core has died. A server that has no /health at all is alive.
    """
    health = await fetch(pool, b"/health", timeout_s)
    if health is None or health.status >= 500:
        return False, None
    listed = await fetch(pool, b"/v1/models", timeout_s)
    return True, models_in(listed.body) if listed is not None and listed.status == 200 else None


async def fetch(pool: EnginePool, path: bytes, timeout_s: float) -> Fetched | None:
    """What an engine answers to a GET within the time; None if it does not."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await _ask(pool, path)
            # A connection that the engine had closed while it was idle says nothing about the engine.
            return (await _ask(pool, path) if answer.was_stale else answer).done.result()
    except TimeoutError:
        return None


async def _ask(pool: EnginePool, path: bytes) -> ProbeAnswer:
    answer = ProbeAnswer()
    call = pool.get(path, answer)
    try:
        await answer.done
    finally:
        if not answer.is_over:
            call.abort()
    return answer


def models_in(body: bytes) -> frozenset[str] | None:
    """The ids of OpenAI's list of models; None if the body is nothing of the kind.

    >>> sorted(models_in(b'{"data": [{"id": "base"}, {"id": "base--r1"}]}'))
    ['base', 'base--r1']
    """
    try:
        listed = orjson.loads(body)
        return frozenset(str(model["id"]) for model in listed["data"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
