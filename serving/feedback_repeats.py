"""Calls that come twice: what was answered the first time, under an `Idempotency-Key` or before an SDK's own retry.

Kept are the status and the time of the first answer; the rest of it follows from the body, which came again. So no text
and no name stays in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from feedback.spool import Connection
from serving.errors import BadRequest, Conflict

KEY_HEADER = "idempotency-key"
KEY_TTL_S = 24 * 3600.0
RETRY_HEADER = "x-stainless-retry-count"
"""What OpenAI's SDKs count their own retries in; they send no idempotency key."""
RETRY_TTL_S = 600.0
MAX_KEY_CHARS = 255


class Stamp(NamedTuple):
    """A call that may come again, or has."""

    owner: str
    """A digest of who sent it."""
    key: str
    body_sha: str
    ttl_s: float
    is_repeat: bool
    """It may have been answered before."""
    is_exclusive: bool
    """While it runs, the same again is refused."""


class First(NamedTuple):
    """What was answered the first time."""

    status: int
    at: float


def stamp_of(headers: Mapping[str, str], owner: str, raw: bytes) -> Stamp | None:
    """How a call is known when it comes again; None for one that need not be.

    Raises:
        BadRequest: the key is not one.
    """
    digest, who = hashlib.sha256(raw).hexdigest(), hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()
    if (key := headers.get(KEY_HEADER)) is not None:
        return Stamp(who, f"key/{_checked(key)}", digest, KEY_TTL_S, is_repeat=True, is_exclusive=True)
    if (retries := headers.get(RETRY_HEADER)) is not None:
        return Stamp(who, f"sdk/{digest}", digest, RETRY_TTL_S, is_repeat=retries != "0", is_exclusive=False)
    return None


def _checked(key: str) -> str:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise BadRequest(
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters", param="Idempotency-Key"
        )
    return key


def first_answers(connection: Connection, stamps: Sequence[Stamp], now: float) -> list[tuple[str, First] | None]:
    """For each, the digest of the first body and what was answered to it, inside a spool operation."""
    return [_first_answer(connection, stamp, now) for stamp in stamps]


def _first_answer(connection: Connection, stamp: Stamp, now: float) -> tuple[str, First] | None:
    row = connection.execute(
        "SELECT body_sha, status, at FROM repeats WHERE owner = ? AND key = ? AND until > ?",
        (stamp.owner, stamp.key, now),
    ).fetchone()
    return (row[0], First(row[1], row[2])) if row else None


def same_answer(stamp: Stamp, found: tuple[str, First] | None) -> First | None:
    """The first answer, if there was one.

    Raises:
        Conflict: the key was used with another body.
    """
    if found is None:
        return None
    body_sha, first = found
    if body_sha != stamp.body_sha:
        raise Conflict("this Idempotency-Key was used with another body", status=422, code="idempotency_key_reused")
    return first


def remember(connection: Connection, answered: Sequence[tuple[Stamp, First]]) -> None:
    """In the commit that keeps what was sent."""
    connection.executemany(
        "INSERT OR REPLACE INTO repeats (owner, key, body_sha, status, at, until) VALUES (?, ?, ?, ?, ?, ?)",
        [(s.owner, s.key, s.body_sha, first.status, first.at, first.at + s.ttl_s) for s, first in answered],
    )


def forget_old(connection: Connection, now: float) -> None:
    """What is not honoured any more."""
    connection.execute("DELETE FROM repeats WHERE until <= ?", (now,))
