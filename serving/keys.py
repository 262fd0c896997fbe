"""Who may call: the keys as this process knows them, followed from the database on a thread of its own.

The process holds every key's digests, read again whenever the table changes, at the latest after half of
`auth.key_cache_s`. A credential that has been verified is remembered as it stands in the header, so the next request
with it costs one look-up in a dictionary; whenever a key changes, all of that memory goes. While the database is
away the keys last read go on working, also across a restart, for `auth.key_outage_s`; what is not among them is
answered 503, since nobody can say that it is wrong.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import orjson
import sqlalchemy as sa
import structlog

from feedback.errors import SpoolUnavailable
from feedback.spool import Spool
from monitoring.metrics import KEY_LOOK_UPS, KEYS_READ
from pawl.api_keys import (
    ALL_SCOPES,
    DEFAULT_PRIORITY,
    KeyLimits,
    KeyRecord,
    cache_salt,
    digest_of,
    effective_limits,
    parse_credential,
    valid_until,
)
from pawl.clock import Clock
from pawl.database import Database
from pawl.key_store import changes_since, note_use, record_from_json, record_to_json
from serving.errors import Overloaded, Unauthorized

log = structlog.get_logger()

T = TypeVar("T")

KEPT_NAME = "keys"
MAX_VERIFIED = 16_384
MAX_REFUSED = 4_096
MAX_CREDENTIAL_CHARS = 128
"""Of a credential worth remembering: a key has 86, the rest is room for `Bearer` and spaces."""
GAP_S = 0.1
"""Between two readings of the table, however many unknown credentials ask for one."""
PATIENCE_S = 2.0
"""How long a request with an unknown key may wait for the next reading."""
WHOLE_EVERY_S = 60.0
"""The whole table is read this often, so that a row changed by hand is noticed too."""
USE_EVERY_S = 600.0
"""How often verified credentials are forgotten, which is when a key still in use shows."""
FIRST_USE_S = 60.0
"""After the start, when that is done for the first time."""
WRONG_KEY = "the API key is not valid"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A caller whose key has been verified."""

    id: str
    """The public part of the key: it owns what is done with it, whatever secret it has at the time."""
    scopes: frozenset[str]
    limits: KeyLimits | None
    cache_salt: str
    priority: int
    name: str
    expires_at: float | None


ANONYMOUS = ApiKey("", ALL_SCOPES, None, "", DEFAULT_PRIORITY, "", None)
"""Every caller where keys are not required."""


class Verified(NamedTuple):
    """A remembered verdict."""

    key: ApiKey
    until: float


class Reading:
    """The table as it was read, and the verdicts on it; a later reading starts without any verdicts."""

    __slots__ = ("number", "records", "refused", "verified")

    def __init__(self, records: dict[str, KeyRecord], number: int | None) -> None:
        self.records = records
        self.number = number
        self.verified: dict[str, Verified] = {}
        self.refused: dict[str, float] = {}


class KeyRing:
    """The keys of the shared database; `known` is a look-up in a dictionary.

    Verdicts are only made and remembered on the event loop's thread; the thread of the ring only puts a new `Reading`
    in the place of the old one.
    """

    def __init__(
        self,
        database: Database,
        spool: Spool,
        *,
        secret: bytes,
        defaults: KeyLimits,
        cache_s: float,
        outage_s: float,
        clock: Clock,
    ) -> None:
        """Connects to nothing yet.

        Args:
            secret: the server's, from which each key's cache salt is made.
            defaults: limits of keys that have none of their own.
            cache_s: how soon a revocation must take effect.
            outage_s: how long keys stay good without a reading.
            clock: seconds since the epoch.
        """
        self._database = database
        self._spool = spool
        self._secret = secret
        self._defaults = defaults
        self._cache_s = cache_s
        self._trust_s = max(cache_s, outage_s)
        self._clock = clock
        self._reading = Reading({}, None)
        self._trusted_until = 0.0
        self._whole_at = self._kept_at = self._forgot_at = 0.0
        self._used: set[str] = set()
        self._wish_lock = threading.Lock()
        self._wish: Future[None] | None = None
        self._is_wanted = threading.Event()
        self._is_stopping = threading.Event()
        self.is_database_up = True
        self._worker = threading.Thread(target=self._run, name="keys", daemon=True)

    def known(self, credential: str) -> ApiKey | None:
        """The caller behind a header's value, if it has been verified; None: `look_up` must be asked."""
        # Two strings are compared only once their salted hashes agree, so the time this takes tells nothing.
        verified = self._reading.verified.get(credential)
        if verified is None:
            return None
        now = self._clock()
        return verified.key if now < verified.until and now < self._trusted_until else None

    async def look_up(self, credential: str) -> ApiKey:
        """Verify a header's value.

        Raises:
            Unauthorized: it is no key, or none that is good.
            Overloaded: the database is away, and the key is not among those last read.
        """
        try:
            key = await self._look_up(credential)
        except Unauthorized:
            KEY_LOOK_UPS.labels(outcome="refused").inc()
            raise
        except Overloaded:
            KEY_LOOK_UPS.labels(outcome="unavailable").inc()
            raise
        KEY_LOOK_UPS.labels(outcome="good").inc()
        return key

    async def _look_up(self, credential: str) -> ApiKey:
        parsed = parse_credential(credential)
        if parsed is None:
            raise refused()
        digest = digest_of(parsed.secret)
        reading = self._reading
        if key := self._verify(reading, credential, parsed.id, digest):
            return key
        self._refuse_if_certain(reading, parsed.id, digest)
        await self._next_reading()  # The key may be younger than the last reading, or have a new secret.
        reading = self._reading
        if key := self._verify(reading, credential, parsed.id, digest):
            return key
        put_bounded(reading.refused, parsed.id + digest, self._clock() + self._cache_s, MAX_REFUSED)
        raise refused()

    def _verify(self, reading: Reading, credential: str, key_id: str, digest: str) -> ApiKey | None:
        """Check a secret's digest against a reading, and remember the verdict with that reading."""
        now = self._clock()
        record = reading.records.get(key_id)
        until = valid_until(record, digest, now)
        if record is None or until is None or now >= self._trusted_until:
            return None
        key = self._api_key(record)
        self._used.add(key_id)
        if len(credential) <= MAX_CREDENTIAL_CHARS:
            put_bounded(reading.verified, credential, Verified(key, until), MAX_VERIFIED)
        return key

    def _api_key(self, record: KeyRecord) -> ApiKey:
        limits = effective_limits(record.limits, self._defaults)
        salt = cache_salt(self._secret, record.id)
        return ApiKey(record.id, record.scopes, limits, salt, record.priority, record.name, record.expires_at)

    def _refuse_if_certain(self, reading: Reading, key_id: str, digest: str) -> None:
        """Answer at once where another reading would change nothing, or cannot be had."""
        now = self._clock()
        record = reading.records.get(key_id)
        is_ended = record is not None and (record.revoked_at is not None or has_passed(record.expires_at, now))
        if is_ended or reading.refused.get(key_id + digest, 0.0) > now:
            raise refused()
        if not self.is_database_up:
            raise unavailable()

    async def _next_reading(self) -> None:
        """Wait for a reading of the table that begins after this call; all who wait share it.

        Raises:
            Overloaded: there was none, or not in time.
        """
        wish = self._make_wish()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wrap_future(wish)
        if not wish.done() or not self.is_database_up:
            raise unavailable()

    def _make_wish(self) -> Future[None]:
        with self._wish_lock:
            if self._wish is None:
                self._wish = Future()
                self._wish.set_running_or_notify_cancel()  # One who leaves must not cancel it for the others.
            self._is_wanted.set()
            return self._wish

    def start(self) -> None:
        """Start from what the spool remembers, read the table, then follow it."""
        self._recall()
        self.refresh()
        self._forgot_at = self._clock() - USE_EVERY_S + FIRST_USE_S
        self._worker.start()

    def stop(self) -> None:
        self._is_stopping.set()
        self._is_wanted.set()

    def _run(self) -> None:
        while not self._is_stopping.wait(GAP_S):
            self._is_wanted.wait(max(0.0, self._cache_s / 2 - GAP_S))
            if not self._is_stopping.is_set():
                self._grant_wish()

    def _grant_wish(self) -> None:
        with self._wish_lock:
            wish, self._wish = self._wish, None
            self._is_wanted.clear()
        self.refresh()
        if wish is not None:
            wish.set_result(None)

    def refresh(self) -> None:
        """Read what changed in the table; on failure keep what is known."""
        now = self._clock()  # Before the reading: what it does not show yet is younger than this.
        try:
            self._read(now)
            self._report_use(now)
        except Exception as exc:  # noqa: BLE001 - neither a database that is away nor a bad row may end this thread
            if self.is_database_up:
                log.warning("keys_kept", reason=type(exc).__name__)
            self.is_database_up = False
            return
        self.is_database_up = True

    def _read(self, now: float) -> None:
        is_whole_due = now >= self._whole_at + WHOLE_EVERY_S
        changes = changes_since(self._database, None if is_whole_due else self._reading.number)
        if changes.is_whole:
            self._whole_at = now
        self._take_over(changes.records, changes.number, is_whole=changes.is_whole)
        self._trusted_until = now + self._trust_s
        KEYS_READ.set(now)
        self._keep(now)

    def _take_over(self, changed: Iterable[KeyRecord], number: int, *, is_whole: bool) -> None:
        before = self._reading
        found = {record.id: record for record in changed}
        records = found if is_whole else before.records | found if found else before.records
        if number != before.number or not same_but_for_use(records, before.records):
            self._reading = Reading(records, number)
            self._kept_at = 0.0

    def _report_use(self, now: float) -> None:
        """Forget what was verified now and then: a key still in use is verified again, and so shows that it is."""
        if now < self._forgot_at + USE_EVERY_S:
            return
        self._forgot_at = now
        used, self._used = self._used, set()
        self._reading = Reading(self._reading.records, self._reading.number)
        if used:
            with suppress(sa.exc.SQLAlchemyError):  # Nice to know; the reading itself has succeeded.
                note_use(self._database, used, now)

    def _keep(self, now: float) -> None:
        """Remember the keys for a restart without the database, after each change and now and then."""
        if now >= self._kept_at + WHOLE_EVERY_S:
            self._kept_at = now
            self._spool.keep(KEPT_NAME, pack(now, self._reading.records))

    def _recall(self) -> None:
        """Take up what an earlier process kept, as far as it is to be trusted still."""
        try:
            kept = self._spool.kept(KEPT_NAME).result()
            read_at, records = unpack(kept) if kept else (0.0, {})
        except (SpoolUnavailable, ValueError, TypeError, KeyError) as exc:
            log.warning("keys_not_recalled", reason=type(exc).__name__)
            return
        self._reading = Reading(records, None)
        self._trusted_until = read_at + self._trust_s


def pack(read_at: float, records: Mapping[str, KeyRecord]) -> bytes:
    """A reading for the disk."""
    return orjson.dumps({"read_at": read_at, "keys": [record_to_json(record) for record in records.values()]})


def unpack(kept: bytes) -> tuple[float, dict[str, KeyRecord]]:
    """What `pack` wrote."""
    data = orjson.loads(kept)
    return float(data["read_at"]), {each["id"]: record_from_json(each) for each in data["keys"]}


def refused() -> Unauthorized:
    """The one answer to every key that is not good, whatever is wrong with it."""
    return Unauthorized(WRONG_KEY, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def unavailable() -> Overloaded:
    return Overloaded("the API key cannot be checked at the moment; try again")


def has_passed(end: float | None, now: float) -> bool:
    return end is not None and end <= now


def same_but_for_use(left: dict[str, KeyRecord], right: dict[str, KeyRecord]) -> bool:
    """Whether two readings say the same, but for when the keys were last used."""
    if left is right:
        return True
    return left.keys() == right.keys() and all(lasting(left[key_id]) == lasting(right[key_id]) for key_id in left)


def lasting(record: KeyRecord) -> KeyRecord:
    """The same key as if it had never been used."""
    return replace(record, last_used_at=None)


def put_bounded(cache: dict[str, T], name: str, value: T, limit: int) -> None:
    """Add to a cache that starts again when it is full."""
    if len(cache) >= limit:
        cache.clear()
    cache[name] = value
