"""Limits of keys: reserve what a request may cost at most, settle what it did cost, or refund it all.

Every limit but the one on concurrency is a fixed window: at most `limit` units are handed out before the window ends,
and then it starts anew. A minute begins with the first request after the last minute ended, a day at midnight UTC.
Of the usual algorithms (token bucket or GCRA, sliding windows) this one stays exact when several processes hand out
parts of one limit: a part belongs to its window and lapses with it, and what is returned goes back to the window it
came from. Like a full token bucket it lets twice the limit through within a minute at worst, around a window's end.

What this process may hand out of a limit is an `Allowance`. Here are the state machine and its rules, without clock
or storage; `serving.memory_limits` and `serving.database_limits` decide where allowances come from.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum
from itertools import islice
from typing import NamedTuple, Protocol

from pawl.api_keys import KeyLimits
from serving.keys import ApiKey

MINUTE_S = 60.0
DAY_S = 86_400.0
MAX_USERS = 100_000
"""Users with allowances of their own, of all keys together; more share those of the requests that name nobody."""
ROOM_FOR_OTHERS = 4
"""No key has more than this multiple of the users there still is room for, so that none takes all the room (dynamic
thresholds, Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998)."""
SWEEP_GAP_S = 0.05
USERS_PER_SWEEP = 1000
"""So many are looked at within a millisecond or two."""


class Unit(IntEnum):
    """What a limit counts."""

    REQUESTS = 0
    TOKENS = 1
    SLOTS = 2


class Rule(NamedTuple):
    """A kind of limit."""

    name: str
    """As in metrics and in the shared store."""
    field: str
    """Of `KeyLimits`."""
    unit: Unit
    length_s: float


KEY_RULES = (
    Rule("requests", "requests_per_minute", Unit.REQUESTS, MINUTE_S),
    Rule("tokens", "tokens_per_minute", Unit.TOKENS, MINUTE_S),
    Rule("budget", "tokens_per_day", Unit.TOKENS, DAY_S),
    Rule("concurrency", "concurrency", Unit.SLOTS, math.inf),
)
USER_RULES = (
    Rule("user_requests", "user_requests_per_minute", Unit.REQUESTS, MINUTE_S),
    Rule("user_tokens", "user_tokens_per_minute", Unit.TOKENS, MINUTE_S),
    Rule("user_budget", "user_tokens_per_day", Unit.TOKENS, DAY_S),
    Rule("user_concurrency", "user_concurrency", Unit.SLOTS, math.inf),
)


class Allowance:
    """What this process may still hand out of one limit, until the window ends."""

    __slots__ = (
        "elsewhere", "ends_at", "granted", "is_slots", "is_tokens", "left", "lent", "limit", "refused_cost",
        "refused_until", "renewed_at", "rule", "subject",
    )  # fmt: skip

    def __init__(self, rule: Rule, subject: str, limit: int, left: int) -> None:
        self.rule = rule
        self.is_tokens = rule.unit == Unit.TOKENS
        self.is_slots = rule.unit == Unit.SLOTS
        self.subject = subject
        self.limit = limit
        self.left = left
        """Below 0 when requests cost more than they reserved."""
        self.ends_at = math.inf if self.is_slots else 0.0
        self.elsewhere = limit - left
        """What the shared store had left for everybody when it was asked last."""
        self.granted = 0
        """Of slots: how many the shared store counts for this process, in use or not."""
        self.renewed_at = -math.inf
        """Of slots: when the shared store was told of them last."""
        self.lent = 0
        """How much of `left` this process gave itself while the shared store was away."""
        self.refused_until = 0.0
        self.refused_cost = 0

    def cost(self, tokens: int) -> int:
        return tokens if self.is_tokens else 1

    def is_short(self, tokens: int, now: float) -> bool:
        """Whether a request cannot be served from here."""
        return self.left < self.cost(tokens) or now >= self.ends_at

    def is_refused(self, tokens: int, now: float) -> bool:
        """Whether asking the shared store again is pointless for the moment."""
        return now < self.refused_until and self.cost(tokens) >= self.refused_cost

    def start_window(self, left: int, now: float) -> None:
        self.left = left
        self.ends_at = end_of_window(self.rule.length_s, now)

    def remaining(self, now: float) -> int:
        """What is left for the key or user, here and elsewhere."""
        return max(0, self.left + self.elsewhere) if now < self.ends_at else self.limit


def end_of_window(length_s: float, now: float) -> float:
    """When a window that starts now ends: a minute from now, or at the next midnight UTC.

    >>> end_of_window(MINUTE_S, 30.0), end_of_window(DAY_S, 30.0)
    (90.0, 86400.0)
    """
    return (now // DAY_S + 1) * DAY_S if length_s == DAY_S else now + length_s


class Claims:
    """The allowances that a request of one key and user draws on."""

    __slots__ = ("account", "allowances", "of_user", "requests", "tokens", "version")

    def __init__(self, account: Account, allowances: tuple[Allowance, ...]) -> None:
        self.account = account
        self.draw_on(allowances)

    def draw_on(self, allowances: tuple[Allowance, ...]) -> None:
        """Set what these are, under the limits that the account has now."""
        self.version = self.account.version
        self.allowances = allowances
        self.of_user = allowances[len(self.account.own) :]
        self.requests = tuple(each for each in allowances if each.rule.unit == Unit.REQUESTS)
        minutes = tuple(each for each in allowances if each.is_tokens and each.rule.length_s == MINUTE_S)
        self.tokens = minutes or tuple(each for each in allowances if each.is_tokens)
        """Those that the headers tell of: the budget only where no limit per minute stands beside it."""

    def take(self, tokens: int) -> None:
        """Hand out what a request may cost; the caller has seen that nothing is short."""
        for allowance in self.allowances:
            allowance.left -= tokens if allowance.is_tokens else 1

    def short(self, tokens: int, now: float) -> list[Allowance]:
        """What is not enough for a request."""
        return [each for each in self.allowances if each.is_short(tokens, now)]


class Account:
    """The allowances of one key, and of its users."""

    __slots__ = (
        "everybody", "has_user_limits", "key_id", "leased", "limits", "own", "resting", "touched", "touched_at",
        "users", "version",
    )  # fmt: skip

    def __init__(self, key_id: str, limits: KeyLimits, own: tuple[Allowance, ...]) -> None:
        self.key_id = key_id
        self.version = 0
        """Counts changes of the limits."""
        self.change(limits, own)
        self.users: dict[str, Claims] = {}
        self.touched_at = 0.0
        self.touched: set[Claims] = set()
        """Of users: where something may have to be told to the shared store."""
        self.resting: set[Claims] = set()
        """Of users: where a part is kept in hand for as long as the key is in use."""
        self.leased: set[Allowance] = set()
        """Slots, of the key or of users, that the shared store counts for this process."""

    def change(self, limits: KeyLimits, own: tuple[Allowance, ...]) -> None:
        """Set other limits; what users have is taken over when they come next."""
        self.version += 1
        self.limits = limits
        self.own = own
        self.has_user_limits = any(getattr(limits, rule.field) for rule in USER_RULES)
        self.everybody = Claims(self, own)

    def next_touched(self, n: int) -> list[Claims]:
        """Take so many out of `touched`; they rest until `forget_empty`."""
        batch = [self.touched.pop() for _ in range(min(n, len(self.touched)))]
        self.resting.update(batch)
        return batch

    def forget_empty(self, batch: list[Claims]) -> None:
        """But for those with units in hand; slots have their own place, `leased`."""
        self.resting.difference_update(
            each for each in batch if not any(mine.left and not mine.is_slots for mine in each.of_user)
        )

    def wake(self) -> None:
        """Have what is kept in hand looked at again."""
        self.touched |= self.resting
        self.resting.clear()

    def is_empty(self) -> bool:
        """Whether there is nothing to tell to the shared store."""
        return not (self.touched or self.resting or self.leased or any(each.left for each in self.own))


class Ledger:
    """The accounts of every key that this process has served, bounded in the number of users."""

    def __init__(self, *, starts_full: bool, max_users: int = MAX_USERS) -> None:
        """`starts_full`: the allowances are the limits themselves, not parts that a shared store hands out."""
        self.accounts: dict[str, Account] = {}
        self._starts_full = starts_full
        self._max_users = max_users
        self._n_users = 0
        self._swept_at = -math.inf

    def claims(self, key_id: str, limits: KeyLimits, user: str, now: float) -> Claims:
        """The allowances for a request of this key and user."""
        account = self.accounts.get(key_id)
        if account is None or account.limits is not limits:
            account = self._open(key_id, limits, account)
        if not account.has_user_limits:
            return account.everybody
        found = account.users.get(user)
        return found if found and found.version == account.version else self._open_user(account, user, now)

    def _open(self, key_id: str, limits: KeyLimits, before: Account | None) -> Account:
        """A new account, or the old one under changed limits with what has been used of them."""
        if before is not None and before.limits == limits:
            before.limits = limits
            return before
        own = self._allowances(KEY_RULES, key_id, limits, before.own if before else ())
        if before is None:
            return self.accounts.setdefault(key_id, Account(key_id, limits, own))
        before.change(limits, own)
        return before

    def _open_user(self, account: Account, user: str, now: float) -> Claims:
        """Allowances for a user; when there are too many users, those of nobody in particular."""
        if user not in account.users and not self._has_room(account) and not self._sweep(account, now):
            user = ""
        claims = account.users.get(user)
        before = claims.of_user if claims else ()
        own = self._allowances(USER_RULES, subject_of(account.key_id, user), account.limits, before)
        if claims is not None:
            claims.draw_on(account.own + own)
            return claims
        self._n_users += 1
        return account.users.setdefault(user, Claims(account, account.own + own))

    def _has_room(self, account: Account) -> bool:
        """Whether there may be one more user of this key."""
        return len(account.users) < ROOM_FOR_OTHERS * (self._max_users - self._n_users)

    def _allowances(
        self, rules: tuple[Rule, ...], subject: str, limits: KeyLimits, before: tuple[Allowance, ...]
    ) -> tuple[Allowance, ...]:
        known = {each.rule: each for each in before}
        return tuple(self._allowance(rule, subject, limit, known.get(rule)) for rule, limit in _set(rules, limits))

    def _allowance(self, rule: Rule, subject: str, limit: int, before: Allowance | None) -> Allowance:
        if before is None:
            return Allowance(rule, subject, limit, limit if self._starts_full else 0)
        if self._starts_full:
            before.left += limit - before.limit
        before.limit = limit
        return before

    def _sweep(self, account: Account, now: float) -> bool:
        """Look for users to forget, of this key and of the one that has most; True if that made room."""
        if now >= self._swept_at + SWEEP_GAP_S:
            self._swept_at = now
            for each in {account, max(self.accounts.values(), key=lambda other: len(other.users))}:
                self.forget_some_idle_users(each, now, USERS_PER_SWEEP, is_urgent=True)
        return self._has_room(account)

    def forget_some_idle_users(self, account: Account, now: float, n: int, *, is_urgent: bool = False) -> None:
        """Of the next so many users drop those who would start full again anyway.

        Args:
            is_urgent: also those who may owe something for a window that is over, and those of whom the shared store
                knows everything, so that they would be asked for anew.
        """
        for user, claims in list(islice(account.users.items(), n)):
            is_over = all(self._is_over(each, now) for each in claims.of_user)
            if is_urgent and is_over:
                account.touched.discard(claims)
            if claims not in account.touched and (is_over or (is_urgent and self._is_elsewhere(claims))):
                self._forget(account, user)
            else:
                account.users[user] = account.users.pop(user)  # To the end, so that others come next.

    def _is_over(self, allowance: Allowance, now: float) -> bool:
        """Whether a new one would be the same."""
        if not allowance.is_slots:
            return now >= allowance.ends_at
        if self._starts_full:
            return allowance.left == allowance.limit
        return not allowance.granted and allowance.left == allowance.lent

    def _is_elsewhere(self, claims: Claims) -> bool:
        """Whether this process has nothing of these in hand or in use that the shared store would not know of."""
        return not self._starts_full and not any(each.left or each.lent or each.granted for each in claims.of_user)

    def _forget(self, account: Account, user: str) -> None:
        account.resting.discard(account.users.pop(user))
        self._n_users -= 1


def subject_of(key_id: str, user: str) -> str:
    """What a user of a key is called in the shared store, however long the name is.

    >>> subject_of("k1", "ann")
    'k1/d8963d899008cf8c05369be7b9042715'
    """
    return f"{key_id}/{hashlib.blake2b(user.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def _set(rules: tuple[Rule, ...], limits: KeyLimits) -> list[tuple[Rule, int]]:
    return [(rule, limit) for rule in rules if (limit := getattr(limits, rule.field))]


class Reservation:
    """What one request holds. Exactly one call of `settle` or `refund` counts; both free its slot."""

    __slots__ = ("_allowances", "_claims", "_ends", "_tokens", "headers")

    def __init__(
        self, allowances: tuple[Allowance, ...], tokens: int, headers: bytes, claims: Claims | None = None
    ) -> None:
        """`claims`: of a user, to be marked as touched in the end."""
        self._allowances = allowances
        self._ends = [each.ends_at for each in allowances]
        self._tokens = tokens
        self._claims = claims
        self.headers = headers
        """The `x-ratelimit-...` lines of the answer, each with its line end."""

    def settle(self, tokens: int) -> None:
        """The request ran and took this many tokens: what it reserved beyond them goes back."""
        held, self._allowances = self._allowances, ()
        surplus = self._tokens - tokens
        if self._claims is not None:
            self._claims.account.touched.add(self._claims)
        for allowance, ends_at in zip(held, self._ends, strict=False):
            if allowance.is_slots:
                allowance.left += 1
            # A surplus goes back to the window it came from; a deficit is owed in whatever window it is now.
            elif allowance.is_tokens and (surplus < 0 or allowance.ends_at == ends_at):
                allowance.left += surplus

    def refund(self) -> None:
        """The request did not run: it costs nothing."""
        held, self._allowances = self._allowances, ()
        if self._claims is not None:
            self._claims.account.touched.add(self._claims)
        for allowance, ends_at in zip(held, self._ends, strict=False):
            if allowance.ends_at == ends_at:
                allowance.left += self._tokens if allowance.is_tokens else 1


NO_LIMITS = Reservation((), 0, b"")
"""What a request of a key without limits holds."""


class Limiter(Protocol):
    """Where requests are counted."""

    def try_reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation | None:
        """Reserve without waiting; None: the shared store has to be asked with `reserve`.

        Raises:
            RateLimited: a limit is reached; nothing was charged.
        """

    async def reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation:
        """Reserve, asking the shared store where that is needed; bounded in time.

        Args:
            user: as the request names it; empty for those that name nobody, who count together as one user.
            tokens: the most that the request may take, prompt and answer together.

        Raises:
            RateLimited: a limit is reached; nothing was charged.
        """

    def start(self) -> None:
        """Begin; on the event loop."""

    async def stop(self) -> None:
        """Give back to the shared store what this process holds."""
