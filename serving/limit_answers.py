"""What a client hears about its limits: headers on every answer, and the refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from monitoring.metrics import RATE_LIMITED
from serving.errors import RateLimited
from serving.limits import Allowance, Claims, Unit

LONGEST_RETRY_AFTER_S = 60
"""SDKs retry by themselves after as much; after longer they give up, and are told so in so many words."""
SLOT_RETRY_AFTER_S = 1
"""Nobody knows when a running request will end; soon, mostly."""
UNIT_WORDS = {Unit.REQUESTS: "requests", Unit.TOKENS: "tokens", Unit.SLOTS: "concurrent requests"}


def limit_headers(claims: Claims, now: float) -> bytes:
    """The `x-ratelimit-...` lines for a key and user; of several limits on the same the one with the least left."""
    return (_lines("requests", claims.requests, now) + _lines("tokens", claims.tokens, now)).encode()


def _lines(unit: str, allowances: Sequence[Allowance], now: float) -> str:
    if not allowances:
        return ""
    tightest = allowances[0] if len(allowances) == 1 else min(allowances, key=lambda each: each.remaining(now))
    return (
        f"x-ratelimit-limit-{unit}: {tightest.limit}\r\n"
        f"x-ratelimit-remaining-{unit}: {tightest.remaining(now)}\r\n"
        f"x-ratelimit-reset-{unit}: {duration(max(0.0, tightest.ends_at - now))}\r\n"
    )


def duration(seconds: float) -> str:
    """A time span as OpenAI's headers write it.

    >>> [duration(seconds) for seconds in (0.25, 1.0, 12.2, 360.0, 86399.5)]
    ['250ms', '1s', '13s', '6m0s', '24h0m0s']
    """
    if seconds < 1.0:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60}m{rest}s"


def refusal(against: Sequence[Allowance], claims: Claims, tokens: int, now: float) -> RateLimited:
    """The 429 for what stands against a request longest, with when to come back, and whether to; counts it."""
    short = max(against, key=lambda each: (each.cost(tokens) > each.limit, not each.is_slots, each.ends_at))
    RATE_LIMITED.labels(reason=short.rule.name).inc()
    is_budget = short.rule.name in ("budget", "user_budget")
    wait_s = math.ceil(short.ends_at - now) if not short.is_slots else SLOT_RETRY_AFTER_S
    headers = dict(line.split(": ", 1) for line in limit_headers(claims, now).decode().splitlines())
    headers["retry-after"] = str(min(max(wait_s, 1), LONGEST_RETRY_AFTER_S))
    if is_budget or wait_s > LONGEST_RETRY_AFTER_S or short.cost(tokens) > short.limit:
        headers["x-should-retry"] = "false"
    code = "insufficient_quota" if is_budget else "rate_limit_exceeded"
    return RateLimited(_message(short, tokens, now), code=code, headers=headers)


def _message(short: Allowance, tokens: int, now: float) -> str:
    """Which limit, and by how much."""
    per = {60.0: " per minute", 86_400.0: " per day"}.get(short.rule.length_s, "")
    whose = "each user of this API key" if short.rule.name.startswith("user_") else "this API key"
    limit = f"{whose} is limited to {short.limit} {UNIT_WORDS[short.rule.unit]}{per}"
    if short.cost(tokens) > short.limit:
        return f"{limit}, and this request may take {tokens}: ask for fewer"
    needs = f", and this request may take {tokens}" if short.is_tokens else ""
    return f"{limit}: {short.remaining(now)} left{needs}" if not short.is_slots else f"{limit}, all of them running"
