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
from typing import Final, NamedTuple

COMPLETION_ID = re.compile(r"(?:chatcmpl-|cmpl-|resp_)([0-9a-f]{32})([0-9a-f]{8})([0-9a-f]{8})")
FEEDBACK_ID = re.compile(r"fb_([a-z]+)_([0-9a-f]{48})")
NO_USER: Final = ""
SEPARATOR: Final = "\x1f"
LAST_MILLISECOND: Final = 2**48 - 1
VARIANT_DIGITS: Final = "89ab"
"""The digit of a UUID that says how it is laid out keeps two random bits."""
RANDOM_BYTES: Final = 10
"""Of one id."""
BLOCK: Final = 400
"""Ids whose random bytes are fetched at once."""


class Principal:
    """Who is calling: the API key's public id, and the user the caller named (empty when none).

    Made for every request, and so a plain class: compiled, a frozen dataclass takes eight times as long to make.
    """

    __slots__ = ("key_id", "user")

    def __init__(self, key_id: str = "", user: str = NO_USER) -> None:
        self.key_id: Final = key_id
        self.user: Final = user

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Principal) and self.key_id == other.key_id and self.user == other.user

    def __hash__(self) -> int:
        return hash((self.key_id, self.user))

    def __repr__(self) -> str:
        return f"Principal({self.key_id!r}, {self.user!r})"


def uuid7(now_s: float, random_bytes: bytes) -> str:
    """A version 7 UUID as 32 hexadecimal digits.

    Args:
        now_s: seconds since the epoch.
        random_bytes: 10 random bytes.

    >>> uuid7(1_700_000_000.0, bytes(10))
    '018bcfe5680070008000000000000000'
    """
    milliseconds = int(now_s * 1000) & LAST_MILLISECOND
    digits = (milliseconds.to_bytes(6, "big") + random_bytes).hex()
    return f"{digits[:12]}7{digits[13:16]}{VARIANT_DIGITS[random_bytes[2] >> 4 & 3]}{digits[17:]}"


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


class Hashers(NamedTuple):
    """Of one secret, with all that they always begin with taken in: copying one costs less than making one."""

    key: hashlib.blake2b
    user: hashlib.blake2b
    token: hashlib.blake2b


_hashers: Final[dict[bytes, Hashers]] = {}


def _hashers_of(secret: bytes) -> Hashers:
    """Made once for each secret, of which a process has one."""
    made = _hashers.get(secret)
    if made is None:
        made = _hashers[secret] = Hashers(
            _hasher(secret, 4, b"", b"key\x1f"), _hasher(secret, 4, b"", b"user\x1f"), _hasher(secret, 16, b"feedback")
        )
    return made


def _hasher(secret: bytes, digest_size: int, person: bytes, beginning: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(beginning, key=secret[:64], digest_size=digest_size, person=person)


def _tag(hasher: hashlib.blake2b, text: str) -> str:
    tagging = hasher.copy()
    tagging.update(text.encode("utf-8", "surrogatepass"))
    return tagging.hexdigest()


def make_completion_suffix(secret: bytes, unique: str, owner: Principal) -> str:
    """The part of a completion's id after its prefix; sent to the engine as `X-Request-Id`."""
    hashers = _hashers_of(secret)
    text = unique + SEPARATOR + owner.key_id
    return unique + _tag(hashers.key, text) + _tag(hashers.user, text + SEPARATOR + owner.user)


def completion_suffix(completion_id: str) -> str | None:
    """The 48 hexadecimal digits of a well-formed completion id, else None."""
    match = COMPLETION_ID.fullmatch(completion_id)
    return "".join(match.groups()) if match else None


def owns(secret: bytes, suffix: str, caller: Principal) -> bool:
    """Whether `caller` is the one the completion was made for. False for a forged id as for a foreign one."""
    key_tag, user_tag = suffix[32:40], suffix[40:]
    made = make_completion_suffix(secret, suffix[:32], caller)
    key_matches = hmac.compare_digest(key_tag, made[-16:-8])
    user_matches = hmac.compare_digest(user_tag, made[-8:])
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
    body = "%x.%s" % (expires_at, suffix)  # noqa: UP031 - compiled, a format takes longer
    return f"{body}.{_tag(_hashers_of(secret).token, body)}"


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
