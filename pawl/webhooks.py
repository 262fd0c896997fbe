"""Posting events to those who asked for them: signed, at least once each, for as long as it makes sense."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import httpx2
import structlog

from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.settings import WebhookSettings
from pawl.webhook_addresses import endpoint_id, shown_address
from pawl.webhook_events import Event
from pawl.webhook_outbox import DEAD, SENT, WAITING, Delivery, due, forget_before, hand_out, note_attempt
from pawl.webhook_signing import headers_for, key_of

log = structlog.get_logger()

FIRST_WAIT_S, GROWTH, LONGEST_WAIT_S = 5.0, 4.0, 12 * 3600.0
"""Between two attempts: 5 s, 20 s, 80 s, five minutes, 21 minutes, an hour and a half, 6 hours, then 12 each time."""
JITTER = 0.2
"""Waits differ by up to this part, so that what failed together does not come back together."""
AT_ONCE = 20
"""Events for one endpoint between two looks, at most."""
KEPT_S = 30 * 86400.0
"""How long events are known; nothing is tried for longer."""
FORGET_EVERY_S = 3600.0
PATIENCE_S = 5.0
"""How long one endpoint may keep the others waiting, and then the attempt that is under way."""
GONE = 410
"""Whoever answers so wants no more of it."""


class Endpoint(NamedTuple):
    """Who is told."""

    id: str
    url: str
    keys: tuple[bytes, ...]
    patterns: tuple[str, ...]
    timeout_s: float
    attempts: int

    @property
    def shown(self) -> str:
        return shown_address(self.url)


class Answer(NamedTuple):
    """What came of one attempt."""

    status: int
    """0: there was no answer."""
    error: str | None
    """None when it was taken."""
    retry_after_s: float = 0.0


def endpoint_of(settings: WebhookSettings, environ: Mapping[str, str]) -> Endpoint:
    """An endpoint with its secrets.

    Raises:
        ConfigurationError: they cannot be read, or are too short.
    """
    where = f"webhooks: the secret of {shown_address(settings.url)}"
    secrets = [line.strip() for line in _secret_text(settings, environ, where).splitlines() if line.strip()]
    if not secrets:
        raise ConfigurationError(f"{where} is empty")
    keys = tuple(key_of(secret, where) for secret in secrets)
    patterns = tuple(settings.events)
    return Endpoint(endpoint_id(settings.url), settings.url, keys, patterns, settings.timeout_s, settings.attempts)


def endpoints_of(settings: Sequence[WebhookSettings], environ: Mapping[str, str]) -> list[Endpoint]:
    """All endpoints with their secrets.

    Raises:
        ConfigurationError: a secret cannot be used, or two endpoints have one address.
    """
    found = [endpoint_of(one, environ) for one in settings]
    if len({endpoint.id for endpoint in found}) < len(found):  # What was sent is known by the address.
        raise ConfigurationError("webhooks: two endpoints have the same url; name all its events in one")
    return found


def _secret_text(settings: WebhookSettings, environ: Mapping[str, str], where: str) -> str:
    if settings.secret_file is None:
        return environ.get(settings.secret_env or "", "")
    try:
        return settings.secret_file.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{where} cannot be read from {settings.secret_file}: {exc}") from exc


def next_wait_s(attempts: int, asked_for_s: float, chance: float) -> float:
    """How long to wait after so many attempts.

    Args:
        asked_for_s: by whoever did not take it.
        chance: between 0 and 1, drawn anew each time.

    >>> next_wait_s(1, 0.0, 0.5), next_wait_s(3, 0.0, 0.0), next_wait_s(20, 0.0, 1.0)
    (5.0, 64.0, 51840.0)
    """
    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * GROWTH ** (attempts - 1))
    return max(wait_s * (1 + JITTER * (2 * chance - 1)), min(asked_for_s, LONGEST_WAIT_S))


class WebhookDuty:
    """Hands events out and sends what is due. One process at a time holds the lease to call `look`."""

    def __init__(
        self, database: Database, endpoints: Sequence[Endpoint], *, clock: Clock, draw: Callable[[], float]
    ) -> None:
        self._database = database
        self._endpoints = endpoints
        self._clock = clock
        self._draw = draw
        self._forgot_at = 0.0

    def has_work(self) -> bool:
        """Whether there is anybody to tell, or it is time to forget what is old."""
        return bool(self._endpoints) or self._clock() - self._forgot_at > FORGET_EVERY_S

    def look(self) -> Counter[str]:
        """Send what is due to every endpoint; how many attempts ended how: sent, failed, dead."""
        now = self._clock()
        if now - self._forgot_at > FORGET_EVERY_S:
            forget_before(self._database, now - KEPT_S)
            self._forgot_at = now
        for endpoint in self._endpoints:
            hand_out(self._database, endpoint.id, endpoint.patterns, now)
        found = {endpoint: due(self._database, endpoint.id, now, AT_ONCE) for endpoint in self._endpoints}
        waiting = {endpoint: deliveries for endpoint, deliveries in found.items() if deliveries}
        return asyncio.run(self._send_all(waiting)) if waiting else Counter()

    async def _send_all(self, waiting: Mapping[Endpoint, Sequence[Delivery]]) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        async with client() as posting, asyncio.TaskGroup() as group:
            for endpoint, deliveries in waiting.items():
                group.create_task(self._send_in_turn(posting, endpoint, deliveries, outcomes))
        return outcomes

    async def _send_in_turn(
        self, posting: httpx2.AsyncClient, endpoint: Endpoint, deliveries: Sequence[Delivery], outcomes: Counter[str]
    ) -> None:
        """The oldest first. The rest waits for the next look after one that got no answer, since each would time out,
        and when answers take long, since everybody else waits too."""
        ends_at = time.monotonic() + PATIENCE_S
        for delivery in deliveries:
            answer = await post(posting, endpoint, delivery.event, self._clock())
            outcomes[self._note(endpoint, delivery, answer)] += 1
            if not answer.status or time.monotonic() > ends_at:
                return

    def _note(self, endpoint: Endpoint, delivery: Delivery, answer: Answer) -> str:
        """Keep how an attempt went, and say it in a word."""
        now, attempts = self._clock(), delivery.attempts + 1
        is_over = attempts >= endpoint.attempts or answer.status == GONE
        status = SENT if answer.error is None else DEAD if is_over else WAITING
        wait_s = next_wait_s(attempts, answer.retry_after_s, self._draw())
        note_attempt(
            self._database,
            endpoint.id,
            delivery.event.id,
            status=status,
            error=answer.error,
            next_at=now + wait_s,
            now=now,
        )
        if answer.error is not None:
            tell = log.error if status == DEAD else log.warning
            tell(
                f"webhook_{'dead' if status == DEAD else 'failed'}",
                endpoint=endpoint.shown,
                id=delivery.event.id,
                type=delivery.event.type,
                attempts=attempts,
                reason=answer.error,
            )
        return "failed" if status == WAITING else status


def client() -> httpx2.AsyncClient:
    """Follows no redirect, uses no proxy that the environment names, and trusts what the system trusts."""
    return httpx2.AsyncClient(follow_redirects=False, trust_env=False, verify=ssl.create_default_context())


async def post(posting: httpx2.AsyncClient, endpoint: Endpoint, event: Event, now: float) -> Answer:
    """One attempt. Of the answer only the status and `retry-after` are looked at; its body is never read."""
    body = event.payload.encode()
    headers = {"content-type": "application/json", "user-agent": "pawl-webhooks"}
    headers |= headers_for(event.id, body, endpoint.keys, now)
    try:
        async with (
            asyncio.timeout(endpoint.timeout_s),
            posting.stream("POST", endpoint.url, content=body, headers=headers, timeout=endpoint.timeout_s) as response,
        ):
            return _answer(response)
    except TimeoutError:
        return Answer(0, "timeout")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as exc:
        return Answer(0, type(exc).__name__[:64])


def _answer(response: httpx2.Response) -> Answer:
    asked_for = response.headers.get("retry-after", "")
    wait_s = float(asked_for) if asked_for.isascii() and asked_for.isdecimal() else 0.0
    error = None if 200 <= response.status_code < 300 else f"answered {response.status_code}"
    return Answer(response.status_code, error, wait_s)
