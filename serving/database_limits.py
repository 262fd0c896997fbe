"""Limits counted for all gateways together, in the shared database.

A process asks the database for a part of a limit and hands it out request by request: of a large limit one part in 64
at a time, so that most requests need no database; of a small one a unit at a time, so that none lies idle in the wrong
process. What is not used goes back a moment later. Nothing is handed out that was not charged before, so all gateways
together never pass a limit.

While the database is away, known keys are served on: each process lends itself a fixed share of every limit, once per
window, and owes to the database what was used of it. No request waits for the database longer than twice
`PATIENCE_S`, and while it is known to be away none waits at all.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog

from monitoring.metrics import LIMIT_STORE_CALLS
from pawl.clock import Clock
from pawl.database import Database
from serving.errors import Overloaded
from serving.keys import ApiKey
from serving.limit_answers import limit_headers, refusal
from serving.limit_store import Ask, Grant, Lease, Report, Short, forget_ended, hold_slots, part_of, report, take
from serving.limits import NO_LIMITS, Account, Allowance, Claims, Ledger, Reservation

log = structlog.get_logger()

T = TypeVar("T")

THREADS = 2
PATIENCE_S = 2.0
"""How long the database may take to answer before it counts as away."""
ATTEMPTS = 3
"""What was granted may be taken by another request of the key before this one gets to it."""
FLUSH_S = 0.2
"""How often unused parts are given back."""
IDLE_S = 5.0
"""A key without requests for this long gives back everything."""
REFUSAL_TRUST_S = 0.2
"""How long a limit that was found exhausted counts as that without asking again."""
SLOT_TTL_S = 15.0
"""How long the slots of a process that was killed stay taken."""
PURGE_EVERY_S = 600.0
STOP_S = 3.0
"""How long giving back everything may take in the end."""
USERS_PER_REPORT = 160
"""With three windows each; more at a time hold up the event loop and come near the drivers' limits on parameters."""
REPORTS_PER_FLUSH = 12
"""So many parts of a key's users are looked at before it is the next key's turn."""
USERS_PER_LOOK = 500
"""So many are looked at on each flush, whether they can be forgotten."""


class DatabaseLimiter:
    """Parts of the limits, handed out on the event loop's thread; the database is asked on threads of its own."""

    def __init__(
        self,
        database: Database,
        *,
        holder: str,
        clock: Clock,
        share_without_database: float,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Connects to nothing yet.

        Args:
            holder: a name that no other gateway process has at the same time.
            clock: seconds since the epoch, about the same on all gateways.
            share_without_database: of each limit, what this process may hand out by itself; 0: nothing.
            patience_s: how long a question to the database may take; a request waits for two at most.
        """
        self._database = database
        self._holder = holder
        self._clock = clock
        self._share = share_without_database
        self._patience_s = patience_s
        self._ledger = Ledger(starts_full=False)
        self._locks: dict[str, asyncio.Lock] = {}
        self._active: dict[str, Account] = {}
        self._purged_at = clock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="limits")
        self._running: set[Future[Any]] = set()
        self._flusher: asyncio.Task[None] | None = None
        self.is_database_up = True

    def try_reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation | None:
        """Reserve from what this process has; None: the database must be asked.

        Raises:
            RateLimited: a limit is reached; nothing was charged.
            Overloaded: the database is away, and nothing may be handed out without it.
        """
        if key.limits is None:
            return NO_LIMITS
        now = self._clock()
        claims = self._ledger.claims(key.id, key.limits, user, now)
        if not self.is_database_up:
            self._lend(claims, tokens, now)
        for each in claims.allowances:
            if now >= each.ends_at or each.left < (tokens if each.is_tokens else 1):
                self._refuse_if_certain(claims, tokens, now)
                return None
        claims.take(tokens)
        claims.account.touched_at = now
        self._active[key.id] = claims.account
        touches = claims if claims.of_user else None
        return Reservation(claims.allowances, tokens, limit_headers(claims, now), touches)

    def _refuse_if_certain(self, claims: Claims, tokens: int, now: float) -> None:
        """Refuse where the database has just said no, or cannot say yes."""
        against = [
            each
            for each in claims.short(tokens, now)
            if not self.is_database_up or each.is_refused(tokens, now) or each.cost(tokens) > each.limit
        ]
        if against:
            raise refusal(against, claims, tokens, now)

    def _lend(self, claims: Claims, tokens: int, now: float) -> None:
        """Top up what is short from this process's own share of the limit, once per window."""
        if self._share <= 0.0:
            raise uncounted()
        self._activate(claims)
        for each in claims.allowances:
            if now >= each.ends_at:
                each.lent = 0
                each.start_window(min(each.left, 0), now)
            if each.is_short(tokens, now) and each.lent == 0:
                each.lent = max(1, int(each.limit * self._share))
                each.left += each.lent

    def _activate(self, claims: Claims) -> None:
        """Have `flush` look at these."""
        self._active[claims.account.key_id] = claims.account
        if claims.of_user:
            claims.account.touched.add(claims)

    async def reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation:
        """Reserve, asking the database for what is short. The requests of one key ask one after the other.

        Raises:
            RateLimited: a limit is reached; nothing was charged.
            Overloaded: the database is away, and nothing may be handed out without it.
        """
        if key.limits is None:
            return NO_LIMITS
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * self._patience_s), self._lock(key.id):
                for _ in range(ATTEMPTS):
                    if reservation := self.try_reserve(key, user, tokens):
                        return reservation
                    await self._ask(self._ledger.claims(key.id, key.limits, user, self._clock()), tokens)
                if reservation := self.try_reserve(key, user, tokens):
                    return reservation
        raise uncounted()

    def _lock(self, key_id: str) -> asyncio.Lock:
        return self._locks.setdefault(key_id, asyncio.Lock())

    async def _ask(self, claims: Claims, tokens: int) -> None:
        """Have the database grant what is short, and note what it says."""
        now = self._clock()
        short = claims.short(tokens, now)
        asks = [ask_for(each, tokens) for each in short]
        await self._call(
            lambda: take(self._database, asks, holder=self._holder, now=now, slots_expire_at=now + SLOT_TTL_S),
            lambda outcome: self._note(outcome, claims, short, tokens, now),
        )

    def _note(
        self, outcome: list[Grant] | Short | None, claims: Claims, short: list[Allowance], tokens: int, asked_at: float
    ) -> None:
        """Note what the database said, even if nobody waits for it any more: it has been charged."""
        now = self._clock()
        if isinstance(outcome, Short):
            LIMIT_STORE_CALLS.labels(outcome="refused").inc()
            note_refusal(short[outcome.position], outcome, tokens, now)
        elif outcome is not None:
            LIMIT_STORE_CALLS.labels(outcome="granted").inc()
            self._activate(claims)
            for allowance, grant in zip(short, outcome, strict=True):
                note_grant(allowance, grant, now)
                if allowance.is_slots:
                    allowance.renewed_at = asked_at
                    claims.account.leased.add(allowance)

    async def _call(self, query: Callable[[], T], note: Callable[[T | None], None] = lambda _: None) -> T | None:
        """Run a query on a thread; None if it failed or took too long, which counts as the database being away.

        Args:
            note: is told the outcome on the event loop, None if the query failed, exactly once and before this
                returns; or later, if nobody waits so long: what the query has changed by then must be known.
        """
        running = self._threads.submit(query)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        arriving = asyncio.wrap_future(running)
        arriving.add_done_callback(lambda done: note(outcome_of(done)))
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(arriving)
        except (sa.exc.SQLAlchemyError, TimeoutError, OSError) as exc:
            LIMIT_STORE_CALLS.labels(outcome="unavailable").inc()
            if self.is_database_up:
                log.warning("limits_lent", reason=type(exc).__name__)
            self.is_database_up = False
            return None
        finally:
            running.cancel()  # Unless it has begun.

    def start(self) -> None:
        """Begin to give back what is not used; on the event loop."""
        self._flusher = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Give back everything that is not in use, as far as the database takes it in time."""
        if self._flusher is not None:
            self._flusher.cancel()
            with suppress(asyncio.CancelledError):
                await self._flusher
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._flush_all(is_last=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except Exception as exc:  # noqa: BLE001 - whatever it is, limits must go on being given back
                log.warning("limits_not_reported", reason=type(exc).__name__)

    async def flush(self) -> None:
        """Give back and report for every key in use; while the database is away, see whether it is back."""
        await self._flush_all()
        now = self._clock()
        if self.is_database_up and now >= self._purged_at + PURGE_EVERY_S:
            self._purged_at = now
            await self._call(lambda: forget_ended(self._database, now))

    async def _flush_all(self, *, is_last: bool = False) -> None:
        """Every key, until the database does not answer."""
        if not self.is_database_up and not await self._is_back():
            return
        for account in list(self._active.values()):
            await self._flush(account, is_last=is_last)
            if not self.is_database_up:
                return

    async def _is_back(self) -> bool:
        if len(self._running) >= THREADS:
            return False  # The threads still wait for their last answers.
        now = self._clock()
        if await self._call(lambda: _answers(self._database)) is None:
            return False
        self.is_database_up = True
        log.info("limits_shared_again")
        for account in self._active.values():
            # All that something was lent to are among the touched ones.
            for each in chain(account.own, *(claims.of_user for claims in account.touched)):
                call_in_loan(each, now)
                if each.granted:
                    account.leased.add(each)
        return True

    async def _flush(self, account: Account, *, is_last: bool = False) -> None:
        async with self._lock(account.key_id):
            now = self._clock()
            is_idle = is_last or now >= account.touched_at + IDLE_S
            await self._report(account.own, is_idle, now)
        await self._renew_slots(account, is_idle)
        await self._flush_users(account, is_idle, is_last)
        async with self._lock(account.key_id):  # Whoever asks for the first time has nothing yet, and is not idle.
            self._ledger.forget_some_idle_users(account, now, USERS_PER_LOOK)
        if is_idle and account.is_empty():
            self._active.pop(account.key_id, None)

    async def _flush_users(self, account: Account, is_idle: bool, is_last: bool) -> None:
        """Go through the users of whom there may be something to report; anybody can make up many."""
        if is_idle:
            account.wake()
        n_parts = math.ceil(len(account.touched) / USERS_PER_REPORT)
        for _ in range(n_parts if is_last else min(n_parts, REPORTS_PER_FLUSH)):
            if not self.is_database_up:
                return
            async with self._lock(account.key_id):
                batch = account.next_touched(USERS_PER_REPORT)
                allowances = [each for claims in batch for each in claims.of_user]
                await self._report(allowances, is_idle, self._clock(), partial(account.touched.update, batch))
                account.forget_empty(batch)
            await asyncio.sleep(0)

    async def _report(
        self,
        allowances: Sequence[Allowance],
        is_idle: bool,
        now: float,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        spare = [(each, spare_units(each, is_idle, now)) for each in allowances if not each.is_slots]
        spare = [(each, units) for each, units in spare if units]
        for each, units in spare:
            each.left -= units
        reports = [
            Report(each.subject, each.rule.name, each.rule.length_s, units, each.ends_at) for each, units in spare
        ]
        if not reports:
            return

        def note(is_reported: bool | None) -> None:
            if is_reported:
                LIMIT_STORE_CALLS.labels(outcome="reported").inc()
                return
            for each, units in spare:
                each.left += units
            on_failure()

        await self._call(lambda: report(self._database, reports, now=now), note)

    async def _renew_slots(self, account: Account, is_idle: bool) -> None:
        """Give back the free slots of a key and its users, and keep the leases on the others."""
        leased = list(account.leased)
        for start in range(0, len(leased), USERS_PER_REPORT):
            if not self.is_database_up:
                return
            async with self._lock(account.key_id):
                now = self._clock()
                spare = [
                    (each, spare_slots(each, is_idle or each not in account.own))
                    for each in leased[start : start + USERS_PER_REPORT]
                ]
                await self._renew(account, [each for each in spare if each[1] or is_renewal_due(each[0], now)], now)

    async def _renew(self, account: Account, spare: Sequence[tuple[Allowance, int]], now: float) -> None:
        """Tell the database of these slots, without those to give back."""
        if not spare:
            return
        for slots, n_free in spare:
            slots.left -= n_free
        leases = [Lease(slots.subject, slots.granted - n_free) for slots, n_free in spare]

        def note(is_held: bool | None) -> None:
            for slots, n_free in spare:
                if not is_held:
                    slots.left += n_free
                    continue
                slots.granted -= n_free
                slots.renewed_at = now
                if not slots.granted:
                    account.leased.discard(slots)

        expires_at = now + SLOT_TTL_S
        await self._call(lambda: hold_slots(self._database, leases, holder=self._holder, expires_at=expires_at), note)


def uncounted() -> Overloaded:
    return Overloaded("limits cannot be counted at the moment; try again")


def outcome_of(done: asyncio.Future[T]) -> T | None:
    """What a query returned; None if it failed or never ran."""
    return None if done.cancelled() or done.exception() else done.result()


def ask_for(allowance: Allowance, tokens: int) -> Ask:
    """What the database is asked, on behalf of a request that may take so many tokens."""
    rule = allowance.rule
    return Ask(
        allowance.subject,
        rule.name,
        allowance.limit,
        rule.length_s,
        allowance.cost(tokens),
        allowance.left,
        allowance.ends_at,
    )


def note_grant(allowance: Allowance, grant: Grant, now: float) -> None:
    """Add what was granted; what was left of an ended window is void, what was owed is not."""
    if grant.ends_at <= now and grant.ends_at < allowance.ends_at:
        return  # It comes late, and the next window is open.
    if allowance.lent and allowance.ends_at != grant.ends_at:
        allowance.left += grant.units  # It comes late, and the loan has a window of its own.
        return
    if allowance.ends_at != grant.ends_at:
        allowance.left = min(allowance.left, 0)
    allowance.left += grant.units
    allowance.ends_at = grant.ends_at
    allowance.elsewhere = grant.elsewhere
    allowance.refused_until = 0.0
    if allowance.is_slots:
        allowance.granted += grant.units


def note_refusal(allowance: Allowance, short: Short, tokens: int, now: float) -> None:
    """Remember for a moment that there is not so much left."""
    if allowance.lent:
        return  # It comes late.
    if allowance.ends_at != short.ends_at:
        allowance.left = min(allowance.left, 0)
    allowance.ends_at = short.ends_at
    allowance.elsewhere = max(0, short.elsewhere)
    allowance.refused_until = now + REFUSAL_TRUST_S
    allowance.refused_cost = allowance.cost(tokens)


def call_in_loan(allowance: Allowance, now: float) -> None:
    """Turn what was handed out of the process's own share into a debt; what was not, is gone."""
    if allowance.is_slots:
        allowance.granted += allowance.lent
    elif now >= allowance.ends_at:
        allowance.left = 0
    else:
        allowance.left -= allowance.lent
    allowance.lent = 0


def spare_units(allowance: Allowance, is_idle: bool, now: float) -> int:
    """What to report of a limit: units to give back, or below 0, units owed."""
    if allowance.left <= 0:
        return allowance.left
    kept = 0 if is_idle or now >= allowance.ends_at else part_of(allowance.limit)
    return allowance.left - kept if allowance.left > 2 * kept else 0


def spare_slots(slots: Allowance, is_all: bool) -> int:
    """How many slots to give back: all that are free, or those beyond a part to keep in hand."""
    return max(0, slots.left if is_all else slots.left - part_of(slots.limit))


def is_renewal_due(slots: Allowance, now: float) -> bool:
    return slots.granted > 0 and now >= slots.renewed_at + SLOT_TTL_S / 3


def _answers(database: Database) -> bool:
    with database.read() as connection:
        return bool(connection.execute(sa.text("SELECT 1")).scalar())
