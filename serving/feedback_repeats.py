"""Calls that come twice: what was answered the first time, under an `Idempotency-Key` or before an SDK's own retry.

Kept are the status and the time of the first answer; the rest of it follows from the body, which came again. So no text
and no name stays in the file.

On another machine, whose files this one cannot read, the database tells: the id of an event that came with a key is
made of the key and the body, so that the same call makes the same event wherever it comes, and its row is found by its
key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from feedback.spool import Connection
from feedback.standing import Earlier
from serving.errors import BadRequest, Conflict

KEY_HEADER = "idempotency-key"
KEY_TTL_S = 24 * 3600.0
RETRY_HEADER = "x-stainless-retry-count"
"""What OpenAI's SDKs count their own retries in; they send no idempotency key."""
RETRY_TTL_S = 600.0
MAX_KEY_CHARS = 255
DAY_S = 24 * 3600.0
KEY_BYTES = 9
BODY_DIGITS = 10
"""Of an event's id, whose 32 hexadecimal digits are the day (4), the key (18) and the body: within `KEY_TTL_S` a key
has two days at most, and when it is honoured no more its next event has another id."""
PERSON = b"pawl-repeat"


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


Found = tuple[str, First]
"""The digest of the first body, or how it begins, and what was answered to it."""


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


def first_answers(connection: Connection, stamps: Sequence[Stamp], now: float) -> list[Found | None]:
    """For each, the digest of the first body and what was answered to it, inside a spool operation."""
    return [_first_answer(connection, stamp, now) for stamp in stamps]


def _first_answer(connection: Connection, stamp: Stamp, now: float) -> Found | None:
    row = connection.execute(
        "SELECT body_sha, status, at FROM repeats WHERE owner = ? AND key = ? AND until > ?",
        (stamp.owner, stamp.key, now),
    ).fetchone()
    return (row[0], First(row[1], row[2])) if row else None


def same_answer(stamp: Stamp, found: Found | None) -> First | None:
    """The first answer, if there was one.

    Raises:
        Conflict: the key was used with another body.
    """
    if found is None:
        return None
    body_sha, first = found
    if not stamp.body_sha.startswith(body_sha):
        raise Conflict("this Idempotency-Key was used with another body", status=422, code="idempotency_key_reused")
    return first


def beginning_of(secret: bytes, stamp: Stamp, at: float) -> str:
    """How the id of an event begins that came with a key on the day of this moment. Nobody guesses a key by it."""
    hasher = hashlib.blake2b(
        f"{stamp.owner}/{stamp.key}".encode(), key=secret[:64], digest_size=KEY_BYTES, person=PERSON
    )
    return f"{int(at // DAY_S):04x}{hasher.hexdigest()}"


def beginnings(secret: bytes, stamp: Stamp | None, now: float) -> tuple[str, ...]:
    """How the id of the event begins that the same call made before, if it did. Other calls than those with a key are
    only known where they came first."""
    if stamp is None or not stamp.is_exclusive:
        return ()
    return beginning_of(secret, stamp, now), beginning_of(secret, stamp, now - stamp.ttl_s)


def event_id_for(secret: bytes, stamp: Stamp, now: float) -> str:
    """The id of the event that a call with a key makes, wherever it comes."""
    return beginning_of(secret, stamp, now) + stamp.body_sha[:BODY_DIGITS]


def found_in(stamp: Stamp, earlier: Earlier | None, now: float) -> Found | None:
    """What the database says was answered to a call with the same key, while that is honoured.

    What was not visible then (202) is by now, and is answered like the rest.
    """
    if earlier is None or earlier.at + stamp.ttl_s <= now:
        return None
    body_sha = earlier.event_id[-BODY_DIGITS:]
    if earlier.is_retraction:
        return body_sha, First(202 if earlier.follows_retraction is None else 200, earlier.at)
    return body_sha, First(200 if earlier.follows_retraction is False else 201, earlier.at)


def remember(connection: Connection, answered: Sequence[tuple[Stamp, First]]) -> None:
    """In the commit that keeps what was sent."""
    connection.executemany(
        "INSERT OR REPLACE INTO repeats (owner, key, body_sha, status, at, until) VALUES (?, ?, ?, ?, ?, ?)",
        [(s.owner, s.key, s.body_sha, first.status, first.at, first.at + s.ttl_s) for s, first in answered],
    )


def forget_old(connection: Connection, now: float) -> None:
    """What is not honoured any more."""
    connection.execute("DELETE FROM repeats WHERE until <= ?", (now,))
