"""API keys: `pawl-<public id>-<secret>`, shown once when they are made; only a digest of the secret is ever stored."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import NamedTuple

ID_BYTES = 8
SECRET_BYTES = 32
"""256 bits: nobody guesses one, so a fast hash of it is as safe as a slow one, and there is nothing to salt."""
KEY_TEXT = re.compile(r"pawl-([0-9a-f]{16})-([0-9a-f]{64})", re.ASCII)
BEARER = "bearer "
LOWEST_PRIORITY, DEFAULT_PRIORITY, HIGHEST_PRIORITY = 0, 5, 9
NOBODY = "0" * 64
"""Compared with where there is no digest to compare with, so that an unknown id takes the work of a wrong secret."""


class Scope(StrEnum):
    """What a key may be used for."""

    INFER = "infer"
    FEEDBACK = "feedback"
    ADMIN = "admin"
    METRICS = "metrics"


ALL_SCOPES = frozenset(scope.value for scope in Scope)


class KeyText(NamedTuple):
    """The two halves of a key."""

    id: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret: tuples end up in tracebacks and logs."""
        return f"KeyText(id={self.id!r})"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use; None: not limited here."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    user_requests_per_minute: int | None = None
    user_tokens_per_minute: int | None = None
    user_concurrency: int | None = None
    user_tokens_per_day: int | None = None


LIMIT_NAMES = tuple(each.name for each in fields(KeyLimits))


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the database has it."""

    id: str
    name: str
    digest: str = field(repr=False)
    scopes: frozenset[str]
    limits: KeyLimits
    priority: int
    created_at: float
    created_by: str
    previous_digest: str | None = field(default=None, repr=False)
    previous_expires_at: float | None = None
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None


def make_key(id_bytes: bytes, secret_bytes: bytes) -> KeyText:
    """A key from `ID_BYTES` and `SECRET_BYTES` random bytes.

    >>> make_key(bytes(8), bytes(32)).id
    '0000000000000000'
    """
    return KeyText(id_bytes.hex(), secret_bytes.hex())


def key_text(key: KeyText) -> str:
    """What its owner keeps and sends.

    >>> key_text(make_key(bytes(8), bytes(32)))[:24]
    'pawl-0000000000000000-00'
    """
    return f"pawl-{key.id}-{key.secret}"


def parse_credential(credential: str) -> KeyText | None:
    """The key in the value of an `authorization` or `x-api-key` header; None where the form is not a key's.

    >>> parse_credential("Bearer pawl-0123456789abcdef-" + 64 * "0")
    KeyText(id='0123456789abcdef')
    >>> parse_credential("Bearer ' OR 1=1 --")
    """
    text = credential[len(BEARER) :] if credential[: len(BEARER)].lower() == BEARER else credential
    match = KEY_TEXT.fullmatch(text.strip())
    return KeyText(match[1], match[2]) if match else None


def digest_of(secret: str) -> str:
    """What is stored of a secret: SHA-256, in hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def valid_until(record: KeyRecord | None, digest: str, now: float) -> float | None:
    """When the secret with this digest stops being good for the key; None if it is not good now.

    The same two comparisons are made for a key that does not exist.
    """
    current, previous = (record.digest, record.previous_digest) if record else (None, None)
    is_current = hmac.compare_digest(digest, current or NOBODY) and current is not None
    is_previous = hmac.compare_digest(digest, previous or NOBODY) and previous is not None
    if record is None or record.revoked_at is not None or not (is_current or is_previous):
        return None
    ends = [record.expires_at, None if is_current else record.previous_expires_at]
    until = min((end for end in ends if end is not None), default=float("inf"))
    return until if now < until else None


def rotated(record: KeyRecord, digest: str, *, previous_expires_at: float) -> KeyRecord:
    """The same key with a new secret; the one it replaces stays good until then, any older one ends at once."""
    return replace(record, digest=digest, previous_digest=record.digest, previous_expires_at=previous_expires_at)


def limits_to_json(limits: KeyLimits) -> dict[str, int]:
    """Only what is set.

    >>> limits_to_json(KeyLimits(concurrency=4))
    {'concurrency': 4}
    """
    return {name: value for name in LIMIT_NAMES if (value := getattr(limits, name)) is not None}


def limits_from_json(data: dict[str, int]) -> KeyLimits:
    """What `limits_to_json` wrote; names of a later version are left out."""
    return KeyLimits(**{name: int(data[name]) for name in LIMIT_NAMES if name in data})


def effective_limits(own: KeyLimits, defaults: KeyLimits) -> KeyLimits | None:
    """The key's own limits, else the defaults; 0 lifts a default. None where nothing is limited.

    >>> effective_limits(KeyLimits(concurrency=0), KeyLimits(concurrency=4, tokens_per_day=9))
    KeyLimits(requests_per_minute=None, tokens_per_minute=None, concurrency=None, tokens_per_day=9, \
user_requests_per_minute=None, user_tokens_per_minute=None, user_concurrency=None, user_tokens_per_day=None)
    """
    chosen = {name: _first_set(getattr(own, name), getattr(defaults, name)) for name in LIMIT_NAMES}
    return KeyLimits(**chosen) if any(chosen.values()) else None


def _first_set(own: int | None, default: int | None) -> int | None:
    return (own if own is not None else default) or None


def cache_salt(secret: bytes, key_id: str) -> str:
    """What keeps one key's prompts out of another's reach in the engine's prefix cache.

    Made from the server's secret, so that no client can compute or choose one.
    """
    return hashlib.blake2b(key_id.encode(), key=secret[:64], digest_size=16, person=b"cache-salt").hexdigest()
