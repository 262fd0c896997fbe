"""Ids that carry their own proof: any gateway knows a forged or foreign one without a look-up.

A completion's id is `chatcmpl-` (or `cmpl-`, `resp_`) followed by 48 hexadecimal digits: a time-ordered UUID (RFC 9562,
version 7) and two 8-digit tags. The first tag binds it to the API key that paid for it, the second to the user it was
made for. A caller that names no user speaks for the whole key; one that names a user must be that user.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from functools import lru_cache

COMPLETION_ID = re.compile(r"(?:chatcmpl-|cmpl-|resp_)([0-9a-f]{32})([0-9a-f]{8})([0-9a-f]{8})")
FEEDBACK_ID = re.compile(r"fb_([a-z]+)_([0-9a-f]{48})")
NO_USER = ""
RANDOM_BYTES = 10
"""Of one id."""
BLOCK = 400
"""Ids whose random bytes are fetched at once."""


@dataclass(frozen=True)
class Principal:
    """Who is calling: the API key's public id, and the user the caller named (empty when none)."""

    key_id: str = ""
    user: str = NO_USER


def uuid7(now_s: float, random_bytes: bytes) -> str:
    """A version 7 UUID as 32 hexadecimal digits.

    Args:
        now_s: seconds since the epoch.
        random_bytes: 10 random bytes.

    >>> uuid7(1_700_000_000.0, bytes(10))
    '018bcfe5680070008000000000000000'
    """
    value = (int(now_s * 1000) & (2**48 - 1)) << 80 | int.from_bytes(random_bytes)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return f"{value:032x}"


class Randomness:
    """Random bytes from the operating system, fetched for many ids at once."""

    def __init__(self) -> None:
        self._block = b""
        self._place = 0

    def take(self) -> bytes:
        """Ten bytes that nobody else gets."""
        if self._place >= len(self._block):
            self._block, self._place = os.urandom(RANDOM_BYTES * BLOCK), 0
        self._place += RANDOM_BYTES
        return self._block[self._place - RANDOM_BYTES : self._place]


@lru_cache(maxsize=8)
def _keyed(secret: bytes, digest_size: int, person: bytes = b"") -> hashlib.blake2b:
    """A hash that has taken its key: copying it is half the price of keying a new one."""
    return hashlib.blake2b(key=secret[:64], digest_size=digest_size, person=person)


def _tag(secret: bytes, domain: str, *parts: str) -> str:
    hasher = _keyed(secret, 4).copy()
    hasher.update("\x1f".join((domain, *parts)).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def make_completion_suffix(secret: bytes, unique: str, owner: Principal) -> str:
    """The part of a completion's id after its prefix; sent to the engine as `X-Request-Id`."""
    return unique + _tag(secret, "key", unique, owner.key_id) + _tag(secret, "user", unique, owner.key_id, owner.user)


def completion_suffix(completion_id: str) -> str | None:
    """The 48 hexadecimal digits of a well-formed completion id, else None."""
    match = COMPLETION_ID.fullmatch(completion_id)
    return "".join(match.groups()) if match else None


def owns(secret: bytes, suffix: str, caller: Principal) -> bool:
    """Whether `caller` is the one the completion was made for. False for a forged id as for a foreign one."""
    unique, key_tag, user_tag = suffix[:32], suffix[32:40], suffix[40:]
    key_matches = hmac.compare_digest(key_tag, _tag(secret, "key", unique, caller.key_id))
    user_matches = hmac.compare_digest(user_tag, _tag(secret, "user", unique, caller.key_id, caller.user))
    return key_matches and (user_matches or caller.user == NO_USER)


def created_at(suffix: str) -> float:
    """When the id was made, in seconds since the epoch (millisecond resolution)."""
    return int(suffix[:12], 16) / 1000


def feedback_id(kind: str, suffix: str) -> str:
    """The one id of a principal's feedback of this kind on this completion; the same again replaces it."""
    return f"fb_{kind}_{suffix}"


def parse_feedback_id(text: str) -> tuple[str, str] | None:
    """`(kind, completion suffix)` of a well-formed feedback id, else None."""
    match = FEEDBACK_ID.fullmatch(text)
    return (match.group(1), match.group(2)) if match else None


def make_feedback_token(secret: bytes, suffix: str, expires_at: int) -> str:
    """A short-lived pass to rate one completion, for browsers that hold no key."""
    body = f"{expires_at:x}.{suffix}"
    hasher = _keyed(secret, 16, b"feedback").copy()
    hasher.update(body.encode())
    return f"{body}.{hasher.hexdigest()}"


def check_feedback_token(secret: bytes, token: str, suffix: str, now_s: float) -> bool:
    """Whether `token` is genuine, unexpired, and for this completion."""
    expires_hex, _, _ = token.partition(".")
    try:
        expires_at = int(expires_hex, 16)
    except ValueError:
        return False
    made = make_feedback_token(secret, suffix, expires_at).encode()
    genuine = hmac.compare_digest(token.encode("utf-8", "surrogatepass"), made)
    return genuine and now_s < expires_at
