"""Limits counted in this process: exact for one gateway with one worker, and never in need of a wait."""

from __future__ import annotations

from pawl.clock import Clock
from serving.keys import ApiKey
from serving.limit_answers import limit_headers, refusal
from serving.limits import NO_LIMITS, Ledger, Reservation


class MemoryLimiter:
    """The allowances are the limits themselves."""

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._ledger = Ledger(starts_full=True)

    def try_reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation:
        """Reserve what the request may cost.

        Raises:
            RateLimited: a limit is reached; nothing was charged.
        """
        if key.limits is None:
            return NO_LIMITS
        now = self._clock()
        claims = self._ledger.claims(key.id, key.limits, user, now)
        is_short = False
        for allowance in claims.allowances:
            if now >= allowance.ends_at:
                allowance.start_window(allowance.limit, now)
            if allowance.left < (tokens if allowance.is_tokens else 1):
                is_short = True
        if is_short:
            raise refusal(claims.short(tokens, now), claims, tokens, now)
        claims.take(tokens)
        return Reservation(claims.allowances, tokens, limit_headers(claims, now))

    async def reserve(self, key: ApiKey, user: str, tokens: int) -> Reservation:
        """The same as `try_reserve`, which is never at a loss here."""
        return self.try_reserve(key, user, tokens)

    def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do: what was counted ends with the process."""
